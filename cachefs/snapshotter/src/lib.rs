//! containerd's proxy snapshotter: what the shared store holds is there without a download, everything else is an overlay
//! snapshot on the local disk.
//!
//! containerd asks a snapshotter for each layer of an image with the chainID that the layer will complete. When the store
//! holds that chain, the answer is that the snapshot exists already: containerd finds it in a listing, takes it as the next
//! layer's parent and fetches nothing. A container's own snapshot on top is an overlay whose lower directory is the chain's
//! tree in the mount. A chain that the store lacks is fetched and unpacked by containerd into ordinary snapshots here; both
//! kinds mix in one image.
//!
//! Invariants:
//!
//! - A listing holds what was handed out and nothing else: containerd removes what it does not know.
//! - Nothing here writes to the shared store or to the mount. Removing a shared snapshot removes a record and a link.
//! - A record has its directory, after a kill or a power cut at any point.
//! - Nothing waits for the mount or its daemon without limit: containerd keeps everybody else waiting meanwhile.
//! - One root is one containerd's: its metadata is locked by the process that serves it.
//!
//! The links in `ROOT/snapshots` tell the host's daemon which layers engines have here, and its lease keeps them in the store.
//!
//! Module order (imports point up this list only):
//!
//! - [`filter`]: the language of listings.
//! - [`record`]: what is known of a snapshot.
//! - [`error`]: classes of failures.
//! - [`metadata`]: records, durably, and the rules they obey.
//! - [`bounded`]: questions to something that may hang.
//! - [`trees`]: where a chain's tree is on this host.
//! - [`directories`]: files on the local disk.
//! - [`mounts`]: what an engine mounts.
//! - [`snapshotter`]: the operations.
//! - [`wire`]: the messages of gRPC.
//! - [`service`]: the operations as messages.
//! - [`server`]: the socket.

pub mod bounded;
pub mod directories;
pub mod error;
pub mod filter;
pub mod metadata;
pub mod mounts;
pub mod record;
pub mod server;
pub mod service;
pub mod snapshotter;
pub mod trees;
pub mod wire;
