//! Integration with container engines: one module per engine, each a layout that the engine reads or a protocol that it
//! speaks.
//!
//! Module order (imports point up this list only):
//!
//! - `mount`: the mount that the engines' images lie in.
//! - [`data_root`]: dockerd's data-root with the classic overlay2 driver (Docker 20.10 to 28).
//! - [`snapshotter`]: containerd's proxy snapshotter (Docker's containerd image store, ctr, nerdctl, Kubernetes).

mod mount;

pub mod data_root;

pub mod snapshotter;
