//! The coordinator: pulls images from registries into the shared store, once, and answers hosts and admins.
//!
//! A pull reads straight through the files: [`registry`] (where bytes come from) -> [`pull`] (one job: fetch, decode, check) ->
//! [`unpack`] (tar stream to chunks and index) -> `store::publisher`. A request reads: `coordinator-api` -> [`server`] ->
//! [`board`] -> [`dispatch`] -> [`pull`].
//!
//! Module order (imports point up this list only):
//!
//! - [`clock`]: what time it is. [`private_directory`]: what is the coordinator's alone. [`image_pattern`]: many images by name. [`unpack`]: a layer's tar stream in, a published layer out, and back.
//! - [`encoding`]: gzip, zstd, plain.
//! - [`access`]: who asks, and what they may. [`hooks`]: what registries' notifications say. [`connections`]: who has how many of
//!   them. [`quota`]: shares of memory.
//! - [`limits`]: places, bandwidth, requests, breakers. [`demand`]: how often hosts may have images pulled.
//! - [`registry`]: OCI and Docker registries; docker-save tars and OCI layouts behind the same trait. [`config`]: flags,
//!   environment and file as one checked `Config`.
//! - [`archive_writer`]: an image as a docker-save tar. [`blob_cache`]: layers as registries sent them. [`mirror`]: the store as a
//!   registry.
//! - [`job`]: the states of a pull job, drawn. [`schedule`]: pure: what is due, what it promises, which job goes next.
//! - [`journal`]: what must survive a restart.
//! - [`events`]: what happened, numbered. [`tokens`]: who may do what without an account here. [`hosts`]: leases on layers.
//! - [`pull`]: one job. [`board`]: all jobs. [`dispatch`]: runs them. [`scheduler`]: makes them when they are due.
//! - [`profiles`]: hosts' traces become startup packs.
//! - [`garbage`]: what is kept, and the collecting of the rest. [`settings`]: schedules, limits and what is kept as one document.
//! - [`fsck`]: checks of the store, and repairs.
//! - [`server`]: the HTTP API. [`listener`]: sockets, TLS and peers. [`serve`]: puts all of it together and runs it.
//!
//! Invariants: only the holder of the store's lease publishes; a layer is fetched once however many jobs want it; memory is bounded
//! whatever the size of a layer; the journal is a cache of what the store says, plus jobs.

pub mod access;
pub mod archive_writer;
pub mod blob_cache;
pub mod board;
pub mod clock;
pub mod config;
pub mod connections;
pub mod demand;
pub mod dispatch;
pub mod encoding;
pub mod events;
pub mod fsck;
pub mod garbage;
pub mod hooks;
pub mod hosts;
pub mod image_pattern;
pub mod job;
pub mod journal;
pub mod limits;
pub mod listener;
pub mod mirror;
pub mod private_directory;
pub mod profiles;
pub mod pull;
pub mod quota;
pub mod registry;
pub mod schedule;
pub mod scheduler;
pub mod serve;
pub mod server;
pub mod settings;
pub mod tokens;
pub mod unpack;
