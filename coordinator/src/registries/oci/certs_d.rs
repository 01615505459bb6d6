//! Docker's certificate directories: `certs.d/HOST[:PORT]` with the authorities of that registry (`*.crt`) and certificates to show it
//! (`NAME.cert` with `NAME.key`).
//!
//! What is right was observed with docker 20.10.24 and skopeo 1.9.3: the directory's name is the registry as images are named after it,
//! letter by letter, and the default port makes a difference. Of several places the first that has such a directory counts, even if
//! that is empty. A `.crt` without a certificate is passed over; anything else that is not right stops whatever is asked of the registry.
//!
//! What is read is bounded: [`MOST_FILES`] and [`MOST_BYTES`] of each.

use std::fs::{self, Metadata};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use coordinator_api::trust::{ClientCertificate, certificates_in, client_certificate};
use rustls::pki_types::CertificateDer;

/// More files in one directory are a mistake.
const MOST_FILES: usize = 100;
/// A larger file is a mistake: all of the world's authorities take a quarter of this.
const MOST_BYTES: u64 = 1 << 20;

/// The directory of a registry, as it was found; another one when a file is replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    directory: PathBuf,
    /// In the order of their names.
    files: Vec<(PathBuf, Stamp)>,
}

/// What changes when somebody puts another file there: inode, length, seconds and nanoseconds of the last change of anything,
/// its mode too.
type Stamp = (u64, u64, i64, i64);

/// What such a directory holds.
#[derive(Debug, Default)]
pub(super) struct Certificates {
    /// The registry's authorities.
    pub(super) authorities: Vec<CertificateDer<'static>>,
    /// What is shown to it.
    pub(super) shown: Vec<ClientCertificate>,
    /// What was passed over, in words.
    pub(super) remarks: Vec<String>,
}

/// The directory of `registry` in the first of `places` that has one. Blocks.
pub(super) fn find(places: &[PathBuf], registry: &str) -> Result<Option<Found>, String> {
    // Names of registries hold no slash and begin with no dot; nothing else may lead out of a place.
    if registry.contains('/') || registry.starts_with('.') {
        return Ok(None);
    }
    for directory in places.iter().map(|place| place.join(registry)) {
        // One that we may not see counts as absent.
        if fs::metadata(&directory).is_ok() {
            return look(directory).map(Some);
        }
    }
    Ok(None)
}

/// What lies in a directory and has a meaning.
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
        // A link that leads nowhere is told of when it is read.
        let stamp = fs::metadata(&path).map_or((0, 0, 0, 0), |found| stamp(&found));
        files.push((path, stamp));
    }
    files.sort();
    Ok(Found { directory, files })
}

fn stamp(found: &Metadata) -> Stamp {
    (found.ino(), found.len(), found.ctime(), found.ctime_nsec())
}

/// Whether a file's name ends so; unlike [`Path::extension`], also if nothing stands before.
fn is_a(path: &Path, kind: &str) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.strip_suffix(kind).is_some_and(|rest| rest.ends_with('.')))
}

impl Found {
    /// Where to put what is missing.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Reads the files; the error is a sentence that names the one at fault. Blocks.
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

    /// Refuses half a pair.
    fn require(&self, path: &Path, what: impl Fn() -> String) -> Result<(), String> {
        match self.files.iter().any(|(found, _)| found == path) {
            true => Ok(()),
            false => Err(format!("{} is missing, {}", path.display(), what())),
        }
    }
}

/// The other half of a pair.
fn beside(path: &Path, kind: &str) -> PathBuf {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    path.with_file_name(format!("{stem}.{kind}"))
}

/// What is in a file.
fn text(path: &Path) -> Result<Vec<u8>, String> {
    let mut text = Vec::new();
    let file = fs::File::open(path).map_err(|error| unreadable(path, &error))?;
    file.take(MOST_BYTES + 1).read_to_end(&mut text).map_err(|error| unreadable(path, &error))?;
    match text.len() as u64 > MOST_BYTES {
        true => Err(format!("{} is larger than {MOST_BYTES} bytes, which no certificate or key is", path.display())),
        false => Ok(text),
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> String {
    let advice = match error.kind() {
        ErrorKind::PermissionDenied => ": make it readable for the coordinator's user",
        _ => "",
    };
    format!("{} cannot be read: {error}{advice}", path.display())
}
