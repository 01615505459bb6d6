//! The reader: serves the shared store on one host, through FUSE and a local read-through cache.
//!
//! Nothing here ever writes to the shared store, and nothing needs the coordinator: a mount starts and reads with the
//! coordinator down, and reads what is cached with the shared disk down too. What a container may rely on is in
//! `cachefs/SEMANTICS.md`; the store's bytes are in `store/FORMAT.md`.
//!
//! The cache directory (on the host's own disk, losable at any moment, even while the daemon runs):
//!
//! ```text
//! CACHE/
//!   lock                                one live daemon a cache directory
//!   control.sock                        `cachefs status` asks here
//!   cachefs.log                         what the daemon says, unless it runs in the foreground
//!   catalogue                           the newest catalogue seen, so that a mount starts without the shared disk
//!   indexes/<diffID hex>.<BLAKE3 hex>   empty: says which of the objects is the layer's index, unpacked
//!   host-id                             tells this host from others of its name
//!   data-roots                          where engines have links into the mount, one path a line; data-roots.lock: held while it changes
//!   traces/<time>.trace                 what starts read, until the coordinator has it
//!   objects/<2 hex>/<BLAKE3 hex>        whole files, and chunks of small files, by the digest of their content
//!   objects/<2 hex>/<BLAKE3 hex>.part   files that are being filled, piece by piece; missing pieces are holes
//! ```
//!
//! Module order (imports point up this list only):
//!
//! - [`os`]: what this machine provides: private files, threads that may wait, the kernel's OOM killer.
//! - [`source`]: the shared store as this host sees it, and what its catalogue says.
//! - [`uplink`]: what this host tells the coordinator.
//! - [`content`]: file content and layer indexes, read through the local disk and prefetched.
//! - [`filesystem`]: the tree that the mount shows, as plain Rust.
//! - [`mount`]: the daemon: its configuration, its mount, its control socket.
//! - [`docker`]: container engines on top of the mount.

pub mod content;
pub mod docker;
pub mod filesystem;
#[cfg(test)]
mod fixture;
pub mod mount;
pub mod os;
pub mod source;
pub mod uplink;
