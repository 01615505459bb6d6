//! The shared store as this host sees it: read-only, and away at any moment.
//!
//! - [`failure`]: what can go wrong with a request, and its errno.
//! - [`metrics`]: counters of all that is served and fetched.
//! - [`layer_name`]: the names of layers below `layers/`.
//! - [`single_flight`]: one fetch, many who wait for it.
//! - [`shared_store`]: the store, opened when it can be, with retries and timeouts.
//! - [`catalogue`]: the images, followed from generation to generation.

pub mod catalogue;
pub mod failure;
pub mod layer_name;
pub mod metrics;
pub mod shared_store;
pub mod single_flight;
