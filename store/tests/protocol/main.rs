//! The store's protocol as two small models, of which every reachable state is checked.
//!
//! - `lead`: coordinators that take over from each other, pull, commit, move a tag, delete; and a host with a lease.
//! - `packs`: one leader's unpackers share pieces while a collection removes and thins packs; then another one leads.
//!
//! An action is what the code does in one step that others cannot interrupt: a `rename(2)`, a `link(2)`, or what
//! happens under a lock. Between any two actions of one party all others may act, crash, or stand still for as long as
//! they like. A standby may find the leader's beat silent at any time. So the models include every reading of the
//! standby's and the leader's clocks and every delay of the leader, and safety does not rest on time. The one thing
//! that is timed is a host's lease: a leader knows all live hosts once it has led for as long as a lease lives.
//!
//! A model that cannot fail shows nothing. So the models are also checked with each step of the protocol left out, and
//! then a property must fail.

mod lead;
mod packs;

use std::fmt::Debug;
use std::hash::Hash;
use std::time::Instant;

use stateright::{Checker, Model};

/// Checks all states; every property must hold.
fn holds<M>(name: &str, model: M)
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + Debug + Hash + PartialEq + Send + Sync,
    M::Action: Clone + Debug + PartialEq + Send + Sync,
{
    let begun = Instant::now();
    let checker = model.checker().threads(2).spawn_bfs().join();
    let (states, depth) = (checker.unique_state_count(), checker.max_depth());
    println!("{name}: {states} states, {depth} steps deep, in {:.1} s", begun.elapsed().as_secs_f64());
    checker.assert_properties();
}

/// Looks for a state that breaks the property; there must be one.
fn fails<M>(name: &str, model: M, property: &'static str)
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + Debug + Hash + PartialEq + Send + Sync,
    M::Action: Clone + Debug + PartialEq + Send + Sync,
{
    let begun = Instant::now();
    let finish = stateright::HasDiscoveries::AnyOf([property].into());
    let checker = model.checker().finish_when(finish).spawn_bfs().join();
    let path = checker.discovery(property).unwrap_or_else(|| panic!("{name}: nothing breaks \"{property}\""));
    let actions = path.into_actions();
    let seconds = begun.elapsed().as_secs_f64();
    println!("{name}: \"{property}\" breaks in {} steps ({seconds:.1} s): {actions:?}", actions.len());
}
