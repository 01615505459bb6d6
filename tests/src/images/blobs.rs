//! Content under its SHA-256, written once and then left alone: raw layer tars and registry blobs.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};

/// Writes of zeros at least this long become holes in files, so that a 2 GiB layer costs little disk.
const HOLE: usize = 4096;

/// What a manifest says of a blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// The media type.
    pub media_type: String,
    /// `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// Bytes.
    pub size: u64,
}

/// How a layer's blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip at level 6, as `docker push` does.
    Gzip,
    /// zstd at level 3; OCI media types only.
    Zstd,
}

impl Compression {
    /// The OCI media type of a layer so compressed.
    pub fn layer_type(self) -> &'static str {
        match self {
            Self::None => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// `sha256:` and the digest of `bytes`.
pub fn digest_of(bytes: &[u8]) -> String {
    named(&ring::digest::digest(&ring::digest::SHA256, bytes))
}

/// `sha256:` and the digest of all that `reader` gives.
pub fn digest_of_reader(mut reader: impl Read) -> io::Result<String> {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(named(&context.finish())),
            count => context.update(&buffer[..count]),
        }
    }
}

fn named(digest: &ring::digest::Digest) -> String {
    let hex: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// A digest without its `sha256:`.
pub fn hex(digest: &str) -> &str {
    digest.trim_start_matches("sha256:")
}

/// A directory of files named by their digest; several processes may write it at once.
#[derive(Debug, Clone)]
pub struct Pool {
    directory: PathBuf,
}

impl Pool {
    /// The pool in `directory`, made when missing.
    pub fn open(directory: &Path) -> Result<Self> {
        std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
        Ok(Self { directory: directory.to_owned() })
    }

    /// Where the content of `digest` lies.
    pub fn path(&self, digest: &str) -> PathBuf {
        self.directory.join(hex(digest))
    }

    /// Keeps `bytes`.
    pub fn put(&self, bytes: &[u8], media_type: &str) -> Result<Descriptor> {
        let mut sink = self.sink()?;
        sink.write_all(bytes)?;
        sink.keep(media_type)
    }

    /// Keeps the file at `source`, compressed as asked.
    pub fn compress(&self, source: &Path, compression: Compression, media_type: &str) -> Result<Descriptor> {
        let file = File::open(source).with_context(|| format!("cannot open {}", source.display()))?;
        let sink = self.sink()?;
        let sink = match compression {
            Compression::None => {
                let mut sink = sink;
                copy(file, &mut sink)?;
                sink
            }
            Compression::Gzip => {
                let mut encoder = GzEncoder::new(sink, flate2::Compression::new(6));
                copy(file, &mut encoder)?;
                encoder.finish()?
            }
            Compression::Zstd => {
                let mut encoder = zstd::Encoder::new(sink, 3)?;
                copy(file, &mut encoder)?;
                encoder.finish()?
            }
        };
        sink.keep(media_type)
    }

    /// A new file whose name is known only when all is written.
    pub fn sink(&self) -> Result<Sink> {
        let file = tempfile::Builder::new().prefix(".partial-").tempfile_in(&self.directory);
        let file = file.with_context(|| format!("cannot write below {}", self.directory.display()))?;
        Ok(Sink {
            file,
            directory: self.directory.clone(),
            context: ring::digest::Context::new(&ring::digest::SHA256),
            size: 0,
        })
    }
}

/// A file being written to a [`Pool`]: hashed on the way, zeros left as holes; removed unless kept.
pub struct Sink {
    file: tempfile::NamedTempFile,
    directory: PathBuf,
    context: ring::digest::Context,
    size: u64,
}

impl Sink {
    /// Gives the file its name.
    pub fn keep(self, media_type: &str) -> Result<Descriptor> {
        self.file.as_file().set_len(self.size)?;
        let digest = named(&self.context.finish());
        self.file.persist(self.directory.join(hex(&digest))).context("cannot name a finished blob")?;
        Ok(Descriptor { media_type: media_type.to_owned(), digest, size: self.size })
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.context.update(bytes);
        write_or_skip(self.file.as_file_mut(), bytes)?;
        self.size += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file whose long runs of zeros are holes.
#[derive(Debug)]
pub struct SparseFile {
    file: File,
    size: u64,
}

impl SparseFile {
    /// A new, empty file.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { file, size: 0 })
    }

    /// Sets the length, which a hole at the end leaves open.
    pub fn finish(self) -> io::Result<()> {
        self.file.set_len(self.size)
    }
}

impl Write for SparseFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_or_skip(&mut self.file, bytes)?;
        self.size += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_or_skip(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    if bytes.len() < HOLE || bytes.iter().any(|byte| *byte != 0) {
        return file.write_all(bytes);
    }
    let length = i64::try_from(bytes.len()).map_err(io::Error::other)?;
    file.seek(SeekFrom::Current(length)).map(drop)
}

/// Copies everything in pieces large enough to keep hashing and compressing busy.
pub fn copy(mut from: impl Read, to: &mut impl Write) -> io::Result<u64> {
    let mut buffer = vec![0; 128 * 1024];
    let mut total = 0;
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(total),
            count => {
                to.write_all(&buffer[..count])?;
                total += count as u64;
            }
        }
    }
}
