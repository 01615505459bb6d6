//! The test harness: real images, a real registry, a real Docker engine, and the project's own binaries.
//!
//! The harness drives binaries only and knows nothing of the crates behind them, so a test that passes shows what a
//! user would see. Modules, each importing only from those above it:
//!
//! - [`mounts`]: the mounts of this namespace, and how to detach them
//! - [`process`]: start, watch and stop one process; poll with a deadline
//! - [`cluster`]: the project's own processes: coordinator, `cachefsctl`, mounts
//! - [`slowdisk`]: a shared disk that is slow or fails
//! - [`tree`]: a directory tree with every attribute, and the differences of two trees
//! - [`images`]: test images, from Debian packages and made by hand
//! - [`streamed`]: layers whose tar is never stored whole
//! - [`http`]: the part of HTTP that the registry needs
//! - [`proxy`]: a forward proxy for clients
//! - [`registry`]: a real docker-registry, and a faulty one
//! - [`leftovers`]: what container engines leave behind
//! - [`namespace`]: network namespaces, and connections out of them
//! - [`engine_tree`]: Debian trees with newer engines
//! - [`docker`]: a real dockerd in a network namespace of its own
//! - [`workloads`]: what people run on an engine besides single containers
//! - [`cri`]: a client of Kubernetes' container runtime interface
//! - [`containerd`]: a real containerd with the snapshotter
//! - [`containerd_store`]: a newer dockerd that keeps its images in containerd
//! - [`podman`]: a real Podman with an image store
//! - [`site`]: one store with its coordinator, and the store's contents
//! - [`hosts`]: the hosts that mount a site's store
//! - [`secured`]: a site behind TLS and tokens
//!
//! Everything that a value here starts or mounts is gone when the value is dropped, even if a test panics.

pub mod cluster;
pub mod containerd;
pub mod containerd_store;
pub mod cri;
pub mod docker;
pub mod engine_tree;
pub mod hosts;
pub mod http;
pub mod images;
pub mod leftovers;
pub mod mounts;
pub mod namespace;
pub mod podman;
pub mod process;
pub mod proxy;
pub mod registry;
pub mod secured;
pub mod site;
pub mod slowdisk;
pub mod streamed;
pub mod tree;
pub mod workloads;
