//! The superblock: which format this is, and which features a reader or a writer must know.
//!
//! Three feature sets, as ext4 and EROFS have them. A bit in *compatible* may be ignored; an unknown bit in
//! *read-only compatible* forbids writing; an unknown bit in *incompatible* forbids reading too.
//!
//! The store holds it twice: without it nothing can be read, and its identity is stored nowhere else. Readers take the
//! copy if the first one is missing or damaged; the next leader writes the first one again.

use std::fs;
use std::path::Path;

use crate::digest::ContentDigest;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::wire::{Fields, Put};

/// First bytes of the superblock.
pub const MAGIC: &[u8; 8] = b"CACHEFS\0";
/// The format's version: changes only when the superblock itself changes shape.
pub const VERSION: u32 = 1;
/// Length of the superblock: fixed fields and a BLAKE3 digest over them.
pub const SUPERBLOCK_LEN: usize = 84;

/// The three feature sets of a store or of one of its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features {
    /// May be ignored.
    pub compatible: u64,
    /// Unknown bits forbid writing.
    pub read_only_compatible: u64,
    /// Unknown bits forbid reading.
    pub incompatible: u64,
}

/// What a program wants to do with a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read only.
    Read,
    /// Read and publish.
    Write,
}

/// The features that this software knows. None are defined in version 1.
pub const KNOWN: Features = Features { compatible: 0, read_only_compatible: 0, incompatible: 0 };

impl Features {
    /// Refuses `what` if it has unknown features that rule out `access`.
    pub fn check(&self, what: &str, access: Access) -> Result<()> {
        let unknown = self.incompatible & !KNOWN.incompatible;
        if unknown != 0 {
            return Err(Error::Unsupported {
                what: what.to_owned(),
                why: format!("it uses incompatible features {unknown:#x}"),
            });
        }
        let unknown = self.read_only_compatible & !KNOWN.read_only_compatible;
        if access == Access::Write && unknown != 0 {
            return Err(Error::Unsupported {
                what: what.to_owned(),
                why: format!("writing needs read-only-compatible features {unknown:#x}"),
            });
        }
        Ok(())
    }

    /// Appends the three sets.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u64(self.compatible);
        out.put_u64(self.read_only_compatible);
        out.put_u64(self.incompatible);
    }

    /// Reads the three sets.
    pub fn decode(fields: &mut Fields<'_>) -> Result<Features> {
        Ok(Features { compatible: fields.u64()?, read_only_compatible: fields.u64()?, incompatible: fields.u64()? })
    }
}

/// The contents of the file `cachefs-store`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superblock {
    /// The store's features.
    pub features: Features,
    /// Random identity: two stores never share one, so a host's cache can tell them apart.
    pub identity: [u8; 16],
}

impl Superblock {
    /// The superblock's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(SUPERBLOCK_LEN);
        out.put_bytes(MAGIC);
        out.put_u32(VERSION);
        self.features.encode(&mut out);
        out.put_bytes(&self.identity);
        let digest = ContentDigest::of(&out);
        out.put_bytes(digest.as_bytes());
        out
    }

    /// Reads the bytes of the superblock of the store at `root`.
    pub fn decode(root: &Path, bytes: &[u8]) -> Result<Superblock> {
        let what = format!("store {}", root.display());
        let mut fields = Fields::new("the file cachefs-store", bytes);
        if fields.bytes(8).ok() != Some(MAGIC) {
            let why = "its file cachefs-store has other contents".to_owned();
            return Err(Error::NotAStore { path: root.to_owned(), why });
        }
        let version = fields.u32()?;
        if version != VERSION {
            return Err(Error::Unsupported { what, why: format!("it has format version {version}") });
        }
        let features = Features::decode(&mut fields)?;
        let identity = fields.array()?;
        if fields.array()? != *ContentDigest::of(&bytes[..SUPERBLOCK_LEN - 32]).as_bytes() {
            return Err(Error::corrupt(what, "the file cachefs-store does not match its checksum"));
        }
        Ok(Superblock { features, identity })
    }

    /// Reads the superblock below `layout` and checks it for `access`. Falls back to the copy if the first one cannot
    /// be read.
    pub fn read(layout: &Layout, access: Access) -> Result<Superblock> {
        let root = layout.root();
        let superblock = match Superblock::read_first(layout) {
            // A damaged version looks like a newer one. Newer software would have written its version into the copy,
            // too.
            Err(error) => Superblock::read_copy(layout).map_err(|_| error)?,
            Ok(superblock) => superblock,
        };
        superblock.features.check(&format!("store {}", root.display()), access)?;
        Ok(superblock)
    }

    /// Reads the superblock's copy. A store of older software has none until it is led.
    pub fn read_copy(layout: &Layout) -> Result<Superblock> {
        let path = layout.superblock_copy();
        let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        Superblock::decode(layout.root(), &bytes)
    }

    /// Reads the superblock itself.
    pub fn read_first(layout: &Layout) -> Result<Superblock> {
        let root = layout.root();
        let not_a_store = |why: &str| Error::NotAStore { path: root.to_owned(), why: why.to_owned() };
        match fs::metadata(root) {
            Ok(meta) if !meta.is_dir() => return Err(not_a_store("it is not a directory")),
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(not_a_store("there is no such directory; mount the shared disk there first"));
            }
            Err(e) => return Err(Error::io("open store", root, e)),
        }
        let bytes = match fs::read(layout.superblock()) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(not_a_store("it has no file cachefs-store"));
            }
            Err(e) => return Err(Error::io("read", &layout.superblock(), e)),
        };
        Superblock::decode(root, &bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Superblock {
        Superblock { features: Features::default(), identity: *b"0123456789abcdef" }
    }

    #[test]
    fn golden_bytes() {
        let bytes = example().encode();
        assert_eq!(bytes.len(), SUPERBLOCK_LEN);
        assert_eq!(&bytes[..12], b"CACHEFS\0\x01\0\0\0");
        assert_eq!(&bytes[36..52], b"0123456789abcdef");
        assert_eq!(Superblock::decode(Path::new("/s"), &bytes).unwrap(), example());
    }

    #[test]
    fn any_flipped_bit_is_refused() {
        let bytes = example().encode();
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Superblock::decode(Path::new("/s"), &bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_superblock_that_is_lost_is_read_from_its_copy() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        let read = || Superblock::read(&layout, Access::Read);
        fs::write(layout.superblock_copy(), example().encode()).unwrap();
        assert_eq!(read().unwrap(), example(), "missing");
        for damaged in [&b""[..], b"x", &[0; SUPERBLOCK_LEN]] {
            fs::write(layout.superblock(), damaged).unwrap();
            assert_eq!(read().unwrap(), example(), "{damaged:?}");
        }
        fs::remove_file(layout.superblock_copy()).unwrap();
        assert!(read().unwrap_err().to_string().contains("other contents"));
    }

    #[test]
    fn feature_sets_decide_who_may_do_what() {
        let read_only = Features { read_only_compatible: 4, ..Features::default() };
        assert!(read_only.check("store /s", Access::Read).is_ok());
        let error = read_only.check("store /s", Access::Write).unwrap_err().to_string();
        assert_eq!(
            error,
            "store /s needs a newer cachefs: writing needs read-only-compatible features 0x4; upgrade this program"
        );
        assert!(Features { incompatible: 1, ..Features::default() }.check("store /s", Access::Read).is_err());
        assert!(Features { compatible: 1, ..Features::default() }.check("store /s", Access::Write).is_ok());
    }
}
