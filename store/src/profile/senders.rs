//! Senders of traces: none of them outweighs all others together.
//!
//! A profile is a hint for every host, but its traces come from hosts, and one of them may lie or start the same thing
//! without end. So a profile counts its starts by sender. While all come from one sender, there is nobody to outweigh,
//! and all count. When a second sender appears, what the first one taught is scaled down to [`FLOOR`] starts. From then
//! on, a trace is not merged if its sender has more weight than all others together. A sender that was silent for
//! [`FORGOTTEN_AFTER`] has no weight any more, so that profiles go on learning from others.

use serde::{Deserialize, Serialize};

/// A sender with at most this weight is never left out, whatever the others have.
pub(super) const FLOOR: u32 = 2;
/// Seconds after which a silent sender no longer counts.
const FORGOTTEN_AFTER: u64 = 24 * 3600;
/// The most senders that are told apart; the lightest makes room for a new one.
const SENDERS_MAX: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u32, u64)", into = "(u64, u32, u64)")]
struct Sender {
    id: u64,
    weight: u32,
    heard_at: u64,
}

impl From<(u64, u32, u64)> for Sender {
    fn from((id, weight, heard_at): (u64, u32, u64)) -> Sender {
        Sender { id, weight, heard_at }
    }
}

impl From<Sender> for (u64, u32, u64) {
    fn from(sender: Sender) -> Self {
        (sender.id, sender.weight, sender.heard_at)
    }
}

/// What to do with a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The trace counts.
    Counts,
    /// The trace counts, and those before it are scaled down to [`FLOOR`] starts.
    CountsAfterScaling,
    /// The trace is left out: its sender outweighs all others.
    Outweighs,
}

/// The senders of a profile's traces.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Senders(Vec<Sender>);

impl Senders {
    /// Decides whether a trace of the sender `id` counts at the time `now` (seconds since 1970), and counts it if so.
    pub(super) fn admit(&mut self, id: u64, now: u64) -> Verdict {
        self.0.retain(|sender| sender.id == id || now.saturating_sub(sender.heard_at) < FORGOTTEN_AFTER);
        let own = self.0.iter().find(|sender| sender.id == id).map_or(0, |sender| sender.weight);
        let others: u32 = self.0.iter().filter(|sender| sender.id != id).map(|sender| sender.weight).sum();
        if others > 0 && own > others.max(FLOOR) {
            return Verdict::Outweighs;
        }
        // This is the second sender; the first one was alone until now.
        let scaled = self.0.len() == 1 && own == 0 && others > FLOOR;
        if scaled {
            self.0[0].weight = FLOOR;
        }
        self.count(id, now);
        if scaled { Verdict::CountsAfterScaling } else { Verdict::Counts }
    }

    fn count(&mut self, id: u64, now: u64) {
        if let Some(sender) = self.0.iter_mut().find(|sender| sender.id == id) {
            sender.weight = sender.weight.saturating_add(1);
            sender.heard_at = now;
            return;
        }
        if self.0.len() >= SENDERS_MAX {
            let lightest = self.0.iter().enumerate().min_by_key(|(_, sender)| (sender.weight, sender.heard_at));
            if let Some(at) = lightest.map(|(at, _)| at) {
                self.0.swap_remove(at);
            }
        }
        self.0.push(Sender { id, weight: 1, heard_at: now });
    }

    /// Halves all weights, as the profile halves its counts.
    pub(super) fn halve(&mut self) {
        self.0.iter_mut().for_each(|sender| sender.weight /= 2);
        self.0.retain(|sender| sender.weight > 0);
    }

    /// Whether there are at most [`SENDERS_MAX`] senders.
    pub(super) fn is_bounded(&self) -> bool {
        self.0.len() <= SENDERS_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_sender_is_believed_and_two_have_equal_weight() {
        let mut senders = Senders::default();
        assert!((0..100).all(|_| senders.admit(1, 0) == Verdict::Counts), "nobody else is there");
        assert_eq!(senders.admit(2, 0), Verdict::CountsAfterScaling);
        assert_eq!(senders.admit(1, 0), Verdict::Counts);
        assert_eq!(senders.admit(1, 0), Verdict::Outweighs, "three to one");
        assert_eq!((senders.admit(2, 0), senders.admit(2, 0)), (Verdict::Counts, Verdict::Counts));
        for _ in 0..10 {
            assert_eq!((senders.admit(1, 0), senders.admit(1, 0)), (Verdict::Counts, Verdict::Outweighs));
            assert_eq!(senders.admit(2, 0), Verdict::Counts, "in turn");
        }
        assert_eq!(senders.admit(1, 0), Verdict::Counts);
        assert_eq!(senders.admit(1, 1), Verdict::Outweighs);
        assert_eq!(senders.admit(1, FORGOTTEN_AFTER), Verdict::Counts, "the other one is silent");
    }

    #[test]
    fn many_senders_are_bounded() {
        let mut senders = Senders::default();
        (0..1000).for_each(|id| _ = senders.admit(id, id));
        assert!(senders.is_bounded());
        senders.halve();
        assert_eq!(senders, Senders::default());
    }
}
