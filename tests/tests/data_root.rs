//! Docker on a data-root whose layers lie in the mount: dockerd 20.10 itself, doing what people do with it.
//!
//! - `host`: one host with store, mount, data-root and dockerd.
//! - `running`: containers: what they see, change and may.
//! - `images`: commit, build, save, push, rmi, compose.
//! - `syncing`: what changes in the store, with dockerd stopped, running and restarted.
//! - `formats`: the files against those that dockerd writes for the same image.
//! - `faults`: bad input, and death at any moment.

#[cfg(test)]
#[path = "data_root/faults.rs"]
mod faults;
#[cfg(test)]
#[path = "data_root/formats.rs"]
mod formats;
#[cfg(test)]
#[path = "data_root/host.rs"]
mod host;
#[cfg(test)]
#[path = "data_root/images.rs"]
mod images;
#[cfg(test)]
#[path = "data_root/running.rs"]
mod running;
#[cfg(test)]
#[path = "data_root/syncing.rs"]
mod syncing;
