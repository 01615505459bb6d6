//! The daemon that serves one mount.
//!
//! - [`config`]: flags and a file -> one checked `Config`; the only reader of the environment.
//! - [`fuse`]: the thin adapter; the only file that names fuser.
//! - [`mountpoint`]: which directories may be mounted on, and how mounts end.
//! - [`control_socket`]: the socket that answers `cachefs status`.
//! - [`daemon`]: puts all of it together and runs it.

pub mod config;
pub mod control_socket;
pub mod daemon;
pub mod fuse;
pub mod mountpoint;
