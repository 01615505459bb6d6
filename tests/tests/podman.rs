//! Podman on an additional image store that `cachefs image-store` keeps.

#[cfg(test)]
#[path = "podman/engines.rs"]
mod engines;
