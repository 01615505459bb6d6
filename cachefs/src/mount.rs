//! The daemon that serves one mount.
//!
//! - [`config`]: flags and a file -> one checked `Config`; the only reader of the environment.
//! - [`fuse`]: the thin adapter to fuser.
//! - [`mountpoint`]: which directories may be mounted on, and how mounts end.
//! - [`data_files`]: the other adapter: content of native trees, for the kernel alone.
//! - [`loop_device`]: files as block devices. [`native_mount`]: mounts native trees.
//! - [`native_trees`]: those of one mount, mounted on demand.
//! - [`control_socket`]: the socket that answers `cachefs status`.
//! - [`cache_dir`]: the local cache's directory.
//! - [`daemon`]: puts all of it together and runs it.

pub mod cache_dir;
pub mod config;
pub mod control_socket;
pub mod daemon;
pub mod data_files;
pub mod fuse;
pub mod loop_device;
pub mod mountpoint;
pub mod native_mount;
pub mod native_trees;
