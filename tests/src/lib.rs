//! The test harness: real images, a real registry, a real Docker engine, and the project's own binaries.
//!
//! It drives binaries only and knows nothing of the crates behind them, so a test that passes here has shown
//! what a user would see. Modules, each importing only from those above it:
//!
//! - [`mounts`]: what is mounted where, and taking it away again
//! - [`process`]: start, watch, stop one process; poll with a deadline
//! - [`cluster`]: the project's own processes: coordinator, `cachefsctl`, mounts
//! - [`slowdisk`]: a shared disk that is slow or at fault
//! - [`tree`]: a directory tree with every attribute, and the differences of two
//! - [`images`]: test images, from Debian packages and made by hand
//! - [`streamed`]: layers whose tar is never whole anywhere
//! - [`http`]: the few words of HTTP that the registry needs
//! - [`proxy`]: a proxy that clients are told to use
//! - [`registry`]: a real docker-registry, and a faulty one
//! - [`docker`]: a real dockerd in a network namespace of its own
//! - [`site`]: one store with its coordinator, and what the store holds
//! - [`hosts`]: the hosts that mount a site's store
//! - [`secured`]: a site behind TLS and tokens
//!
//! Everything that a value here starts or mounts is gone when the value is dropped, also when a test panics.

pub mod cluster;
pub mod docker;
pub mod hosts;
pub mod http;
pub mod images;
pub mod mounts;
pub mod process;
pub mod proxy;
pub mod registry;
pub mod secured;
pub mod site;
pub mod slowdisk;
pub mod streamed;
pub mod tree;
