//! The coordinator: pulls images from registries into the shared store, once, and answers hosts and admins.
//!
//! To follow a pull, read [`registries`] (where bytes come from) -> [`jobs::pull`] (one job: fetch, decode, check) -> [`unpack`]
//! (tar stream to chunks and index) -> `store::publisher`. To follow a request, read `coordinator-api` -> [`http`] ->
//! [`jobs::queue`] -> [`jobs::runner`] -> [`jobs::pull`].
//!
//! Module order (imports point up this list only):
//!
//! - [`unpack`]: a layer's tar stream in, a published layer out, and back.
//! - [`state`]: what survives a restart.
//! - [`identity`]: who asks, and what they may.
//! - [`registries`]: where images come from, and how much may be asked of it.
//! - [`profiles`]: hosts' traces become startup packs.
//! - [`jobs`]: pull jobs and how they are run.
//! - [`plan`]: when images are pulled.
//! - [`admin`]: settings, garbage collection, checks of the store.
//! - [`http`]: the API, and the store as a registry.
//! - [`app`]: puts all of it together and runs it.
//!
//! Invariants: only the holder of the store's lease publishes; a layer is fetched once however many jobs want it; memory is
//! bounded whatever the size of a layer; the database is a cache of what the store says, plus jobs.

pub mod admin;
pub mod app;
pub mod http;
pub mod identity;
pub mod jobs;
pub mod plan;
pub mod profiles;
pub mod registries;
pub mod state;
pub mod unpack;
