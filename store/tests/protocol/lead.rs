//! Lease, stage, publish, commit, tag move, pin, hold, host lease, mark, delete, and taking over.
//!
//! One tag, which may point to the image of layer 0 or of layer 1. Each coordinator has a thread that writes (it pulls, or
//! removes the tag) and one that collects. Their steps are those of `store::publisher`:
//!
//! ```text
//! write     hold ─> look ─┬─ there ────────────────────────────┬─> lock, check, compare ─> link the next generation
//!                         └─ stage ─> check the lease ─> rename ┘
//! collect   mark ─> lock, check the lease, look again ─> rename into the trash
//! take over take the epoch ─> make trash ─> sweep trash ─> sweep staging ─> read ─> check the lease ─> link the fence
//! ```
//!
//! Generation numbers are not kept: a coordinator is `behind` when another one has committed since it read, and its
//! link fails exactly then.

use stateright::{Model, Property};

use super::{fails, holds};

/// A step of the protocol that is left out, to show that it is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LeftOut {
    Nothing,
    /// Deletion does not look again under the lock.
    SecondLook,
    /// The old leader's trash is left where it is.
    TrashFence,
    /// The old leader's staging is left where it is.
    StagingFence,
    /// The fence is committed before the sweep.
    SweepBeforeFence,
    /// A candidate does not look at the lease between reading and its fence.
    CheckBeforeFence,
    /// Pulls hold nothing.
    Holds,
    /// A new leader collects before hosts can have told it what they use.
    WaitForHosts,
    /// Generations are replaced rather than created exclusively.
    ExclusiveGenerations,
    /// A candidate sweeps everything that is not its own.
    OlderOnly,
}

/// The size of the model.
#[derive(Debug, Clone, Copy)]
struct Size {
    coordinators: usize,
    /// The most epochs that are taken.
    epochs: u8,
    layers: u8,
    host: bool,
}

#[derive(Debug, Clone)]
struct Lead {
    size: Size,
    left_out: LeftOut,
}

type Layer = u8;

/// A thread that writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Writer {
    Idle,
    Held(Layer),
    Staged(Layer),
    Checked(Layer),
    Relies(Layer),
    /// Holds the catalogue's lock and is about to link this state.
    Linking(Option<Layer>),
}

/// A thread that collects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Collector {
    Idle,
    Marked(Layer),
    /// Holds both locks and is about to rename.
    Renaming(Layer),
    Removed(Layer),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Role {
    Standby,
    /// Steps of taking over that are done.
    Candidate(u8),
    Leading,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Coordinator {
    role: Role,
    epoch: u8,
    /// The tag as this coordinator knows it.
    view: Option<Layer>,
    behind: bool,
    writer: Writer,
    collector: Collector,
    /// What the host leases, as far as this coordinator knows.
    leased: Option<Layer>,
    hosts_known: bool,
}

const STANDBY: Coordinator = Coordinator {
    role: Role::Standby,
    epoch: 0,
    view: None,
    behind: false,
    writer: Writer::Idle,
    collector: Collector::Idle,
    leased: None,
    hosts_known: false,
};

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    /// The highest epoch that was taken.
    epoch: u8,
    /// The epoch that wrote the newest generation.
    fenced: u8,
    /// What the newest generation says of the tag.
    tag: Option<Layer>,
    /// Whether the tag is pinned.
    pinned: bool,
    /// Layers that are in their place.
    layers: [bool; 2],
    /// What each epoch has in staging.
    staged: [Option<Layer>; 4],
    /// Epochs that have a trash.
    trash: [bool; 4],
    /// What the host uses under a lease that lives.
    host: Option<Layer>,
    coordinators: [Coordinator; 3],
    /// A write of a leader succeeded after its successor's fence.
    stale_write: bool,
    /// A pull that could go on lost a layer that it had found.
    lost: bool,
    /// The rules removed a pinned tag.
    unpinned: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    TakeEpoch(usize),
    TakeOver(usize),
    Crash(usize),
    Hold(usize, Layer),
    Write(usize),
    Remove(usize),
    Mark(usize, Layer),
    Collect(usize),
    Grant(usize),
    Renew(usize),
    HostLeaves,
    LeaseLapses(usize),
    HostsKnown(usize),
}

impl State {
    /// The check before a rename or a link: whether this coordinator's epoch is still the highest.
    fn leads(&self, who: usize) -> bool {
        self.coordinators[who].epoch == self.epoch
    }

    fn has(&self, layer: Option<Layer>) -> bool {
        layer.is_none_or(|layer| self.layers[usize::from(layer)])
    }

    fn step_down(&mut self, who: usize) {
        self.coordinators[who] = STANDBY;
    }

    /// Creates the next generation; false if another coordinator has.
    fn link(&mut self, who: usize, tag: Option<Layer>, left_out: LeftOut) -> bool {
        let me = self.coordinators[who];
        if me.behind && left_out != LeftOut::ExclusiveGenerations {
            return false;
        }
        self.stale_write |= self.fenced > me.epoch;
        (self.tag, self.fenced) = (tag, me.epoch);
        for (number, other) in self.coordinators.iter_mut().enumerate() {
            other.behind |= number != who && other.role != Role::Standby;
        }
        (self.coordinators[who].view, self.coordinators[who].behind) = (tag, false);
        true
    }
}

impl Lead {
    fn take_over(&self, state: &mut State, who: usize, done: u8) {
        let epoch = state.coordinators[who].epoch;
        let is_older = |other: usize| match self.left_out {
            LeftOut::OlderOnly => other != usize::from(epoch),
            _ => other < usize::from(epoch),
        };
        // In the order of the steps: trash, sweep, sweep, read, check, fence.
        let order = match self.left_out {
            LeftOut::SweepBeforeFence => [0, 3, 4, 5, 1, 2],
            _ => [0, 1, 2, 3, 4, 5],
        };
        match order[usize::from(done)] {
            0 => state.trash[usize::from(epoch)] = true,
            1 if self.left_out != LeftOut::TrashFence => {
                (0..4).filter(|other| is_older(*other)).for_each(|other| state.trash[other] = false);
            }
            2 if self.left_out != LeftOut::StagingFence => {
                (0..4).filter(|other| is_older(*other)).for_each(|other| state.staged[other] = None);
            }
            3 => (state.coordinators[who].view, state.coordinators[who].behind) = (state.tag, false),
            4 if !state.leads(who) && self.left_out != LeftOut::CheckBeforeFence => return state.step_down(who),
            5 if !state.link(who, state.coordinators[who].view, self.left_out) => {
                // The old leader won the number, or a newer one has its fence there: read and check again.
                state.coordinators[who].role = Role::Candidate(done - 2);
                return;
            }
            _ => {}
        }
        state.coordinators[who].role = if done == 5 { Role::Leading } else { Role::Candidate(done + 1) };
    }

    fn write(&self, state: &mut State, who: usize) {
        let me = state.coordinators[who];
        let next = match me.writer {
            Writer::Idle => return,
            Writer::Held(layer) if state.layers[usize::from(layer)] => Writer::Relies(layer),
            Writer::Held(layer) => {
                state.staged[usize::from(me.epoch)] = Some(layer);
                Writer::Staged(layer)
            }
            Writer::Staged(layer) if state.leads(who) => Writer::Checked(layer),
            Writer::Checked(layer) if state.staged[usize::from(me.epoch)] == Some(layer) => {
                state.staged[usize::from(me.epoch)] = None;
                state.stale_write |= state.fenced > me.epoch;
                state.layers[usize::from(layer)] = true;
                Writer::Relies(layer)
            }
            Writer::Relies(layer) if state.leads(who) => {
                if state.layers[usize::from(layer)] {
                    Writer::Linking(Some(layer))
                } else {
                    state.lost = true;
                    Writer::Idle
                }
            }
            Writer::Linking(tag) => {
                if state.link(who, tag, self.left_out) {
                    state.unpinned |= state.pinned && tag.is_none();
                    Writer::Idle
                } else {
                    return state.step_down(who);
                }
            }
            Writer::Staged(_) | Writer::Checked(_) | Writer::Relies(_) => return state.step_down(who),
        };
        state.coordinators[who].writer = next;
    }

    /// Whether anything that this coordinator knows of needs the layer.
    fn is_needed(&self, me: &Coordinator, layer: Layer) -> bool {
        let held = match me.writer {
            _ if self.left_out == LeftOut::Holds => false,
            Writer::Held(held) | Writer::Staged(held) | Writer::Checked(held) | Writer::Relies(held) => held == layer,
            Writer::Linking(tag) => tag == Some(layer),
            Writer::Idle => false,
        };
        let hosts_known = me.hosts_known || self.left_out == LeftOut::WaitForHosts || !self.size.host;
        held || me.view == Some(layer) || me.leased == Some(layer) || !hosts_known
    }

    fn collect(&self, state: &mut State, who: usize) {
        let me = state.coordinators[who];
        state.coordinators[who].collector = match me.collector {
            Collector::Idle => return,
            Collector::Marked(_) if !state.leads(who) => return state.step_down(who),
            Collector::Marked(layer) => {
                if self.left_out != LeftOut::SecondLook && self.is_needed(&me, layer) {
                    Collector::Idle
                } else {
                    Collector::Renaming(layer)
                }
            }
            Collector::Renaming(layer) => {
                if !state.layers[usize::from(layer)] {
                    state.coordinators[who].collector = Collector::Idle;
                    return;
                }
                let fenced = !state.trash[usize::from(me.epoch)] && self.left_out != LeftOut::TrashFence;
                if fenced {
                    return state.step_down(who);
                }
                state.stale_write |= state.fenced > me.epoch && state.layers[usize::from(layer)];
                state.layers[usize::from(layer)] = false;
                Collector::Removed(layer)
            }
            Collector::Removed(_) => Collector::Idle,
        };
    }
}

impl Model for Lead {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let state = |pinned| State {
            epoch: 0,
            fenced: 0,
            tag: None,
            pinned,
            layers: [false; 2],
            staged: [None; 4],
            trash: [false; 4],
            host: None,
            coordinators: [STANDBY; 3],
            stale_write: false,
            lost: false,
            unpinned: false,
        };
        vec![state(false), state(true)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for who in 0..self.size.coordinators {
            let me = &state.coordinators[who];
            match me.role {
                Role::Standby if state.epoch < self.size.epochs => actions.push(Action::TakeEpoch(who)),
                Role::Standby => {}
                Role::Candidate(_) => actions.extend([Action::TakeOver(who), Action::Crash(who)]),
                Role::Leading => self.leader_actions(state, who, actions),
            }
        }
        if state.host.is_some() {
            actions.push(Action::HostLeaves);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::TakeEpoch(who) => {
                state.epoch += 1;
                let epoch = state.epoch;
                state.coordinators[who] = Coordinator { role: Role::Candidate(0), epoch, ..STANDBY };
            }
            Action::TakeOver(who) => {
                let Role::Candidate(done) = state.coordinators[who].role else { return None };
                self.take_over(&mut state, who, done);
            }
            Action::Crash(who) => state.step_down(who),
            Action::Hold(who, layer) => state.coordinators[who].writer = Writer::Held(layer),
            Action::Write(who) => self.write(&mut state, who),
            Action::Remove(who) if !state.leads(who) => state.step_down(who),
            Action::Remove(who) => state.coordinators[who].writer = Writer::Linking(None),
            Action::Mark(who, layer) => state.coordinators[who].collector = Collector::Marked(layer),
            Action::Collect(who) => self.collect(&mut state, who),
            Action::Grant(who) if !state.leads(who) => state.step_down(who),
            Action::Grant(who) => {
                state.host = state.coordinators[who].view;
                state.coordinators[who].leased = state.host;
            }
            Action::Renew(who) if !state.leads(who) => state.step_down(who),
            Action::Renew(who) => state.coordinators[who].leased = state.host,
            Action::HostLeaves => state.host = None,
            Action::LeaseLapses(who) => state.coordinators[who].leased = None,
            Action::HostsKnown(who) => {
                // A host that has not renewed with this leader by now has lost its lease.
                if state.leads(who) && state.coordinators[who].leased != state.host {
                    state.host = None;
                }
                state.coordinators[who].hosts_known = true;
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Lead>> {
        vec![
            Property::always("an image has its layers", |_, state: &State| state.has(state.tag)),
            Property::always("what a live host leases stays", |_, state: &State| state.has(state.host)),
            Property::always("what a pull has found stays", |_, state: &State| !state.lost),
            Property::always("no stale leader's write succeeds", |_, state: &State| !state.stale_write),
            Property::always("a pinned tag stays", |_, state: &State| !state.unpinned),
            Property::sometimes("a collection completes", |_, state: &State| {
                state.coordinators.iter().any(|me| matches!(me.collector, Collector::Removed(_)))
            }),
            Property::sometimes("a takeover completes", |_, state: &State| {
                state.coordinators.iter().any(|me| me.role == Role::Leading && me.epoch > 1)
            }),
            Property::sometimes("the tag points to an image after a takeover", |_, state: &State| {
                state.tag.is_some() && state.fenced > 1
            }),
        ]
    }
}

impl Lead {
    fn leader_actions(&self, state: &State, who: usize, actions: &mut Vec<Action>) {
        let me = &state.coordinators[who];
        let renaming = matches!(me.collector, Collector::Renaming(_));
        let linking = matches!(me.writer, Writer::Linking(_));
        actions.push(Action::Crash(who));
        match me.writer {
            // Holding waits for a rename, and so does committing.
            Writer::Idle if !renaming => {
                actions.extend((0..self.size.layers).map(|layer| Action::Hold(who, layer)));
                if me.view.is_some() && !state.pinned {
                    actions.push(Action::Remove(who));
                }
            }
            Writer::Idle => {}
            Writer::Relies(_) if renaming => {}
            _ => actions.push(Action::Write(who)),
        }
        match me.collector {
            Collector::Idle => {
                let candidates = (0..self.size.layers)
                    .filter(|layer| state.layers[usize::from(*layer)] && !self.is_needed(me, *layer));
                actions.extend(candidates.map(|layer| Action::Mark(who, layer)));
            }
            Collector::Marked(_) if linking => {}
            _ => actions.push(Action::Collect(who)),
        }
        if self.size.host && !renaming {
            match state.host {
                None if me.view.is_some() => actions.push(Action::Grant(who)),
                Some(_) if me.leased != state.host => actions.push(Action::Renew(who)),
                _ => {}
            }
            if me.leased.is_some() && state.host.is_none() {
                actions.push(Action::LeaseLapses(who));
            }
            if !me.hosts_known {
                actions.push(Action::HostsKnown(who));
            }
        }
    }
}

fn model(coordinators: usize, epochs: u8, layers: u8, host: bool, left_out: LeftOut) -> Lead {
    Lead { size: Size { coordinators, epochs, layers, host }, left_out }
}

#[test]
fn two_coordinators_that_move_a_tag_are_safe() {
    holds("two coordinators, two layers", model(2, 3, 2, false, LeftOut::Nothing));
}

#[test]
fn two_coordinators_and_a_host_are_safe() {
    holds("two coordinators, one layer, a host", model(2, 3, 1, true, LeftOut::Nothing));
}

#[test]
fn three_coordinators_are_safe() {
    holds("three coordinators, one layer", model(3, 3, 1, false, LeftOut::Nothing));
}

#[test]
fn each_step_that_is_left_out_is_missed() {
    for (left_out, host, property) in [
        (LeftOut::SecondLook, false, "an image has its layers"),
        (LeftOut::SecondLook, false, "what a pull has found stays"),
        (LeftOut::SecondLook, true, "what a live host leases stays"),
        (LeftOut::TrashFence, false, "an image has its layers"),
        (LeftOut::TrashFence, false, "no stale leader's write succeeds"),
        (LeftOut::StagingFence, false, "no stale leader's write succeeds"),
        (LeftOut::SweepBeforeFence, false, "no stale leader's write succeeds"),
        (LeftOut::CheckBeforeFence, false, "no stale leader's write succeeds"),
        (LeftOut::Holds, false, "what a pull has found stays"),
        (LeftOut::WaitForHosts, true, "what a live host leases stays"),
        (LeftOut::ExclusiveGenerations, false, "no stale leader's write succeeds"),
    ] {
        fails(&format!("without {left_out:?}"), model(2, 3, 1, host, left_out), property);
    }
    // A candidate that was overtaken and sweeps its successor's trash makes it stop, but nothing is lost.
    let greedy = model(2, 3, 1, false, LeftOut::OlderOnly);
    holds("a greedy sweep is merely a nuisance", greedy);
}
