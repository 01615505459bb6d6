//! What the hosts of one token make the coordinator remember, and what all of them do.
//!
//! Invariant: what is counted is what the records say; see `super::Kept`.

use std::collections::HashMap;

use super::record::Record;

/// Hosts of one token.
const HOSTS_OF_ONE: usize = 10_000;
/// Layers that the hosts of one token hold together, each counted for every host: a thousand hosts with five hundred.
const LAYERS_OF_ONE: usize = 500_000;
/// Layers that all hosts hold together: some hundred megabytes.
const LAYERS_OF_ALL: usize = 1_000_000;
/// Bytes of names of images that are kept for the hosts of one token.
const NAME_BYTES_OF_ONE: usize = 8 << 20;

#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    hosts: usize,
    layers: usize,
    name_bytes: usize,
}

impl Sum {
    fn add(&mut self, record: &Record) {
        self.hosts += 1;
        self.layers += record.layers().len();
        self.name_bytes += record.name_bytes();
    }

    fn remove(&mut self, record: &Record) {
        self.hosts -= 1;
        self.layers -= record.layers().len();
        self.name_bytes -= record.name_bytes();
    }
}

/// Why there is no room for a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// The token has too many hosts.
    Hosts,
    /// Its hosts hold too much.
    Layers,
    /// All hosts do.
    All,
}

/// The sums.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Those of hosts that belong to no token have the empty name, which no token has.
    of_tokens: HashMap<String, Sum>,
    layers: usize,
}

impl Tally {
    pub(super) fn add(&mut self, record: &Record) {
        self.of_tokens.entry(record.token().unwrap_or_default().to_owned()).or_default().add(record);
        self.layers += record.layers().len();
    }

    pub(super) fn remove(&mut self, record: &Record) {
        let token = record.token().unwrap_or_default();
        if let Some(sum) = self.of_tokens.get_mut(token) {
            sum.remove(record);
            if sum.hosts == 0 {
                self.of_tokens.remove(token);
            }
        }
        self.layers -= record.layers().len();
    }

    /// Whether there is room for a record in place of the one `before`; `bounded` says whether its token's limits hold.
    pub(super) fn room(&self, record: &Record, before: Option<&Record>, bounded: bool) -> Result<(), NoRoom> {
        let had = before.map_or(0, |before| before.layers().len());
        // Who holds no more than before makes nothing worse: a lease that is there goes on.
        if before.is_some() && record.layers().len() <= had {
            return Ok(());
        }
        if self.layers - had + record.layers().len() > LAYERS_OF_ALL {
            return Err(NoRoom::All);
        }
        let token = record.token().unwrap_or_default();
        let sum = self.of_tokens.get(token).copied().unwrap_or_default();
        let own = if before.is_some_and(|before| before.token() == record.token()) { had } else { 0 };
        match bounded {
            true if before.is_none() && sum.hosts >= HOSTS_OF_ONE => Err(NoRoom::Hosts),
            true if sum.layers - own + record.layers().len() > LAYERS_OF_ONE => Err(NoRoom::Layers),
            _ => Ok(()),
        }
    }

    /// Whether a record's names of images may be kept.
    pub(super) fn has_room_for_names(&self, record: &Record) -> bool {
        let sum = self.of_tokens.get(record.token().unwrap_or_default()).copied().unwrap_or_default();
        sum.name_bytes + record.name_bytes() <= NAME_BYTES_OF_ONE
    }

    /// How many hosts are counted; the rest of what is counted is what these have.
    #[cfg(test)]
    pub(super) fn hosts(&self) -> usize {
        let sums = || self.of_tokens.values();
        assert_eq!(sums().map(|sum| sum.layers).sum::<usize>(), self.layers);
        sums().map(|sum| sum.hosts).sum()
    }
}
