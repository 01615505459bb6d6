//! A registry that speaks the OCI distribution protocol, which is Docker's v2.
//!
//! [`client`] requests documents, [`blob`] layers and [`tags`] tags. All requests go through [`transport`]: one hop at a time, within
//! [`egress`], by [`proxies`], and with a check of each [`redirect`]. [`auth`] authenticates with what [`credentials`] and their
//! [`credential_cache`] provide. [`retry`], [`retry`] and [`attempt_error`] decide what is tried again.

pub mod attempt_error;
pub mod auth;
pub mod authorization_header;
pub mod blob;
pub(super) mod body;
pub(super) mod certs_d;
pub mod challenge;
pub mod client;
pub(super) mod clients;
pub(super) mod content_encoding;
pub mod credential_cache;
pub(super) mod credential_helper;
pub mod credentials;
pub mod docker_config;
pub mod egress;
pub(super) mod error_body;
pub(super) mod fault;
#[cfg(test)]
pub(super) mod hostile_tests;
pub(super) mod location;
#[cfg(test)]
pub(super) mod login_tests;
pub mod proxies;
pub(super) mod raw_target;
pub mod redirect;
pub(super) mod reference;
pub mod registry;
#[cfg(test)]
pub(super) mod reported_tests;
pub mod retry;
pub(super) mod scheme;
#[cfg(test)]
pub(crate) mod simulated;
pub mod tags;
#[cfg(test)]
pub(super) mod tests;
pub(super) mod token_service;
pub mod transport;
#[cfg(test)]
pub(super) mod wire_tests;
