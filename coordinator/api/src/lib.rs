//! The messages of the coordinator's HTTP API, and the client that sends them.
//!
//! This crate is shared by the coordinator's server, `cachefsctl` and `cachefs`, so that each message has one
//! definition, from which the OpenAPI description is derived. It depends on no other crate of the project: digests and
//! image names are transferred as the strings that people read.
//!
//! Module order (imports point up this list only):
//!
//! - [`printable`]: text from strangers, made safe to show. [`report`]: how all programs report errors.
//! - [`error`]: the one shape of a refusal, `{"error": {"code", "message"}}`.
//! - [`quantity`]: sizes and durations as people write them.
//! - [`replaceable`]: directories that somebody else could replace.
//! - [`event`]: numbered events. [`access`]: roles and tokens. [`host`]: hosts and their leases.
//! - [`fsck`]: checks of the store.
//! - [`job`]: pull jobs and the progress of their layers.
//! - [`image`]: the images of the store.
//! - [`retention`]: what is kept, and what garbage collections do.
//! - [`schedule`]: schedules, their runs, the plan. [`limits`]: what pulls may use. [`settings`]: all of it in one
//!   document.
//! - [`wanted`]: images that hosts lack, and answers to webhooks.
//! - [`profile`]: what is known of images' starts.
//! - [`status`]: the coordinator's own condition.
//! - [`address`]: where a coordinator listens.
//! - [`trust`]: which certificates to trust over TLS. [`credentials`]: what to show, and which authorities to trust.
//! - [`route`]: every path of version 1, spelled once.
//! - [`client`]: one method per route.
//!
//! Invariant: within `/v1` fields are only added, and readers ignore fields that they do not know.

pub mod access;
pub mod address;
pub mod client;
pub mod credentials;
pub mod error;
pub mod event;
pub mod fsck;
pub mod host;
pub mod image;
pub mod job;
pub mod limits;
pub mod printable;
pub mod profile;
pub mod quantity;
pub mod replaceable;
pub mod report;
pub mod retention;
pub mod route;
pub mod schedule;
pub mod settings;
pub mod status;
pub mod trust;
pub mod wanted;

pub use address::Address;
pub use client::{Client, ClientError};
pub use credentials::Credentials;
