//! The members of an archive by name, read in place.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use store::Digest;

use crate::registries::archive::members::{Member, each_member};
use crate::registries::error::RegistryError;

/// A chain of links longer than this is taken for a cycle.
const MAX_LINKS: usize = 16;
/// Bytes of a layer that are read at once.
pub(super) const BLOCK: usize = 256 << 10;

/// Where a blob is.
#[derive(Debug, Clone)]
pub(crate) enum Blob {
    /// In the archive.
    Member(Span),
    /// In memory: the config of an image that has no registry manifest.
    Made(Bytes),
}

/// Where a member's content lies in the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) offset: u64,
    /// Its length in bytes.
    pub(crate) size: u64,
}

/// The archive's members by name.
#[derive(Debug)]
pub(crate) struct Members {
    pub(super) path: PathBuf,
    file: File,
    spans: HashMap<String, Span>,
    links: HashMap<String, String>,
}

/// The error for an archive that cannot be read.
pub(crate) fn unreadable(why: impl Into<String>) -> RegistryError {
    RegistryError::Archive { why: why.into() }
}

impl Members {
    pub(super) fn index(path: &Path) -> Result<Members, RegistryError> {
        let opened = |error: io::Error| unreadable(format!("{}: {error}", path.display()));
        let file = File::open(path).map_err(opened)?;
        let length = file.metadata().map_err(opened)?.len();
        let mut members = Members { path: path.to_owned(), file, spans: HashMap::new(), links: HashMap::new() };
        let index = File::open(path).map_err(opened)?;
        each_member(&index, length, |member| members.add(member, length))?;
        Ok(members)
    }

    fn add(&mut self, member: Member, length: u64) -> Result<(), RegistryError> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let name = normal(&text(&member.name));
        match member.kind {
            0 | b'0' | b'7' => {
                let span = Span { offset: member.offset, size: member.size };
                if span.offset.checked_add(span.size).is_none_or(|end| end > length) {
                    return Err(unreadable(format!("it is cut off within {name}: copy it again")));
                }
                self.spans.insert(name, span);
            }
            b'2' => {
                let target = text(&member.link);
                let base = name.rsplit_once('/').map_or("", |(base, _)| base);
                let target =
                    if target.starts_with('/') { normal(&target) } else { normal(&format!("{base}/{target}")) };
                self.links.insert(name, target);
            }
            b'1' => {
                self.links.insert(name, normal(&text(&member.link)));
            }
            _ => {}
        }
        Ok(())
    }

    /// Finds the member `name`, following links.
    pub(crate) fn find(&self, name: &str) -> Option<Span> {
        let mut name = normal(name);
        for _ in 0..MAX_LINKS {
            if let Some(span) = self.spans.get(&name) {
                return Some(*span);
            }
            name = self.links.get(&name)?.clone();
        }
        None
    }

    /// The names of all members and links, for readers that go by digest.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.spans.keys().chain(self.links.keys()).map(String::as_str)
    }

    /// Reads a whole member of at most `limit` bytes.
    pub(crate) fn read(&self, name: &str, limit: u64) -> Result<Bytes, RegistryError> {
        let span = self.find(name).ok_or_else(|| unreadable(format!("it lacks {name}: save the image again")))?;
        self.read_whole(span, limit)
    }

    /// Reads a whole blob; a member may have at most `limit` bytes.
    pub(crate) fn blob_bytes(&self, blob: &Blob, limit: u64) -> Result<Bytes, RegistryError> {
        match blob {
            Blob::Made(bytes) => Ok(bytes.clone()),
            Blob::Member(span) => self.read_whole(*span, limit),
        }
    }

    /// The first `count` bytes of a member, or all of a shorter one.
    pub(crate) fn head(&self, span: Span, count: usize) -> Result<Vec<u8>, RegistryError> {
        let head = Span { size: span.size.min(count as u64), ..span };
        Ok(self.read_whole(head, count as u64)?.to_vec())
    }

    /// A reader of a member's bytes, from first to last.
    pub(crate) fn reader(&self, span: Span) -> impl BufRead + '_ {
        BufReader::with_capacity(BLOCK, MemberReader { members: self, at: span.offset, end: span.offset + span.size })
    }

    /// Hashes a member's bytes.
    pub(crate) fn digest(&self, span: Span) -> Result<Digest, RegistryError> {
        let mut hasher = store::digest::Sha256::new();
        let mut at = span.offset;
        let end = span.offset + span.size;
        let mut block = vec![0; BLOCK];
        while at < end {
            let count = (end - at).min(BLOCK as u64) as usize;
            self.read_exact(&mut block[..count], at)?;
            hasher.update(&block[..count]);
            at += count as u64;
        }
        Ok(hasher.finish())
    }

    fn read_whole(&self, span: Span, limit: u64) -> Result<Bytes, RegistryError> {
        if span.size > limit {
            return Err(unreadable(format!("a document in it has {} bytes; at most {limit} are read", span.size)));
        }
        let mut bytes = vec![0; span.size as usize];
        self.read_exact(&mut bytes, span.offset)?;
        Ok(bytes.into())
    }

    fn read_exact(&self, bytes: &mut [u8], offset: u64) -> Result<(), RegistryError> {
        let read = self.file.read_exact_at(bytes, offset);
        read.map_err(|error| unreadable(format!("reading {} failed: {error}", self.path.display())))
    }
}

/// Reads a member in place.
struct MemberReader<'a> {
    members: &'a Members,
    at: u64,
    end: u64,
}

impl Read for MemberReader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let count = (self.end - self.at).min(out.len() as u64) as usize;
        self.members.file.read_exact_at(&mut out[..count], self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// A member's name without `./`, `//` and `..`: a key, not a path.
fn normal(name: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}
