//! The coordinator as a process: its configuration, its sockets, its lease on the store, startup and shutdown.
//!
//! [`serve`] runs all of it. [`leader`] takes the lease and starts what only a leader runs, [`heartbeat`] renews the lease,
//! [`upkeep`] repairs what only the leader can. [`listen`] and [`listener`] accept connections and hand requests to
//! [`crate::http`].

pub mod config;
pub mod error;
pub(super) mod heartbeat;
pub(super) mod leader;
pub(super) mod listen;
pub mod listener;
pub mod private_directory;
pub mod serve;
pub(super) mod upkeep;
