//! A registry that speaks the OCI distribution protocol, which is Docker's v2.
//!
//! [`client`] asks for manifests, [`blob`] for layers, [`tags`] for names. All requests go through [`transport`]: one hop at a time, within [`reach`], by [`proxies`],
//! with [`redirect`]s looked at. [`auth`] proves who we are, with what [`credentials`] and their [`credential_cache`] know. [`retry`], [`persist`] and [`trouble`] decide
//! what is tried again.

pub mod auth;
pub mod blob;
pub(super) mod body;
pub(super) mod certs_d;
pub mod challenge;
pub mod client;
pub(super) mod clients;
pub(super) mod coding;
pub mod credential_cache;
pub(super) mod credential_helper;
pub mod credentials;
pub mod docker_config;
pub(super) mod exact;
pub(super) mod fault;
#[cfg(test)]
pub(super) mod hostile_tests;
pub(super) mod location;
#[cfg(test)]
pub(super) mod login_tests;
pub mod persist;
pub mod proof;
pub mod proxies;
pub mod reach;
pub mod redirect;
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
pub mod trouble;
#[cfg(test)]
pub(super) mod wire_tests;
pub(super) mod words;
