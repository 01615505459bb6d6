//! Whose starts a profile stands for: no sender of traces outweighs all others together.
//!
//! A profile is a hint for every host, but traces come from hosts, and one of them may lie or start one thing without end. So a
//! profile counts how many of its starts came from whom. As long as all come from one sender there is nobody to outweigh. From the
//! second sender on, a trace of one who has more weight than all others together is not merged, and what a single
//! sender had taught before counts for [`FLOOR`] starts. Who was not heard of for [`FORGOTTEN_AFTER`] has no weight any more:
//! what others start goes on being learned.

use serde::{Deserialize, Serialize};

/// A sender may have this weight whatever others have.
pub(super) const FLOOR: u32 = 2;
/// Seconds after which a silent sender counts no more.
const FORGOTTEN_AFTER: u64 = 24 * 3600;
/// Senders that are told apart; the lightest makes room for a new one.
const SENDERS_MAX: usize = 64;

/// One sender.
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

/// What is to be done with a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It counts.
    Counts,
    /// It counts, and what was there before counts for so many starts at most.
    CountsAfterScaling,
    /// Its sender outweighs all others.
    Outweighs,
}

/// The senders of a profile's traces.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Senders(Vec<Sender>);

impl Senders {
    /// Whether a trace of the sender `id` counts at the time `now` (seconds since 1970); if so, it is counted.
    pub(super) fn admit(&mut self, id: u64, now: u64) -> Verdict {
        self.0.retain(|sender| sender.id == id || now.saturating_sub(sender.heard_at) < FORGOTTEN_AFTER);
        let own = self.0.iter().find(|sender| sender.id == id).map_or(0, |sender| sender.weight);
        let others: u32 = self.0.iter().filter(|sender| sender.id != id).map(|sender| sender.weight).sum();
        if others > 0 && own > others.max(FLOOR) {
            return Verdict::Outweighs;
        }
        // The second sender has come: the first one was alone until now.
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

    /// All weights are halved, as the profile's counts are.
    pub(super) fn halve(&mut self) {
        self.0.iter_mut().for_each(|sender| sender.weight /= 2);
        self.0.retain(|sender| sender.weight > 0);
    }

    /// Whether it is no larger than it may be.
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
