//! The handover log: what a leader leaves to its successor besides images, so that another coordinator can go on where
//! it stopped.
//!
//! The log holds records in tables, whose meaning is the coordinator's business. Each leader writes one file,
//! `ledger/<its epoch>`: a sequence of entries, of which the first holds all records and the others what changed. The
//! file with the highest epoch counts, so a stale leader that still writes to its own file harms nobody. A file appears
//! whole, with its first entry. An entry that a crash tore off the end is recognised by its digest, and was not yet
//! promised to anybody. `publisher` writes the log, `reader` finds it.
//!
//! Hosts never read it. It is a copy: a store without one is whole.
//!
//! Coordinators obey what the log says (tokens, schedules), so anybody who can write to the share could become an
//! admin. With a [`HandoverKey`], which coordinators share and the share does not hold, each entry's digest is keyed,
//! and covers the store's identity, the epoch and the entry's number as well: an entry of another store, leader or
//! place is refused. Without a key the digest finds damage, not malice.

use std::collections::BTreeMap;

use crate::digest::ContentDigest;
use crate::error::{Error, Result};
use crate::wire::{Fields, Put};

/// First bytes of a handover log.
pub const MAGIC: &[u8; 8] = b"CFSLEDGR";
const VERSION: u32 = 1;
/// The version of a handover log whose digests are keyed.
const KEYED: u32 = 2;
/// The context for which keys are derived.
const PURPOSE: &str = "cachefs 2026-11 handover log of coordinators";
/// The shortest secret that is accepted, bytes.
pub const SECRET_MIN: usize = 16;
/// Length of the header.
pub const HEADER_LEN: usize = 16;
/// Length of an entry's head, which comes before its changes.
pub const ENTRY_LEN: usize = 44;

/// How far a handover log goes. Later positions are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// The leader's epoch.
    pub epoch: u64,
    /// The number of its last entry, from 1 on.
    pub entry: u64,
}

/// A table's name and a record's key.
pub type RecordKey = (String, Vec<u8>);

/// All records.
pub type Records = BTreeMap<RecordKey, Vec<u8>>;

/// One record that is written, or removed (`None`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordChange {
    /// Table and key.
    pub key: RecordKey,
    /// The record's bytes.
    pub value: Option<Vec<u8>>,
}

/// Applies changes to records.
pub fn apply(records: &mut Records, changes: impl IntoIterator<Item = RecordChange>) {
    for RecordChange { key, value } in changes {
        match value {
            Some(value) => _ = records.insert(key, value),
            None => _ = records.remove(&key),
        }
    }
}

/// A handover log as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandoverLog {
    /// The position of its last whole entry.
    pub position: Position,
    /// All records, as of that entry.
    pub records: Records,
    /// Bytes after the last whole entry: torn by a crash, or damaged.
    pub torn: u64,
}

/// The key that authenticates a handover log. Coordinators have it; the share does not.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HandoverKey([u8; 32]);

impl std::fmt::Debug for HandoverKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HandoverKey(..)")
    }
}

impl HandoverKey {
    /// Derives the key from a secret; `None` if the secret is shorter than [`SECRET_MIN`].
    pub fn derive(secret: &[u8]) -> Option<HandoverKey> {
        (secret.len() >= SECRET_MIN).then(|| HandoverKey(blake3::derive_key(PURPOSE, secret)))
    }
}

/// What the entries of one handover log are bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seal {
    /// The store's identity.
    pub identity: [u8; 16],
    /// The leader's epoch.
    pub epoch: u64,
    /// The key that coordinators share, if they have one.
    pub key: Option<HandoverKey>,
}

impl Seal {
    fn version(&self) -> u32 {
        if self.key.is_some() { KEYED } else { VERSION }
    }

    fn digest(&self, entry: u64, body: &[u8]) -> ContentDigest {
        let number = entry.to_le_bytes();
        match &self.key {
            None => ContentDigest::of(&[&number, body].concat()),
            Some(HandoverKey(key)) => {
                let mut hasher = blake3::Hasher::new_keyed(key);
                for part in [&self.identity[..], &self.epoch.to_le_bytes(), &number, body] {
                    hasher.update(part);
                }
                ContentDigest::from_bytes(*hasher.finalize().as_bytes())
            }
        }
    }
}

fn header(seal: &Seal) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_LEN);
    out.put_bytes(MAGIC);
    out.put_u32(seal.version());
    out.put_u32(0);
    out
}

/// Encodes a file with one entry that holds `records`.
pub(crate) fn encode_whole(seal: &Seal, entry: u64, records: &Records) -> Result<Vec<u8>> {
    let changes = records.iter().map(|(key, value)| (key, Some(value)));
    let mut out = header(seal);
    out.extend(encode(seal, entry, changes)?);
    Ok(out)
}

/// Encodes one more entry.
pub(crate) fn encode_entry(seal: &Seal, entry: u64, changes: &[RecordChange]) -> Result<Vec<u8>> {
    encode(seal, entry, changes.iter().map(|change| (&change.key, change.value.as_ref())))
}

fn encode<'a>(
    seal: &Seal,
    entry: u64,
    changes: impl Iterator<Item = (&'a RecordKey, Option<&'a Vec<u8>>)>,
) -> Result<Vec<u8>> {
    let too_long = |_| Error::corrupt("a record for the handover log", "it is too long");
    let mut body = Vec::new();
    for ((table, key), value) in changes {
        body.put_u8(u8::try_from(table.len()).map_err(too_long)?);
        body.put_bytes(table.as_bytes());
        body.put_u16(u16::try_from(key.len()).map_err(too_long)?);
        body.put_bytes(key);
        body.put_u8(value.is_some().into());
        if let Some(value) = value {
            body.put_u32(u32::try_from(value.len()).map_err(too_long)?);
            body.put_bytes(value);
        }
    }
    let mut out = Vec::with_capacity(ENTRY_LEN + body.len());
    out.put_u32(u32::try_from(body.len()).map_err(too_long)?);
    out.put_u64(entry);
    out.put_bytes(seal.digest(entry, &body).as_bytes());
    out.extend(body);
    Ok(out)
}

/// Whether a handover log's bytes claim to be authenticated. Anybody can have written that claim.
pub fn is_keyed(bytes: &[u8]) -> bool {
    bytes.get(MAGIC.len()..MAGIC.len() + 4) == Some(&KEYED.to_le_bytes())
}

/// Reads the bytes of `ledger/<epoch>`.
pub fn decode(seal: &Seal, bytes: &[u8]) -> Result<HandoverLog> {
    let epoch = seal.epoch;
    let what = || format!("handover log {epoch:016x}");
    let mut fields = Fields::new("the handover log", bytes);
    if fields.bytes(MAGIC.len())? != MAGIC {
        return Err(Error::corrupt(what(), "it does not begin as a handover log does"));
    }
    match fields.u32()? {
        version if version == seal.version() => _ = fields.u32()?,
        VERSION => return Err(Error::corrupt(what(), "it is not authenticated, and handover_key_file is set")),
        KEYED => return Err(Error::corrupt(what(), "it is authenticated, and handover_key_file is not set")),
        version => return Err(Error::Unsupported { what: what(), why: format!("its version is {version}") }),
    }
    let mut rest = bytes.get(HEADER_LEN..).unwrap_or_default();
    let not_whole = || match seal.key {
        None => Error::corrupt(what(), "its first entry is not whole"),
        Some(_) => Error::corrupt(what(), "its first entry is not whole, or was written with another handover key"),
    };
    let first = take_entry(seal, &mut rest).ok_or_else(not_whole)?;
    let mut handover_log =
        HandoverLog { position: Position { epoch, entry: first.0 }, records: Records::new(), torn: 0 };
    apply(&mut handover_log.records, first.1);
    loop {
        let mut after = rest;
        match take_entry(seal, &mut after) {
            Some((entry, changes)) if entry == handover_log.position.entry.wrapping_add(1) => {
                apply(&mut handover_log.records, changes);
                handover_log.position.entry = entry;
                rest = after;
            }
            _ => break,
        }
    }
    handover_log.torn = rest.len() as u64;
    Ok(handover_log)
}

/// Takes one entry off the front, if it is whole.
fn take_entry(seal: &Seal, bytes: &mut &[u8]) -> Option<(u64, Vec<RecordChange>)> {
    let (head, rest) = bytes.split_at_checked(ENTRY_LEN)?;
    let mut head = Fields::new("an entry of the handover log", head);
    let (len, entry, expected) = (head.u32().ok()?, head.u64().ok()?, head.array::<32>().ok()?);
    let (body, rest) = rest.split_at_checked(usize::try_from(len).ok()?)?;
    if *seal.digest(entry, body).as_bytes() != expected {
        return None;
    }
    let changes = changes(body).ok()?;
    *bytes = rest;
    Some((entry, changes))
}

fn changes(body: &[u8]) -> Result<Vec<RecordChange>> {
    let (mut fields, mut changes) = (Fields::new("an entry of the handover log", body), Vec::new());
    while !fields.is_empty() {
        let len = fields.u8()?;
        let table = String::from_utf8(fields.bytes(len.into())?.to_vec());
        let table = table.map_err(|_| Error::corrupt("an entry of the handover log", "a table's name is no text"))?;
        let len = fields.u16()?;
        let key = fields.bytes(len.into())?.to_vec();
        let value = match fields.u8()? {
            0 => None,
            _ => {
                let len = fields.u32()?;
                Some(fields.bytes(len as usize)?.to_vec())
            }
        };
        changes.push(RecordChange { key: (table, key), value });
    }
    Ok(changes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn change() -> impl Strategy<Value = RecordChange> {
        let key = ("[a-c]{1,2}", prop::collection::vec(0..4u8, 0..3));
        let value = prop::option::of(prop::collection::vec(any::<u8>(), 0..40));
        (key, value).prop_map(|(key, value)| RecordChange { key, value })
    }

    fn entries() -> impl Strategy<Value = Vec<Vec<RecordChange>>> {
        prop::collection::vec(prop::collection::vec(change(), 0..5), 0..6)
    }

    fn seal(key: Option<HandoverKey>) -> Seal {
        Seal { identity: [3; 16], epoch: 7, key }
    }

    /// A handover log's bytes, where each entry ends, and the records up to there.
    fn written(first: u64, entries: &[Vec<RecordChange>]) -> (Vec<u8>, Vec<(usize, Records)>) {
        let mut records = Records::from([(("a".to_owned(), vec![9]), b"before".to_vec())]);
        let mut bytes = encode_whole(&seal(None), first, &records).unwrap();
        let mut states = vec![(bytes.len(), records.clone())];
        for (number, entry) in (first + 1..).zip(entries) {
            bytes.extend(encode_entry(&seal(None), number, entry).unwrap());
            apply(&mut records, entry.clone());
            states.push((bytes.len(), records.clone()));
        }
        (bytes, states)
    }

    proptest! {
        #[test]
        fn what_was_written_is_read_up_to_where_a_crash_tore_it(entries in entries(), first in 1..9u64, cut in 0.0..1.0f64) {
            let (bytes, states) = written(first, &entries);
            let whole = decode(&seal(None), &bytes).unwrap();
            prop_assert_eq!(whole.position, Position { epoch: 7, entry: first + entries.len() as u64 });
            prop_assert_eq!((&whole.records, whole.torn), (&states.last().unwrap().1, 0));
            let cut = (bytes.len() as f64 * cut) as usize;
            let before = states.iter().enumerate().rev().find(|(_, (end, _))| *end <= cut);
            match (decode(&seal(None), &bytes[..cut]), before) {
                (Ok(handover_log), Some((number, (end, records)))) => {
                    prop_assert_eq!(handover_log.position.entry, first + number as u64);
                    prop_assert_eq!((&handover_log.records, handover_log.torn), (records, (cut - end) as u64));
                }
                (Err(_), None) => {}
                (read, _) => prop_assert!(false, "{:?} after {} bytes", read, cut),
            }
        }

        #[test]
        fn damage_is_never_taken_for_a_record(entries in entries(), at in 0.0..1.0f64, bit in 0..8u32) {
            let (mut bytes, states) = written(1, &entries);
            // The flips start after the header, whose reserved field means nothing.
            let at = HEADER_LEN + ((bytes.len() - HEADER_LEN) as f64 * at) as usize;
            bytes[at] ^= 1 << bit;
            let good = states.iter().rev().find(|(end, _)| *end <= at);
            match (decode(&seal(None), &bytes), good) {
                (Ok(handover_log), Some((_, records))) => prop_assert_eq!(&handover_log.records, records),
                (Err(Error::Corrupt { .. }), None) => {}
                (read, _) => prop_assert!(false, "{:?}", read),
            }
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..200), as_entry: bool) {
            let mut all = header(&seal(None));
            if as_entry {
                all.put_u32(bytes.len() as u32);
                all.put_u64(1);
                all.put_bytes(seal(None).digest(1, &bytes).as_bytes());
            }
            all.extend(&bytes);
            let _ = decode(&seal(None), &all);
            let _ = decode(&seal(None), &bytes);
        }
    }

    #[test]
    fn newer_versions_are_left_alone() {
        let mut bytes = encode_whole(&seal(None), 1, &Records::new()).unwrap();
        bytes[8] = 3;
        assert!(matches!(decode(&seal(None), &bytes), Err(Error::Unsupported { .. })));
    }

    #[test]
    fn with_a_key_only_those_who_have_it_write_what_is_believed() {
        let key = HandoverKey::derive(b"a long random word").unwrap();
        assert_eq!(HandoverKey::derive(b"short"), None);
        assert_eq!(format!("{key:?}"), "HandoverKey(..)");
        let change = [RecordChange { key: ("tokens".to_owned(), b"t".to_vec()), value: Some(b"admin".to_vec()) }];
        let own = seal(Some(key));
        let mut bytes = encode_whole(&own, 1, &Records::new()).unwrap();
        bytes.extend(encode_entry(&own, 2, &change).unwrap());
        assert!(is_keyed(&bytes));
        let read = decode(&own, &bytes).unwrap();
        assert_eq!((read.position.entry, read.records.len(), read.torn), (2, 1, 0));
        let other = HandoverKey::derive(b"another long random word");
        let why = |seal: &Seal, bytes: &[u8]| decode(seal, bytes).unwrap_err().to_string();
        assert!(why(&seal(other), &bytes).contains("another handover key"));
        assert!(why(&seal(None), &bytes).contains("handover_key_file is not set"));
        assert!(why(&Seal { epoch: 8, ..own }, &bytes).contains("another handover key"), "another leader's");
        assert!(why(&Seal { identity: [4; 16], ..own }, &bytes).contains("another handover key"), "another store's");
        let forged = encode_whole(&seal(None), 1, &Records::new()).unwrap();
        assert!(!is_keyed(&forged) && why(&own, &forged).contains("is not authenticated"));
        // What somebody without the key appends is not read.
        let mut appended = bytes.clone();
        appended.extend(encode_entry(&seal(other), 3, &change).unwrap());
        assert_eq!(decode(&own, &appended).unwrap().position.entry, 2);
    }
}
