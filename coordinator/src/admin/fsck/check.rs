//! Checks of single objects of the store: whether the object exists, and whether its bytes match its name.
//!
//! Each check stands alone, so that it can be repeated for one object after a repair.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::time::Duration;

use store::catalogue::Catalogue;
use store::chunk::PieceLocation;
use store::error::Result as StoreResult;
use store::layer::LayerIndex;
use store::pack::thinned::Thinned;
use store::version::Superblock;
use store::{ContentDigest, Digest, Error};

use crate::admin::fsck::finding::{Object, has_blob, has_layer};
use crate::admin::fsck::run::{Halt, Run};
use crate::unpack::previous_layout::pieces_of;
use crate::unpack::{UnpackError, write_layer_tar};

/// Bytes read at a time.
const BLOCK: usize = 1 << 20;
/// Permissions are looked at this many times, [`BETWEEN_LOOKS`] apart, before they are a finding.
const LOOKS: u32 = 3;
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// Whether the superblock and its copy are the ones that this coordinator started with.
pub(super) fn superblock(run: &Run) -> StoreResult<()> {
    let layout = run.store().layout();
    let read: [(&str, StoreResult<Superblock>); 2] = [
        ("the file cachefs-store", Superblock::read_first(layout)),
        ("the file cachefs-store.copy", Superblock::read_copy(layout)),
    ];
    for (what, found) in read {
        match found {
            Ok(found) if found.identity == run.store().identity() => {}
            Ok(_) => return Err(Error::corrupt(what, "it names another store")),
            Err(Error::Missing { .. }) => return Err(Error::corrupt(what, "it is missing")),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether hosts can read everything that they must read, whichever user they run as. New files are closed to hosts for a moment,
/// until they get their mode, so only files that stay closed are a finding.
pub(super) fn modes(run: &Run) -> StoreResult<()> {
    let mut looks = 0;
    loop {
        let closed = run.components.publisher.closed_to_hosts(1);
        let Some(path) = closed.first() else { return Ok(()) };
        looks += 1;
        if looks == LOOKS {
            let path = path.strip_prefix(run.store().layout().root()).unwrap_or(path);
            let why = format!("hosts that run as other users cannot read {}", path.display());
            return Err(Error::corrupt("the store", why));
        }
        std::thread::sleep(BETWEEN_LOOKS);
    }
}

/// Whether another coordinator could take over from the handover log.
pub(super) fn handover(run: &Run) -> Result<StoreResult<()>, Halt> {
    let why = run.components.state_db.check_handover()?;
    Ok(why.map_or(Ok(()), |why| Err(Error::corrupt("what the next coordinator would take over", why))))
}

/// Whether a generation can be read, if readers may still need it.
pub(super) fn generation(run: &Run, number: u64) -> StoreResult<()> {
    match run.store().generation_file(number) {
        Ok(_) => Ok(()),
        // A newer snapshot replaces it, and it may be removed at any time.
        Err(Error::Missing { .. }) if number < run.components.publisher.catalogue().snapshot() => Ok(()),
        Err(Error::Missing { .. }) => {
            Err(Error::corrupt("the catalogue", format!("generation {number} is missing, which hosts have to read")))
        }
        Err(Error::Corrupt { why, .. }) => Err(Error::corrupt(format!("generation {number} of the catalogue"), why)),
        Err(error) => Err(error),
    }
}

/// Whether a blob matches its digest. A missing blob is a fault only if an image refers to it.
pub(super) fn blob(run: &Run, digest: &Digest, catalogue: &Catalogue) -> StoreResult<()> {
    match run.store().blob(digest) {
        Ok(_) => Ok(()),
        Err(Error::Missing { .. }) => match catalogue.images().find(|image| has_blob(image, digest)) {
            None => Ok(()),
            Some(image) => {
                let why = format!("it is missing, and {} needs it", image.familiar_name());
                Err(Error::corrupt(format!("blob {digest}"), why))
            }
        },
        Err(error) => Err(error),
    }
}

/// How much of each pack a layer needs: the end of the layer's last chunk in that pack.
pub(super) fn needs(index: &LayerIndex) -> StoreResult<HashMap<ContentDigest, u64>> {
    let mut ends: HashMap<ContentDigest, u64> = HashMap::new();
    for number in 0..index.pack_count() {
        ends.insert(index.pack(number)?, 0);
    }
    for number in 0..index.chunk_count() {
        let chunk = index.chunk(number)?;
        let end = ends.entry(chunk.pack).or_default();
        *end = (*end).max(chunk.offset.saturating_add(chunk.stored_len.into()));
    }
    Ok(ends)
}

/// Checks a layer's own two files and returns its index. Packs are not looked at.
pub(super) fn layer(run: &Run, diff_id: &Digest) -> StoreResult<LayerIndex> {
    let index = run.store().index(diff_id)?;
    let what = || format!("the tar recipe of layer {diff_id}");
    match run.store().recipe_len(diff_id) {
        Ok(len) if len == index.header().recipe_len => Ok(index),
        Ok(_) => Err(Error::corrupt(what(), "its length differs from the index")),
        Err(Error::Missing { .. }) => Err(Error::corrupt(what(), "it is missing")),
        Err(error) => Err(error),
    }
}

/// Whether a pack is at least `end` bytes long, as `needed_by` requires.
pub(super) fn pack_length(run: &Run, pack: &ContentDigest, end: u64, needed_by: &str) -> StoreResult<()> {
    let what = || format!("pack {pack}");
    match run.store().pack_len(pack) {
        Ok(len) if len >= end => Ok(()),
        Ok(_) => Err(Error::corrupt(what(), format!("it is shorter than {needed_by} needs it"))),
        Err(Error::Missing { .. }) => Err(Error::corrupt(what(), format!("it is missing, and {needed_by} needs it"))),
        Err(error) => Err(error),
    }
}

/// Whether a pack's bytes match its name.
pub(super) fn pack(run: &Run, name: &ContentDigest) -> Result<StoreResult<()>, Halt> {
    let path = run.store().layout().pack(name);
    let mut file = match File::open(&path) {
        Ok(file) => file,
        // It was removed since it was listed. The check of the indexes tells whether a layer misses it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Ok(())),
        Err(error) => return Ok(Err(Error::io("open", &path, error))),
    };
    let mut hasher = blake3::Hasher::new();
    let mut block = vec![0; BLOCK];
    loop {
        run.go_on()?;
        match file.read(&mut block) {
            Ok(0) => break,
            Ok(count) => {
                hasher.update(&block[..count]);
                run.compared(count as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Ok(Err(Error::io("read", &path, error))),
        }
    }
    let found = ContentDigest::from_bytes(*hasher.finalize().as_bytes());
    let damaged = |why: &str| Error::corrupt(format!("pack {name}"), why);
    Ok(match (found == *name, Thinned::beside(&path)) {
        (true, _) => Ok(()),
        // The dead chunks of a thinned pack are holes; the pack's record has the digest of the remaining bytes.
        (false, Ok(Some(thinned))) if [thinned.digest, thinned.replaced].contains(&found) => Ok(()),
        (false, Ok(Some(_))) => Err(damaged("its bytes match neither its name nor its record")),
        (false, Ok(None)) => Err(damaged("its bytes do not match its name")),
        (false, Err(error)) => Err(error),
    })
}

/// Discards the bytes of a tar; fails once the check is to stop.
struct Sink<'a>(&'a Run);

impl Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.go_on() {
            Ok(()) => {
                self.0.compared(bytes.len() as u64);
                Ok(bytes.len())
            }
            Err(_) => Err(io::ErrorKind::Other.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether a layer's tar can be reassembled and matches its diffID.
pub(super) fn tar(run: &Run, diff_id: &Digest) -> Result<StoreResult<()>, Halt> {
    let written = write_layer_tar(run.store(), diff_id, &mut Sink(run));
    run.go_on()?;
    Ok(written.map_err(|error| match error {
        UnpackError::Store(error) => error,
        other => Error::corrupt(format!("layer {diff_id}"), other.to_string()),
    }))
}

/// Tells which is damaged where an index and a pack disagree: the index if the pack's bytes match its name, else the pack.
pub(super) fn find_culprit(run: &Run, index: &LayerIndex, name: ContentDigest) -> Result<Object, Halt> {
    let is_there = run.store().pack_len(&name).is_ok();
    let is_pack_sound = is_there && pack(run, &name)?.is_ok();
    Ok(if is_pack_sound { Object::Layer(index.diff_id()) } else { Object::Pack(name) })
}

/// For each pack: the layers that refer to it, and how many bytes of it each of them uses.
pub(super) type Dependents = HashMap<ContentDigest, BTreeMap<Digest, u64>>;

/// Reads all indexes to find the layers that refer to `packs`.
pub(super) fn dependents(run: &Run, packs: &HashSet<ContentDigest>) -> Result<Dependents, Halt> {
    let mut found: Dependents = packs.iter().map(|pack| (*pack, BTreeMap::new())).collect();
    if packs.is_empty() {
        return Ok(found);
    }
    for diff_id in run.store().survey()?.layers {
        run.go_on()?;
        let Ok(index) = run.store().index(&diff_id) else { continue };
        let mut seen = HashSet::new();
        // An unreadable rest of the index is ignored: it refers to nothing that could be fetched.
        let _ = pieces_of(&index, |_, PieceLocation { chunk, start, len }| {
            if let Some(layers) = found.get_mut(&chunk.pack)
                && seen.insert((chunk.pack, chunk.offset, start))
            {
                *layers.entry(diff_id).or_default() += u64::from(len);
            }
        });
    }
    Ok(found)
}

/// The packs among objects.
pub(super) fn packs<'a>(objects: impl IntoIterator<Item = &'a Object>) -> HashSet<ContentDigest> {
    let pack = |object: &Object| match object {
        Object::Pack(pack) => Some(*pack),
        _ => None,
    };
    objects.into_iter().filter_map(pack).collect()
}

/// What is wrong with an object now. `None` if it is whole, or if it is missing and nothing needs it.
pub(super) fn look(run: &Run, object: Object) -> Result<Option<String>, Halt> {
    let catalogue = run.components.publisher.catalogue();
    let found = match object {
        Object::Superblock => superblock(run),
        Object::Modes => modes(run),
        Object::Handover => handover(run)?,
        Object::Catalogue => match run.store().salvage_note()? {
            None => Ok(()),
            Some(_) => return Ok(Some("the catalogue was salvaged and may lack images".to_owned())),
        },
        Object::Generation(number) => generation(run, number),
        Object::Blob(digest) => blob(run, &digest, &catalogue),
        Object::Layer(diff_id) => match layer(run, &diff_id) {
            Err(Error::Missing { .. }) if !catalogue.images().any(|image| has_layer(image, &diff_id)) => Ok(()),
            Ok(_) if run.is_deep() => tar(run, &diff_id)?,
            other => other.map(drop),
        },
        Object::Pack(pack) => return look_at_pack(run, pack, &catalogue),
    };
    Ok(found.err().map(|error| error.to_string()))
}

fn look_at_pack(run: &Run, name: ContentDigest, catalogue: &Catalogue) -> Result<Option<String>, Halt> {
    match run.store().pack_len(&name) {
        Ok(_) => Ok(pack(run, &name)?.err().map(|error| error.to_string())),
        Err(Error::Missing { .. }) => {
            let layers = dependents(run, &HashSet::from([name]))?.remove(&name).unwrap_or_default();
            let startup = catalogue.startups().any(|startup| startup.pack == name);
            let needed = !layers.is_empty() || startup;
            Ok(needed.then(|| format!("pack {name} is missing, and {} layers need it", layers.len())))
        }
        Err(error) => Ok(Some(error.to_string())),
    }
}
