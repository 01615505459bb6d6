//! What the hosts of one token make the coordinator remember, and what all hosts together do.
//!
//! Invariant: the totals match the records; see `super::Kept`.

use std::collections::HashMap;

use super::record::HostRecord;

/// The most hosts of one token.
const HOSTS_OF_ONE: usize = 10_000;
/// The most layers that the hosts of one token hold together, counted for each host: a thousand hosts with five hundred each.
const LAYERS_OF_ONE: usize = 500_000;
/// The most layers that all hosts hold together: some hundred megabytes.
const LAYERS_OF_ALL: usize = 1_000_000;
/// The most bytes of image names that are kept for the hosts of one token.
const NAME_BYTES_OF_ONE: usize = 8 << 20;

#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    hosts: usize,
    layers: usize,
    name_bytes: usize,
}

impl Sum {
    fn add(&mut self, record: &HostRecord) {
        self.hosts += 1;
        self.layers += record.layers().len();
        self.name_bytes += record.name_bytes();
    }

    fn remove(&mut self, record: &HostRecord) {
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
    /// The token's hosts hold too many layers.
    Layers,
    /// All hosts together hold too many layers.
    All,
}

/// The totals, by token and of all hosts.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Hosts without a token are counted under the empty name, which no token has.
    of_tokens: HashMap<String, Sum>,
    layers: usize,
}

impl Tally {
    pub(super) fn add(&mut self, record: &HostRecord) {
        self.of_tokens.entry(record.token().unwrap_or_default().to_owned()).or_default().add(record);
        self.layers += record.layers().len();
    }

    pub(super) fn remove(&mut self, record: &HostRecord) {
        let token = record.token().unwrap_or_default();
        if let Some(sum) = self.of_tokens.get_mut(token) {
            sum.remove(record);
            if sum.hosts == 0 {
                self.of_tokens.remove(token);
            }
        }
        self.layers -= record.layers().len();
    }

    /// Checks that there is room for a record in place of `before`. `bounded` says whether its token's limits apply.
    pub(super) fn room(&self, record: &HostRecord, before: Option<&HostRecord>, bounded: bool) -> Result<(), NoRoom> {
        let had = before.map_or(0, |before| before.layers().len());
        // A host that holds no more than before makes nothing worse, so its lease goes on.
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

    /// Whether the image names of a record may be kept.
    pub(super) fn has_room_for_names(&self, record: &HostRecord) -> bool {
        let sum = self.of_tokens.get(record.token().unwrap_or_default()).copied().unwrap_or_default();
        sum.name_bytes + record.name_bytes() <= NAME_BYTES_OF_ONE
    }

    /// How many hosts are counted. Also checks that the totals of all tokens add up.
    #[cfg(test)]
    pub(super) fn hosts(&self) -> usize {
        let sums = || self.of_tokens.values();
        assert_eq!(sums().map(|sum| sum.layers).sum::<usize>(), self.layers);
        sums().map(|sum| sum.hosts).sum()
    }
}
