//! What lies in a store's directories, whoever refers to it.
//!
//! A list of names, sorted, so that a long walk along it can be taken up again at the name where it stopped. It takes 32
//! bytes of memory an object, whatever the objects' size.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::digest::{ContentDigest, Digest};
use crate::error::{Error, Result};
use crate::pack::thinned;
use crate::reader::{PosixDisk, Store};

/// All objects of a store, by name.
#[derive(Debug, Default)]
pub struct Survey {
    /// The layers' diffIDs.
    pub layers: Vec<Digest>,
    /// The packs, with their lengths in bytes.
    pub packs: Vec<(ContentDigest, u64)>,
    /// Manifests and configs.
    pub blobs: Vec<Digest>,
    /// Files and directories that have no business where they lie.
    pub strangers: Vec<PathBuf>,
}

impl Store {
    /// Lists everything. An object that goes while this runs may be in it or not.
    pub fn survey(&self) -> Result<Survey> {
        let (layout, mut survey) = (self.layout(), Survey::default());
        let strangers = &mut survey.strangers;
        survey.layers = names(&layout.root().join("layers"), Digest::from_hex, strangers)?;
        survey.blobs = names(&layout.root().join("blobs"), Digest::from_hex, strangers)?;
        for pack in names(&layout.root().join("packs"), ContentDigest::from_hex, strangers)? {
            if let Ok(status) = fs::metadata(layout.pack(&pack)) {
                survey.packs.push((pack, status.len()));
            }
        }
        Ok(survey)
    }

    /// The same store with no file open: what is read through it is what has its name now, not what had it before a repair.
    pub fn afresh(&self) -> Store {
        let (layout, superblock) = (self.layout.clone(), self.superblock);
        let disk = Arc::new(PosixDisk::new(layout.root()));
        Store { layout, superblock, disk, known: Arc::default() }
    }

    /// The length of a pack's file.
    pub fn pack_len(&self, pack: &ContentDigest) -> Result<u64> {
        let path = self.layout().pack(pack);
        fs::metadata(&path).map(|status| status.len()).map_err(|e| Error::io("look up", &path, e))
    }

    /// The length of a layer's tar recipe.
    pub fn recipe_len(&self, diff_id: &Digest) -> Result<u64> {
        let path = self.layout().recipe(diff_id);
        fs::metadata(&path).map(|status| status.len()).map_err(|e| Error::io("look up", &path, e))
    }
}

/// The names two levels below `dir`, in order; what is no name, or not in the directory of its first digits, is a stranger.
fn names<N: Ord>(dir: &Path, parse: impl Fn(&str) -> Option<N>, strangers: &mut Vec<PathBuf>) -> Result<Vec<N>> {
    let mut found = Vec::new();
    for fan in entries(dir)? {
        let fan_name = fan.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let is_fan = fan_name.len() == 2 && fan_name.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if !is_fan || !fan.is_dir() {
            strangers.push(fan);
            continue;
        }
        for path in entries(&fan)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match parse(&name).filter(|_| name.starts_with(&fan_name)) {
                Some(name) => found.push(name),
                None if is_record(&path) => {}
                None => strangers.push(path),
            }
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Whether a file is the record of a thinned pack that lies beside it.
fn is_record(path: &Path) -> bool {
    let pack = path.to_str().and_then(|name| name.strip_suffix(thinned::SUFFIX));
    pack.is_some_and(|pack| Path::new(pack).exists())
}

/// The paths in a directory; none if it is gone.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let listed = match fs::read_dir(dir) {
        Ok(listed) => listed,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("list", dir, error)),
    };
    listed.map(|entry| entry.map(|e| e.path()).map_err(|e| Error::io("list", dir, e))).collect()
}
