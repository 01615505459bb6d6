//! The deep part: every byte of every pack against its name, and every layer's tar, put together again, against its diffID.
//!
//! Packs go first, front to back as the disk likes it; then each layer's tar, which also proves that the indexes point to the right
//! bytes. Both walks are in the order of names, and the cursor is the last name: a check that was interrupted goes on there.
//! What was published behind the cursor meanwhile was verified when it was published.

use std::fs::File;
use std::io::{self, Read, Write};

use coordinator_api::fsck::FsckPhase;
use store::error::Result as StoreResult;
use store::layer::LayerIndex;
use store::pack::thinned::Thinned;
use store::{ContentDigest, Digest, Error};

use crate::admin::fsck::finding::Object;
use crate::admin::fsck::run::{Halt, Run};
use crate::admin::fsck::survey::{Surveyed, find_culprit};
use crate::unpack::{UnpackError, write_layer_tar};

/// Bytes that are read at once.
const BLOCK: usize = 1 << 20;

/// Compares everything that the cursor has not passed yet.
pub(super) fn compare(run: &Run, surveyed: &Surveyed) -> Result<(), Halt> {
    let cursor = run.cursor();
    if cursor.layer.is_none() {
        let passed = |pack: &ContentDigest| cursor.pack.as_ref().is_some_and(|last| pack <= last);
        let total = surveyed.survey.packs.iter().map(|(_, len)| len).sum();
        run.enter(FsckPhase::Packs, total)?;
        for (name, len) in &surveyed.survey.packs {
            if passed(name) {
                run.show(|view| view.done += len);
                continue;
            }
            if let Err(error) = pack(run, name)? {
                run.judge(Object::Pack(*name), error)?;
            }
            run.reached(|cursor| cursor.pack = Some(*name))?;
        }
    }
    let sizes: std::collections::HashMap<Digest, u64> = surveyed
        .catalogue
        .images()
        .flat_map(|image| image.layers.iter().map(|layer| (layer.diff_id, layer.size)))
        .collect();
    run.enter(FsckPhase::Content, sizes.values().sum())?;
    for diff_id in &surveyed.survey.layers {
        if cursor.layer.as_ref().is_some_and(|last| diff_id <= last) {
            run.show(|view| view.done += sizes.get(diff_id).copied().unwrap_or(0));
            continue;
        }
        content(run, diff_id)?;
        run.reached(|cursor| cursor.layer = Some(*diff_id))?;
    }
    Ok(())
}

/// Whether a pack's bytes match its name.
pub(super) fn pack(run: &Run, name: &ContentDigest) -> Result<StoreResult<()>, Halt> {
    let path = run.store().layout().pack(name);
    let mut file = match File::open(&path) {
        Ok(file) => file,
        // Removed since it was listed; whether anybody misses it, the indexes say.
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
        // The dead chunks of a thinned pack are holes; its record knows the bytes that are left.
        (false, Ok(Some(thinned))) if [thinned.digest, thinned.replaced].contains(&found) => Ok(()),
        (false, Ok(Some(_))) => Err(damaged("its bytes match neither its name nor its record")),
        (false, Ok(None)) => Err(damaged("its bytes do not match its name")),
        (false, Err(error)) => Err(error),
    })
}

/// Takes the bytes of a tar, and stops when the check is to stop.
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

/// Compares one layer's tar, and finds out what is wrong where it differs.
fn content(run: &Run, diff_id: &Digest) -> Result<(), Halt> {
    let Err(error) = tar(run, diff_id)? else { return Ok(()) };
    let Ok(index) = run.store().index(diff_id) else {
        // The fast part has judged it; or it was removed.
        return Ok(());
    };
    let broken = broken_packs(run, &index)?;
    if broken.is_empty() {
        return run.judge(Object::Layer(*diff_id), error);
    }
    for (pack, error) in broken {
        run.judge(find_culprit(run, &index, pack)?, error)?;
    }
    Ok(())
}

/// Whether a layer's tar can be put together and matches its diffID.
pub(super) fn tar(run: &Run, diff_id: &Digest) -> Result<StoreResult<()>, Halt> {
    let written = write_layer_tar(run.store(), diff_id, &mut Sink(run));
    run.go_on()?;
    Ok(written.map_err(|error| match error {
        UnpackError::Store(error) => error,
        other => Error::corrupt(format!("layer {diff_id}"), other.to_string()),
    }))
}

/// The packs in which a layer's chunks are not what its index says.
fn broken_packs(run: &Run, index: &LayerIndex) -> Result<Vec<(ContentDigest, Error)>, Halt> {
    let mut broken: Vec<(ContentDigest, Error)> = Vec::new();
    for number in 0..index.chunk_count() {
        run.go_on()?;
        let Ok(chunk) = index.chunk(number) else { continue };
        if broken.iter().any(|(pack, _)| *pack == chunk.pack) {
            continue;
        }
        if let Err(error) = run.store().read_chunk(&chunk) {
            broken.push((chunk.pack, error));
        }
    }
    Ok(broken)
}
