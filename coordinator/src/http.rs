//! The HTTP API: maps routes to the modules that do the work.
//!
//! [`router`] has the one table of routes: path, methods, who may use each, and handlers. [`guard`] checks every request before
//! its handler; tests compare the table with the OpenAPI description and try each route with every role. Handlers parse the
//! request, call other modules and convert the result; they hold no logic of their own. Work on disks runs on threads that may
//! block.
//!
//! A standby answers questions about the store and refuses everything else with the leader's name.

pub mod access;
pub mod api_state;
pub mod auth;
pub mod bodies;
mod conditional;
pub mod connections;
pub mod counts;
pub mod error;
pub mod extract;
pub mod guard;
pub mod handlers;
pub mod mirror;
pub mod on_demand_limiter;
pub mod openapi;
pub mod origin;
pub mod pages;
pub mod quota;
pub mod router;
pub mod streams;
