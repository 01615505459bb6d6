//! The snapshotter under a real containerd: what the store holds runs without a download, and nothing else changes.
//!
//! - `docker`: Docker 28 with its images in containerd.
//! - `engine`: pods and containers through the container runtime interface.
//! - `faults`: a mount that hangs, a full disk, death at any moment.
//! - `rules`: containerd's own overlay snapshotter and ours, asked the same.

#[cfg(test)]
mod docker;
#[cfg(test)]
mod engine;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod rules;
