//! Lists what lies in a store's directories, whether or not anything refers to it.
//!
//! The lists are sorted by name, so that a long walk can be resumed at the name where it stopped. They take 32 bytes of
//! memory for each object, whatever its size.

use std::fs;
use std::io::ErrorKind;
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
    /// The packs.
    pub packs: Vec<ContentDigest>,
    /// Those of them that have a record of being thinned.
    pub thinned: Vec<ContentDigest>,
    /// Packs that are gone, but whose record of being thinned is there.
    pub stray_records: Vec<ContentDigest>,
    /// Manifests and configs.
    pub blobs: Vec<Digest>,
    /// Files and directories that do not belong where they lie.
    pub unknown_files: Vec<PathBuf>,
    /// Directories of the store that are not there, such as those of a disk that was unmounted.
    pub absent: Vec<PathBuf>,
}

impl Store {
    /// Lists all objects. One that is removed while this runs may be listed or not.
    pub fn survey(&self) -> Result<Survey> {
        let (layout, mut survey) = (self.layout(), Survey::default());
        let absent = &mut survey.absent;
        survey.layers = names(layout.layers(), Digest::from_hex, &mut survey.unknown_files, absent)?;
        survey.blobs = names(layout.blobs(), Digest::from_hex, &mut survey.unknown_files, absent)?;
        let mut others = Vec::new();
        survey.packs = names(layout.packs(), ContentDigest::from_hex, &mut others, absent)?;
        for path in others {
            match record_of(&path) {
                Some(pack) if survey.packs.binary_search(&pack).is_ok() => survey.thinned.push(pack),
                record => {
                    survey.stray_records.extend(record);
                    survey.unknown_files.push(path);
                }
            }
        }
        Ok(survey)
    }

    /// The same store with no file open: reads through it see the files that have the names now, not those before a
    /// repair.
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

/// The names two levels below `dir`, in order. Anything that is not a name, or lies outside the directory of its first
/// two digits, is an unknown file.
fn names<N: Ord>(
    dir: PathBuf,
    parse: impl Fn(&str) -> Option<N>,
    unknown_files: &mut Vec<PathBuf>,
    absent: &mut Vec<PathBuf>,
) -> Result<Vec<N>> {
    let mut found = Vec::new();
    let Some(fans) = entries(&dir)? else {
        absent.push(dir);
        return Ok(found);
    };
    for fan in fans {
        let fan_name = fan.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let is_fan = fan_name.len() == 2 && fan_name.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let is_other = !is_fan || fan.metadata().is_ok_and(|meta| !meta.is_dir());
        let Some(paths) = (if is_other { None } else { entries(&fan)? }) else {
            unknown_files.push(fan);
            continue;
        };
        for path in paths {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match parse(&name).filter(|_| name.starts_with(&fan_name)) {
                Some(name) => found.push(name),
                None => unknown_files.push(path),
            }
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// The pack whose record of being thinned a file is, by its name.
fn record_of(path: &Path) -> Option<ContentDigest> {
    path.file_name()?.to_str()?.strip_suffix(thinned::SUFFIX).and_then(ContentDigest::from_hex)
}

/// The paths in a directory; nothing if there is no such directory. Whatever else keeps it from being listed is an error: what is not
/// seen would count as gone.
fn entries(dir: &Path) -> Result<Option<Vec<PathBuf>>> {
    let listed = match fs::read_dir(dir) {
        Ok(listed) => listed,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("list", dir, error)),
    };
    listed.map(|entry| entry.map(|e| e.path()).map_err(|e| Error::io("list", dir, e))).collect::<Result<_>>().map(Some)
}
