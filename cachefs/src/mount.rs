//! One mount, and what serves it: a keeper, which mounts and stays, and a worker, which does everything else and may die.
//!
//! - [`config`]: flags and a file -> one checked `Config`; the only reader of the environment.
//! - [`fuse`]: the thin adapter to fuser.
//! - [`keeper`]: mounts, and starts a worker, and the next one when that dies. [`link`]: what the two say to each other.
//! - [`connection`]: the connection to the kernel, which the next worker takes over.
//! - [`mountpoint`]: which directories may be mounted on, and how mounts end.
//! - [`data_files`]: the other adapter: content of native trees, for the kernel alone.
//! - [`loop_device`]: files as block devices. [`native_mount`]: mounts native trees.
//! - [`native_trees`]: those of one mount, mounted on demand.
//! - [`control_socket`]: the socket that answers `cachefs status`.
//! - [`cache_dir`]: the local cache's directory.
//! - [`components`]: puts all of it together. [`worker`]: runs it.

pub mod cache_dir;
mod components;
pub mod config;
mod connection;
pub mod control_socket;
pub mod data_files;
pub mod fuse;
pub mod keeper;
pub mod link;
pub mod loop_device;
pub mod mountpoint;
pub mod native_mount;
pub mod native_trees;
pub mod worker;
