//! Docker's certificate directories: `certs.d/HOST[:PORT]` with CA certificates for that registry (`*.crt`) and client certificates
//! (`NAME.cert` with `NAME.key`).
//!
//! The rules were observed with docker 20.10.24 and skopeo 1.9.3: the directory has the name of the registry in image names, letter by
//! letter, so the default port makes a difference. Of several places, the first that has such a directory counts, even if it is empty. A
//! `.crt` without a certificate is skipped; any other error fails whatever is requested of the registry.
//!
//! Reading is bounded: [`MOST_FILES`] files, and [`MOST_BYTES`] of each.

use std::fs::{self, Metadata};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use coordinator_api::trust::{ClientCertificate, certificates_in, client_certificate};
use rustls::pki_types::CertificateDer;

/// Maximum number of files in one directory; more are a mistake.
const MOST_FILES: usize = 100;
/// The largest file, in bytes. A larger one is a mistake: all of the world's CA certificates take a quarter of this.
const MOST_BYTES: u64 = 1 << 20;

/// The directory of a registry as it was found. It compares unequal once a file was replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    directory: PathBuf,
    /// In the order of their names.
    files: Vec<(PathBuf, Stamp)>,
}

/// Changes when a file is replaced: inode, length, and the seconds and nanoseconds of ctime, which covers a change of the mode, too.
type Stamp = (u64, u64, i64, i64);

/// The content of such a directory.
#[derive(Debug, Default)]
pub(super) struct Certificates {
    /// CA certificates for the registry.
    pub(super) authorities: Vec<CertificateDer<'static>>,
    /// Client certificates for the registry.
    pub(super) shown: Vec<ClientCertificate>,
    /// Sentences about files that were skipped.
    pub(super) remarks: Vec<String>,
}

/// The directory of `registry` in the first of `places` that has one. Blocks.
pub(super) fn find(places: &[PathBuf], registry: &str) -> Result<Option<Found>, String> {
    // Names of registries contain no slash and begin with no dot. Other names could lead out of a place.
    if registry.contains('/') || registry.starts_with('.') {
        return Ok(None);
    }
    for directory in places.iter().map(|place| place.join(registry)) {
        // An inaccessible directory counts as absent.
        if fs::metadata(&directory).is_ok() {
            return look(directory).map(Some);
        }
    }
    Ok(None)
}

/// Finds the certificates and keys in a directory.
fn look(directory: PathBuf) -> Result<Found, String> {
    let failed = |error| unreadable(&directory, &error);
    let mut files = Vec::new();
    for entry in fs::read_dir(&directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if !["crt", "cert", "key"].iter().any(|kind| is_a(&path, kind)) {
            continue;
        }
        if files.len() >= MOST_FILES {
            return Err(format!("{} holds more than {MOST_FILES} certificates and keys", directory.display()));
        }
        // A dangling link is reported when it is read.
        let stamp = fs::metadata(&path).map_or((0, 0, 0, 0), |found| stamp(&found));
        files.push((path, stamp));
    }
    files.sort();
    Ok(Found { directory, files })
}

fn stamp(found: &Metadata) -> Stamp {
    (found.ino(), found.len(), found.ctime(), found.ctime_nsec())
}

/// Whether a file's name ends in a dot and `kind`; unlike [`Path::extension`], also if nothing precedes the dot.
fn is_a(path: &Path, kind: &str) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.strip_suffix(kind).is_some_and(|rest| rest.ends_with('.')))
}

impl Found {
    /// The directory's path.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Reads the files; the error is a sentence that names the file at fault. Blocks.
    pub(super) fn read(&self) -> Result<Certificates, String> {
        let mut read = Certificates::default();
        for (path, _) in &self.files {
            if is_a(path, "crt") {
                let found = certificates_in(&text(path)?);
                if found.is_empty() {
                    read.remarks.push(format!("{} holds no certificate in PEM", path.display()));
                }
                read.authorities.extend(found);
            } else if is_a(path, "cert") {
                let key = beside(path, "key");
                self.require(&key, || {
                    format!("the private key of {}; authorities' certificates end in .crt", path.display())
                })?;
                read.shown.push(client_certificate((path, &text(path)?), (&key, &text(&key)?))?);
            } else {
                self.require(&beside(path, "cert"), || format!("the certificate of {}", path.display()))?;
            }
        }
        Ok(read)
    }

    /// Fails if the other half of a pair, a certificate or its key, is missing.
    fn require(&self, path: &Path, what: impl Fn() -> String) -> Result<(), String> {
        if self.files.iter().any(|(found, _)| found == path) {
            Ok(())
        } else {
            Err(format!("{} is missing, {}", path.display(), what()))
        }
    }
}

/// The path of the other half of a pair.
fn beside(path: &Path, kind: &str) -> PathBuf {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    path.with_file_name(format!("{stem}.{kind}"))
}

/// Reads a file of at most [`MOST_BYTES`].
fn text(path: &Path) -> Result<Vec<u8>, String> {
    let mut text = Vec::new();
    let file = fs::File::open(path).map_err(|error| unreadable(path, &error))?;
    file.take(MOST_BYTES + 1).read_to_end(&mut text).map_err(|error| unreadable(path, &error))?;
    if text.len() as u64 > MOST_BYTES {
        Err(format!("{} is larger than {MOST_BYTES} bytes, which no certificate or key is", path.display()))
    } else {
        Ok(text)
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> String {
    let advice = match error.kind() {
        ErrorKind::PermissionDenied => ": make it readable for the coordinator's user",
        _ => "",
    };
    format!("{} cannot be read: {error}{advice}", path.display())
}
