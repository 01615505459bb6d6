//! Integration with container engines: one module per engine, each a layout that the engine reads or a protocol that it
//! speaks.
//!
//! Module order (imports point up this list only):
//!
//! - `mount`: the mount that the engines' images lie in.
//! - `files`, `short_name`, `tar_split`, `workers`: what layouts on the local disk have in common.
//! - [`data_root`]: dockerd's data-root with the classic overlay2 driver (Docker 20.10 to 28).
//! - [`image_store`]: an additional image store of containers/storage (Podman, Buildah, CRI-O).
//! - [`snapshotter`]: containerd's proxy snapshotter (Docker's containerd image store, ctr, nerdctl, Kubernetes).

mod files;
mod mount;
#[cfg(test)]
mod samples;
mod short_name;
mod tar_split;
mod workers;

pub mod data_root;
pub mod image_store;
pub mod snapshotter;
