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
//!   data-roots                          where dockerd has links into the mount, one path a line
//!   traces/<time>.trace                 what starts read, until the coordinator has it
//!   objects/<2 hex>/<BLAKE3 hex>        whole files, and chunks of small files, by the digest of their content
//!   objects/<2 hex>/<BLAKE3 hex>.part   files that are being filled, piece by piece; missing pieces are holes
//! ```
//!
//! Module order (imports point up this list only):
//!
//! - `failure`: what can go wrong with a request, and its errno.
//! - `metrics`: counters.
//! - `private`: directories and files that nobody else on the host may read.
//! - `pool`: threads that may wait for a disk, so that nobody else has to.
//! - `layer_name`: what layers are called below `layers/`.
//! - `single_flight`: one fetch, many who wait for it.
//! - `origin`: the shared store as this host sees it: opened when it can be, retried, timed.
//! - `catalogue`: the images, followed from generation to generation.
//! - `recorder`: traces of what starts read, and their way to the coordinator.
//! - `wants`: images that were looked for in vain, told to the coordinator.
//! - `cache`: file content, read through the local disk.
//! - `indexes`: layer indexes, fetched once and read in blocks.
//! - `prefetch`: startup packs of images that start, and whole images.
//! - `config`: flags, file -> one checked `Config`; the only reader of the environment.
//! - `filesystem`: the tree, as plain Rust.
//! - `lease`: tells the coordinator what this host uses.
//! - `fuse`: the thin adapter; the only file that names fuser.
//! - `mountpoint`: what may be mounted on, and how mounts end.
//! - `control`: the socket that answers `cachefs status`.
//! - `oom_score`: whom the kernel ends when memory runs out.
//! - `daemon`: puts all of it together and runs it.
//! - `docker`: Docker's data-root on top of the mount.

pub mod cache;
pub mod catalogue;
pub mod config;
pub mod control;
pub mod daemon;
pub mod docker;
pub mod failure;
pub mod filesystem;
#[cfg(test)]
mod fixture;
pub mod fuse;
pub mod indexes;
pub mod layer_name;
pub mod lease;
pub mod metrics;
pub mod mountpoint;
pub mod oom_score;
pub mod origin;
pub mod pool;
pub mod prefetch;
pub mod private;
pub mod recorder;
pub mod single_flight;
pub mod wants;
