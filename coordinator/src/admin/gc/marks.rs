//! What collections remember in the database, in [`Table::Garbage`]: since when objects are unreferenced, which packs layers use,
//! when images were in use, and which epoch the records belong to. All of it is found out again if it is lost. The retention
//! policy is one of the coordinator's settings ([`Table::Settings`], key `retention`, JSON).
//!
//! | key | value |
//! | --- | --- |
//! | `lead` | the store's identity, our last epoch u64, the number of collections that our pieces are good for u64 |
//! | `t` | the time that was counted, see `age`, seconds since 1970, u64 |
//! | `m`, kind (`l`, `b`, `p`), digest | since when the object is unreferenced, seconds since 1970, u64 |
//! | `u`, diffID | the packs that the layer uses, see `usage` |
//! | `i`, name | when a collection last saw a host lease the image, seconds since 1970, u64 |

use std::collections::{HashMap, HashSet};

use coordinator_api::retention::RetentionPolicy;
use store::publisher::Object;
use store::wire::{Fields, Put};
use store::{ContentDigest, Digest};

use super::usage::{self, LayerUse};
use crate::state::state_db::{Durability, StateDb, StateError, Table};

const LEAD: &[u8] = b"lead";
const COUNTED: &[u8] = b"t";
const POLICY: &[u8] = b"retention";

/// The leadership in which the database was last used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lead {
    identity: [u8; 16],
    epoch: u64,
    collected: u64,
}

impl Lead {
    fn encode(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(32);
        out.put_bytes(&self.identity);
        out.put_u64(self.epoch);
        out.put_u64(self.collected);
        out
    }

    fn decode(bytes: &[u8]) -> Option<Lead> {
        let mut fields = Fields::new("the last lead", bytes);
        Some(Lead { identity: fields.array().ok()?, epoch: fields.u64().ok()?, collected: fields.u64().ok()? })
    }
}

/// Access to the collection's records in the database.
pub(super) struct Marks<'a> {
    state_db: &'a dyn StateDb,
}

/// All marks, and what is known of layers and images.
#[derive(Debug, Default)]
pub(super) struct Remembered {
    /// Since when objects are unreferenced.
    pub(super) marks: HashMap<Object, u64>,
    /// The packs that layers use.
    pub(super) usage: HashMap<Digest, LayerUse>,
    /// When images were last seen in use, by familiar name.
    pub(super) in_use: HashMap<String, u64>,
}

fn mark_key(object: &Object) -> Vec<u8> {
    let (kind, digest) = match object {
        Object::Layer(digest) => (b'l', digest.as_bytes()),
        Object::Blob(digest) => (b'b', digest.as_bytes()),
        Object::Pack(pack) => (b'p', pack.as_bytes()),
    };
    [&[b'm', kind], &digest[..]].concat()
}

fn object_of(key: &[u8]) -> Option<Object> {
    let (kind, digest) = key.strip_prefix(b"m")?.split_first()?;
    let digest = <[u8; 32]>::try_from(digest).ok()?;
    match kind {
        b'l' => Some(Object::Layer(Digest::from_bytes(digest))),
        b'b' => Some(Object::Blob(Digest::from_bytes(digest))),
        b'p' => Some(Object::Pack(ContentDigest::from_bytes(digest))),
        _ => None,
    }
}

fn usage_key(layer: &Digest) -> Vec<u8> {
    [b"u", &layer.as_bytes()[..]].concat()
}

impl<'a> Marks<'a> {
    /// Opens the records in `state_db`.
    pub(super) fn of(state_db: &'a dyn StateDb) -> Marks<'a> {
        Marks { state_db }
    }

    /// Forgets what cannot be relied on. All pieces are forgotten if packs were collected without this database's knowledge or if
    /// it belonged to another store; all marks if another coordinator has led since.
    pub(super) fn resume(&self, identity: [u8; 16], epoch: u64, collected: u64) -> Result<(), StateError> {
        let known = self.state_db.record(Table::Garbage, LEAD)?.and_then(|bytes| Lead::decode(&bytes));
        // A database that is older than garbage collection has no record, and knows of no collections.
        let known = known.unwrap_or(Lead { identity, epoch: 0, collected: 0 });
        if known.identity != identity || known.collected != collected {
            tracing::info!("packs were collected elsewhere: where pieces lie is learned again");
            self.state_db.forget_all_locations()?;
        }
        if known.identity != identity || !(epoch.saturating_sub(1)..=epoch).contains(&known.epoch) {
            let marks = self.remembered()?.marks;
            self.change(&marks.keys().map(|object| (mark_key(object), None)).collect::<Vec<_>>())?;
        }
        self.put_lead(Lead { identity, epoch, collected })
    }

    /// The counted time when marks were last written. A database without it has the time of the newest mark.
    pub(super) fn counted(&self) -> Result<Option<u64>, StateError> {
        let written = self.state_db.record(Table::Garbage, COUNTED)?;
        match written.and_then(|bytes| Fields::new("the time that was counted", &bytes).u64().ok()) {
            Some(counted) => Ok(Some(counted)),
            None => Ok(self.remembered()?.marks.into_values().max()),
        }
    }

    /// Records that the pieces in the database are valid after this number of collections.
    pub(super) fn set_collected(&self, identity: [u8; 16], epoch: u64, collected: u64) -> Result<(), StateError> {
        self.put_lead(Lead { identity, epoch, collected })
    }

    fn put_lead(&self, lead: Lead) -> Result<(), StateError> {
        let changes: [(&[u8], Option<&[u8]>); 1] = [(LEAD, Some(&lead.encode()))];
        self.state_db.change_records(Table::Garbage, &changes, Durability::Synced)
    }

    /// The retention policy. A policy that cannot be read (a newer version's) is an error rather than the default, which would
    /// collect otherwise than was asked.
    pub(super) fn policy(&self) -> Result<RetentionPolicy, StateError> {
        let Some(json) = self.state_db.record(Table::Settings, POLICY)? else { return Ok(RetentionPolicy::default()) };
        serde_json::from_slice(&json).map_err(|error| StateError::Unreadable {
            what: "the retention policy".to_owned(),
            why: error.to_string(),
            remedy: "set it again, or run the newer version that wrote it".to_owned(),
        })
    }

    /// Saves the policy.
    pub(super) fn set_policy(&self, policy: &RetentionPolicy) -> Result<(), StateError> {
        let json = serde_json::to_vec(policy).map_err(|error| StateError::Unreadable {
            what: "the retention policy".to_owned(),
            why: error.to_string(),
            remedy: "report this".to_owned(),
        })?;
        let changes: [(&[u8], Option<&[u8]>); 1] = [(POLICY, Some(&json))];
        self.state_db.change_records(Table::Settings, &changes, Durability::Synced)
    }

    /// Reads all marks, and what is known of layers and images.
    pub(super) fn remembered(&self) -> Result<Remembered, StateError> {
        let mut remembered = Remembered::default();
        for (key, value) in self.state_db.records(Table::Garbage)? {
            if let Some(object) = object_of(&key) {
                let since = Fields::new("a mark", &value).u64().unwrap_or(u64::MAX);
                remembered.marks.insert(object, since);
            } else if let Some(Ok(layer)) = key.strip_prefix(b"u").map(<[u8; 32]>::try_from)
                && let Some(packs) = usage::decode(&value)
            {
                remembered.usage.insert(Digest::from_bytes(layer), packs);
            } else if let Some(name) = key.strip_prefix(b"i").and_then(|name| String::from_utf8(name.to_vec()).ok()) {
                remembered.in_use.insert(name, Fields::new("when an image was in use", &value).u64().unwrap_or(0));
            }
        }
        Ok(remembered)
    }

    /// Marks exactly the objects in `unneeded`, new ones with the time `now`. The marks of objects for which `renewed` holds
    /// start anew.
    pub(super) fn update(
        &self,
        marks: &mut HashMap<Object, u64>,
        unneeded: &HashSet<Object>,
        renewed: &dyn Fn(&Object) -> bool,
        now: u64,
    ) -> Result<(), StateError> {
        let mut changes = vec![(COUNTED.to_vec(), Some(now.to_le_bytes().to_vec()))];
        marks.retain(|object, since| {
            let stays = unneeded.contains(object) && !renewed(object) && *since <= now;
            if !stays {
                changes.push((mark_key(object), None));
            }
            stays
        });
        for object in unneeded {
            if !marks.contains_key(object) {
                marks.insert(*object, now);
                changes.push((mark_key(object), Some(now.to_le_bytes().to_vec())));
            }
        }
        self.change(&changes)
    }

    /// Remembers which packs layers use, and forgets layers that are gone.
    pub(super) fn update_usage(
        &self,
        new: &[(Digest, LayerUse)],
        gone: impl Iterator<Item = Digest>,
    ) -> Result<(), StateError> {
        let gone = gone.map(|layer| (usage_key(&layer), None));
        let new = new.iter().map(|(layer, packs)| (usage_key(layer), Some(usage::encode(packs))));
        self.change(&gone.chain(new).collect::<Vec<_>>())
    }

    /// Remembers that these images are in use at `now`, and forgets those in `gone`.
    pub(super) fn update_in_use<'n>(
        &self,
        used: impl Iterator<Item = &'n str>,
        gone: impl Iterator<Item = &'n str>,
        now: u64,
    ) -> Result<(), StateError> {
        let key = |name: &str| [b"i", name.as_bytes()].concat();
        let used = used.map(|name| (key(name), Some(now.to_le_bytes().to_vec())));
        self.change(&gone.map(|name| (key(name), None)).chain(used).collect::<Vec<_>>())
    }

    fn change(&self, changes: &[(Vec<u8>, Option<Vec<u8>>)]) -> Result<(), StateError> {
        for part in changes.chunks(4096) {
            let part: Vec<(&[u8], Option<&[u8]>)> =
                part.iter().map(|(key, value)| (key.as_slice(), value.as_deref())).collect();
            self.state_db.change_records(Table::Garbage, &part, Durability::Eventual)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use store::chunk::{ChunkRef, Codec, PieceLocation};

    use super::*;
    use crate::state::state_db::memory::MemoryStateDb;

    fn objects() -> [Object; 3] {
        [Object::Layer(Digest::of(b"l")), Object::Blob(Digest::of(b"b")), Object::Pack(ContentDigest::of(b"p"))]
    }

    #[test]
    fn marks_keep_their_time_and_follow_what_is_unneeded() {
        let state_db = MemoryStateDb::default();
        let table = Marks::of(&state_db);
        let [layer, blob, pack] = objects();
        let update = |unneeded: &[Object], renewed: Option<Object>, now| {
            let mut marks = table.remembered().unwrap().marks;
            let unneeded = unneeded.iter().copied().collect();
            table.update(&mut marks, &unneeded, &|object| Some(*object) == renewed, now).unwrap();
            assert_eq!(table.remembered().unwrap().marks, marks);
            marks
        };
        assert_eq!(update(&[layer, blob], None, 10), HashMap::from([(layer, 10), (blob, 10)]));
        assert_eq!(update(&[layer, pack], None, 20), HashMap::from([(layer, 10), (pack, 20)]));
        assert_eq!(update(&[layer, pack], Some(layer), 30), HashMap::from([(layer, 30), (pack, 20)]));
        assert_eq!(update(&[layer], None, 25), HashMap::from([(layer, 25)]), "a mark of the future is worth nothing");
    }

    #[test]
    fn the_time_that_was_counted_goes_on_with_the_next_process() {
        let state_db = MemoryStateDb::default();
        let table = Marks::of(&state_db);
        assert_eq!(table.counted().unwrap(), None);
        let [layer, ..] = objects();
        table.update(&mut HashMap::new(), &HashSet::from([layer]), &|_| false, 10).unwrap();
        table.update(&mut table.remembered().unwrap().marks, &HashSet::from([layer]), &|_| false, 20).unwrap();
        assert_eq!(table.counted().unwrap(), Some(20));
        state_db.change_records(Table::Garbage, &[(COUNTED, None)], Durability::Synced).unwrap();
        assert_eq!(table.counted().unwrap(), Some(10), "an older version's");
    }

    #[test]
    fn usage_is_remembered_until_the_layer_is_gone() {
        let state_db = MemoryStateDb::default();
        let table = Marks::of(&state_db);
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let packs = vec![(ContentDigest::of(b"p"), 5)];
        table.update_usage(&[(a, packs.clone()), (b, Vec::new())], std::iter::empty()).unwrap();
        table.update_usage(&[], [b].into_iter()).unwrap();
        assert_eq!(table.remembered().unwrap().usage, HashMap::from([(a, packs)]));
        table.set_policy(&RetentionPolicy::default()).unwrap();
        assert_eq!(table.remembered().unwrap().usage.len(), 1, "the policy is none of it");
    }

    #[test]
    fn use_is_remembered_until_the_image_is_gone() {
        let state_db = MemoryStateDb::default();
        let table = Marks::of(&state_db);
        table.update_in_use(["a:1", "b:1"].into_iter(), std::iter::empty(), 5).unwrap();
        table.update_in_use(["b:1"].into_iter(), ["a:1"].into_iter(), 9).unwrap();
        assert_eq!(table.remembered().unwrap().in_use, HashMap::from([("b:1".to_owned(), 9)]));
    }

    /// Whether the pieces and the marks survive when a leader with `after` follows one with `before`. Each is store, epoch,
    /// collections.
    fn survive(before: (u8, u64, u64), after: (u8, u64, u64)) -> (bool, bool) {
        let state_db = MemoryStateDb::default();
        let table = Marks::of(&state_db);
        table.resume([before.0; 16], before.1, before.2).unwrap();
        let [layer, ..] = objects();
        table.update(&mut HashMap::new(), &HashSet::from([layer]), &|_| false, 1).unwrap();
        let digest = ContentDigest::of(b"piece");
        let chunk = ChunkRef { pack: digest, offset: 16, stored_len: 1, raw_len: 1, codec: Codec::Plain, digest };
        state_db.locations().put(&[(digest, PieceLocation { chunk, start: 0, len: 1 })]);
        table.resume([after.0; 16], after.1, after.2).unwrap();
        (state_db.locations().get(&digest).is_some(), !table.remembered().unwrap().marks.is_empty())
    }

    #[test]
    fn what_another_lead_made_doubtful_is_forgotten() {
        assert_eq!(survive((1, 3, 7), (1, 4, 7)), (true, true), "a restart");
        assert_eq!(survive((1, 3, 7), (1, 5, 7)), (true, false), "another coordinator led, and collected no pack");
        assert_eq!(survive((1, 3, 7), (1, 5, 8)), (false, false), "another coordinator collected packs");
        assert_eq!(survive((1, 3, 7), (1, 4, 8)), (false, true), "we died between announcing and remembering");
        assert_eq!(survive((1, 3, 7), (2, 4, 7)), (false, false), "another store");
        assert_eq!(survive((1, 3, 0), (1, 4, 0)), (true, true), "nothing was ever collected");
    }
}
