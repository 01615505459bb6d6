//! Where the dynamic loader finds libraries: `ld.so.cache`, its configuration, and the directories that it knows by itself.

use std::collections::HashMap;

use super::files::{Files, join};

/// Directories that are searched last: those of glibc with and without Debian's architectures, and of musl.
const DEFAULT: [&str; 9] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib/aarch64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
    "/usr/local/lib",
];
/// The most entries of a cache that are looked at.
const ENTRIES_MAX: usize = 100_000;

/// What the loader knows.
#[derive(Debug, Default)]
pub(super) struct Libraries {
    /// Paths by name, from `ld.so.cache`.
    cached: HashMap<Vec<u8>, Vec<Vec<u8>>>,
    /// Directories of `ld.so.conf`, then [`DEFAULT`].
    directories: Vec<Vec<u8>>,
}

impl Libraries {
    /// Reads the loader's files in an image.
    pub(super) fn of(files: &mut Files<'_>) -> Result<Libraries, store::Error> {
        let mut libraries = Libraries::default();
        if let Some(cache) = files.file(b"/etc/ld.so.cache")? {
            let bytes = files.read(&cache, 0, cache.inode.size.min(16 << 20))?.unwrap_or_default();
            libraries.cached = cached(&bytes).unwrap_or_default();
        }
        let mut configured = vec![b"/etc/ld.so.conf".to_vec()];
        configured.extend(files.names(b"/etc/ld.so.conf.d")?.iter().map(|name| join(b"/etc/ld.so.conf.d", name)));
        for path in configured {
            let Some(file) = files.file(&path)? else { continue };
            let text = files.text(&file)?;
            libraries
                .directories
                .extend(text.lines().map(str::trim).filter(|line| line.starts_with('/')).map(|line| line.into()));
        }
        libraries.directories.extend(DEFAULT.map(|directory| directory.as_bytes().to_vec()));
        Ok(libraries)
    }

    /// Where a library of that name may be, best first.
    pub(super) fn candidates(&self, name: &[u8]) -> impl Iterator<Item = Vec<u8>> {
        let cached = self.cached.get(name).into_iter().flatten().cloned();
        cached.chain(self.directories.iter().map(move |directory| join(directory, name)))
    }
}

/// The entries of a cache in the format of glibc 2.2 and later; nothing if it is another format, or damaged.
fn cached(bytes: &[u8]) -> Option<HashMap<Vec<u8>, Vec<Vec<u8>>>> {
    const MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
    const HEADER_LEN: usize = 48;
    const ENTRY_LEN: usize = 24;
    // In the byte order of the machine; images for others than little-endian ones are rare.
    let number = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let text = |at: u32| bytes.get(at as usize..)?.split(|byte| *byte == 0).next();
    if !bytes.starts_with(MAGIC) {
        return None;
    }
    let mut found: HashMap<Vec<u8>, Vec<Vec<u8>>> = HashMap::new();
    for entry in 0..(number(MAGIC.len())? as usize).min(ENTRIES_MAX) {
        let at = HEADER_LEN + entry * ENTRY_LEN;
        let (name, path) = (text(number(at + 4)?)?, text(number(at + 8)?)?);
        found.entry(name.to_vec()).or_default().push(path.to_vec());
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_of_this_machine() {
        let bytes = std::fs::read("/etc/ld.so.cache").unwrap();
        let found = cached(&bytes).unwrap();
        let libc = &found[&b"libc.so.6"[..]];
        assert!(libc.iter().all(|path| path.ends_with(b"/libc.so.6")), "{libc:?}");
        for len in (0..bytes.len()).step_by(bytes.len() / 100 + 1) {
            assert!(cached(&bytes[..len]).is_none(), "cut after {len} bytes");
        }
        assert_eq!(cached(b"ld.so-1.7.0"), None);
    }
}
