//! What the coordinator says and hears over HTTP, and the client that says it.
//!
//! This crate is shared by the coordinator's server, `cachefsctl` and `cachefs`, so that a message has one definition
//! and the OpenAPI description is derived from it. It depends on nothing of ours: digests and image names travel as
//! the strings that people read.
//!
//! Module order (imports point up this list only):
//!
//! - [`printable`]: strangers' text, made fit for people's eyes. [`report`]: how our programs say that something went wrong.
//! - [`error`]: the one shape of a refusal, `{"error": {"code", "message"}}`.
//! - [`quantity`]: sizes and durations as people write them.
//! - [`event`]: what happened, numbered. [`access`]: roles and tokens. [`host`]: hosts and their leases.
//! - [`fsck`]: checks of the store.
//! - [`job`]: pull jobs and the progress of their layers.
//! - [`image`]: the images of the store.
//! - [`retention`]: what is kept, and what collections of garbage do.
//! - [`schedule`]: standing orders, their runs, the plan. [`limits`]: what pulling may use up. [`settings`]: all of it in one document.
//! - [`wanted`]: what hosts lack, and what webhooks led to.
//! - [`profile`]: what is known of images' starts.
//! - [`status`]: the coordinator's own condition.
//! - [`address`]: where a coordinator listens.
//! - [`trust`]: whom to trust over TLS. [`credentials`]: what to show, and whom to trust.
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
