//! Docker on a data-root whose layers are in the mount: a real dockerd that does what users do with it. Where no other version
//! is named, it is 20.10.
//!
//! - `host`: one host with store, mount, data-root and dockerd.
//! - `running`: containers, with what they see, change and may do.
//! - `system_calls`: what programs in them do with files of the image.
//! - `images`: commit, build, save, push, rmi, compose.
//! - `syncing`: changes in the store, with dockerd stopped, running and restarted.
//! - `engines`: newer versions of Docker.
//! - `removal`: `data-root remove`.
//! - `formats`: the written files, compared with those that dockerd writes for the same image.
//! - `faults`: bad input, and death at any moment.

#[cfg(test)]
#[path = "data_root/engines.rs"]
mod engines;
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
#[path = "data_root/removal.rs"]
mod removal;
#[cfg(test)]
#[path = "data_root/running.rs"]
mod running;
#[cfg(test)]
#[path = "data_root/syncing.rs"]
mod syncing;
#[cfg(test)]
#[path = "data_root/system_calls.rs"]
mod system_calls;
