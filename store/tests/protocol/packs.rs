//! Packs that layers share, while a collection removes and thins them.
//!
//! Layer `A` brings the pack `P` with the chunks `x` and `y`. Layer `B` has `x` and layer `C` has `y` as well. Each
//! asks the leader's database. If the database knows the chunk, the layer refers to it in `P`; if not, it brings a pack
//! of its own, which the model ignores.
//!
//! ```text
//! unpack    begin ─> ask the database ─> claim ─> rename the pack ─> rename the layer ─> tell the database ─> end
//! collect   begin ─> look at all layers ─> remove unwanted ones ─> forget ─> announce ─> remember ─> wait ─> thin or remove P
//! ```
//!
//! Whether a layer is wanted (an image refers to it, a pull holds it) changes at any time; the layer is held until its
//! unpacker ends. Another coordinator, with a database of its own, may take over at any time, and the first one after
//! it.

use stateright::{Model, Property};

use super::{fails, holds};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LeftOut {
    Nothing,
    /// The database is not told to forget.
    Forgetting,
    /// Work that began before is not waited for.
    Waiting,
    /// Packs of layers that are published meanwhile are not noted.
    Touching,
    /// Packs that were claimed before the collection began are not noted.
    EarlierClaims,
    /// The number of collections is not compared when the lead is taken.
    Number,
    /// The number is announced after the packs are gone.
    AnnouncingFirst,
    /// A published layer may be removed before the database knows where its pieces lie.
    HoldUntilTold,
    /// Only wanted layers are looked at, rather than all that are there.
    UnwantedLayers,
}

#[derive(Debug, Clone)]
struct Packs {
    left_out: LeftOut,
}

const A: usize = 0;
const B: usize = 1;
const C: usize = 2;
const X: usize = 0;
const Y: usize = 1;

/// What a layer that is in the store needs of `P`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Layer {
    Absent,
    /// Its chunk in `P`, or for `A` both.
    Shares,
    /// It has a pack of its own.
    Own,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Unpacker {
    Idle,
    Begun,
    Asked {
        found: bool,
    },
    /// Its layer is about to get its name.
    Claimed {
        shares: bool,
    },
    /// The pack that it brought has its name, its layer has not.
    PackPut,
    /// Published, the database not yet told.
    Published,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Collector {
    Idle,
    Begun,
    /// The chunks of `P` that are in use, by the layers that were found.
    Looked([bool; 2]),
    Forgot([bool; 2]),
    Announced([bool; 2]),
    /// Waits for these unpackers.
    Waiting([bool; 2], [bool; 3]),
    /// Has changed the pack, and must still announce it: only if that was to come first.
    Late,
    Done,
}

/// One coordinator's database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Database {
    /// Whether it says that a chunk lies in `P`.
    knows: [bool; 2],
    /// The number of collections that it has recorded.
    collected: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    /// The chunks that `P` has; if it has none, there is no `P`.
    pack: [bool; 2],
    layers: [Layer; 3],
    wanted: [bool; 3],
    collected: u8,
    leader: usize,
    databases: [Database; 2],
    unpackers: [Unpacker; 3],
    collector: Collector,
    /// Whether a layer that uses `P` was claimed when the collection began or since.
    touched: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Begin(usize),
    Unpack(usize),
    Want(usize),
    Collect,
    RemoveLayer(usize),
    /// The other coordinator leads; or the same one again, after a crash.
    Lead(usize),
}

/// The most collections that are announced.
const COLLECTIONS: u8 = 2;

impl State {
    fn needs(&self, layer: usize, chunk: usize) -> bool {
        self.layers[layer] == Layer::Shares && (layer == A || (layer == B) == (chunk == X))
    }

    fn is_wanted(&self, layer: usize) -> bool {
        self.wanted[layer] || self.unpackers[layer] != Unpacker::Idle
    }
}

impl Packs {
    fn unpack(&self, state: &mut State, layer: usize) {
        let chunk = if layer == C { Y } else { X };
        let there = state.pack != [false; 2];
        state.unpackers[layer] = match state.unpackers[layer] {
            Unpacker::Idle => return,
            Unpacker::Begun => {
                let knows = state.databases[state.leader].knows;
                Unpacker::Asked { found: layer != A && knows[chunk] && there }
            }
            Unpacker::Asked { found } => {
                let shares = found || layer == A;
                state.touched |= state.collector != Collector::Idle && shares;
                Unpacker::Claimed { shares }
            }
            Unpacker::Claimed { .. } if layer == A => {
                state.pack = [true; 2];
                Unpacker::PackPut
            }
            Unpacker::Claimed { shares } => {
                state.layers[layer] = if shares { Layer::Shares } else { Layer::Own };
                Unpacker::Idle
            }
            Unpacker::PackPut => {
                state.layers[layer] = Layer::Shares;
                Unpacker::Published
            }
            Unpacker::Published => {
                state.databases[state.leader].knows = [true; 2];
                Unpacker::Idle
            }
        };
    }

    /// The chunks that layers use.
    fn live(&self, state: &State) -> [bool; 2] {
        let counts = |layer: &usize| self.left_out != LeftOut::UnwantedLayers || state.wanted[*layer];
        [X, Y].map(|chunk| [A, B, C].iter().filter(|layer| counts(layer)).any(|layer| state.needs(*layer, chunk)))
    }

    fn collect(&self, state: &mut State) {
        state.collector = match state.collector {
            Collector::Idle => {
                let claims =
                    |unpacker: &Unpacker| matches!(unpacker, Unpacker::Claimed { shares: true } | Unpacker::PackPut);
                state.touched = self.left_out != LeftOut::EarlierClaims && state.unpackers.iter().any(claims);
                Collector::Begun
            }
            Collector::Begun => Collector::Looked(self.live(state)),
            Collector::Looked(live) => {
                if self.left_out != LeftOut::Forgetting {
                    let knows = &mut state.databases[state.leader].knows;
                    [X, Y].iter().for_each(|chunk| knows[*chunk] &= live[*chunk]);
                }
                Collector::Forgot(live)
            }
            Collector::Forgot(live) => {
                if self.left_out != LeftOut::AnnouncingFirst {
                    state.collected += 1;
                }
                Collector::Announced(live)
            }
            Collector::Announced(live) => {
                state.databases[state.leader].collected = state.collected;
                Collector::Waiting(live, state.unpackers.map(|unpacker| unpacker != Unpacker::Idle))
            }
            Collector::Waiting(live, _) => {
                if !state.touched || self.left_out == LeftOut::Touching {
                    [X, Y].iter().for_each(|chunk| state.pack[*chunk] &= live[*chunk]);
                }
                if self.left_out == LeftOut::AnnouncingFirst { Collector::Late } else { Collector::Done }
            }
            Collector::Late => {
                state.collected += 1;
                state.databases[state.leader].collected = state.collected;
                Collector::Done
            }
            Collector::Done => Collector::Idle,
        };
    }

    fn lead(&self, state: &mut State, who: usize) {
        state.leader = who;
        state.unpackers = [Unpacker::Idle; 3];
        (state.collector, state.touched) = (Collector::Idle, false);
        let database = &mut state.databases[who];
        if database.collected != state.collected && self.left_out != LeftOut::Number {
            database.knows = [false; 2];
        }
        database.collected = state.collected;
    }
}

impl Model for Packs {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            pack: [false; 2],
            layers: [Layer::Absent; 3],
            wanted: [false; 3],
            collected: 0,
            leader: 0,
            databases: [Database { knows: [false; 2], collected: 0 }; 2],
            unpackers: [Unpacker::Idle; 3],
            collector: Collector::Idle,
            touched: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for layer in [A, B, C] {
            match (state.unpackers[layer], state.layers[layer]) {
                (Unpacker::Idle, Layer::Absent) => actions.push(Action::Begin(layer)),
                (Unpacker::Idle, _) => {}
                _ => actions.push(Action::Unpack(layer)),
            }
            if state.layers[layer] != Layer::Absent {
                actions.push(Action::Want(layer));
                let told = self.left_out == LeftOut::HoldUntilTold && state.unpackers[layer] == Unpacker::Published;
                if state.collector == Collector::Begun && (!state.is_wanted(layer) || told && !state.wanted[layer]) {
                    actions.push(Action::RemoveLayer(layer));
                }
            }
        }
        let waits = |waited: [bool; 3]| [A, B, C].iter().any(|layer| waited[*layer]);
        match state.collector {
            Collector::Idle if state.collected == COLLECTIONS => {}
            Collector::Waiting(_, waited) if waits(waited) && self.left_out != LeftOut::Waiting => {}
            _ => actions.push(Action::Collect),
        }
        actions.extend([Action::Lead(0), Action::Lead(1)]);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Begin(layer) => state.unpackers[layer] = Unpacker::Begun,
            Action::Unpack(layer) => self.unpack(&mut state, layer),
            Action::Want(layer) => state.wanted[layer] ^= true,
            Action::RemoveLayer(layer) => (state.layers[layer], state.wanted[layer]) = (Layer::Absent, false),
            Action::Collect => self.collect(&mut state),
            Action::Lead(who) => self.lead(&mut state, who),
        }
        // An unpacker that was waited for and has ended is no longer waited for, even if it begins again.
        if let Collector::Waiting(_, waited) = &mut state.collector {
            for layer in [A, B, C] {
                waited[layer] &= state.unpackers[layer] != Unpacker::Idle;
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Packs>> {
        vec![
            Property::always("no layer lacks a byte", |_, state: &State| {
                [X, Y]
                    .iter()
                    .all(|chunk| state.pack[*chunk] || [A, B, C].iter().all(|layer| !state.needs(*layer, *chunk)))
            }),
            Property::sometimes("a pack is thinned", |_, state: &State| {
                state.collector == Collector::Done && state.pack == [true, false] && state.needs(B, X)
            }),
            Property::sometimes("a pack is removed", |_, state: &State| {
                state.collector == Collector::Done && state.pack == [false, false] && state.layers[B] == Layer::Own
            }),
            Property::sometimes("a thinned pack is shared again", |_, state: &State| {
                state.pack == [true, false]
                    && state.needs(B, X)
                    && state.unpackers[B] == Unpacker::Idle
                    && state.collected == 2
            }),
            Property::sometimes("another coordinator collects", |_, state: &State| {
                state.leader == 1 && state.collector == Collector::Done && state.pack != [false; 2]
            }),
        ]
    }
}

#[test]
fn no_layer_ever_lacks_a_byte() {
    holds("shared packs", Packs { left_out: LeftOut::Nothing });
}

#[test]
fn each_step_that_is_left_out_is_missed() {
    for left_out in [
        LeftOut::Forgetting,
        LeftOut::Waiting,
        LeftOut::Touching,
        LeftOut::EarlierClaims,
        LeftOut::Number,
        LeftOut::AnnouncingFirst,
        LeftOut::HoldUntilTold,
        LeftOut::UnwantedLayers,
    ] {
        fails(&format!("without {left_out:?}"), Packs { left_out }, "no layer lacks a byte");
    }
}
