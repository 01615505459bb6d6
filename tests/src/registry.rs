//! A real docker-registry (Debian's 2.8) on a loopback port: anonymous, with passwords or tokens, with or without TLS.
//!
//! Its access log shows every request, so tests can count how often each blob was fetched. [`Registry::push`] writes
//! through a second registry process on the same storage, which needs no credentials and leaves no trace in the log.

use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::http;
use crate::images::{ImageFiles, IndexFiles, MediaTypes};
use crate::process::{Process, TIMEOUT, run};

mod acceptor;
mod behaviour;
mod certificate;
mod content;
mod documents;
mod faulty;
mod openssl;
mod played;
mod scripted;
mod token;

pub use behaviour::{Behaviour, DIMENSIONS};
pub use certificate::Authority;
pub use documents::{BareLayer, CONFIG, Documents, MANIFEST};
pub use faulty::{Fault, FaultyRegistry, Match, Request};
pub use openssl::{CertificateSpec, OpensslServer, make_certificate, write_manifest};
pub use played::{Exposure, Played, Tls, write_logins};
pub use scripted::{Framing, Pace, Reply, ScriptedRegistry, Seen, content_of};
pub use token::TokenServer;

/// Who may pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// Everybody.
    Anonymous,
    /// One user with a password (HTTP basic authentication).
    Password {
        /// The user's name.
        user: String,
        /// The user's password.
        password: String,
    },
    /// Bearer tokens from a token server that knows this one user. An empty name admits everybody.
    Token {
        /// The user's name.
        user: String,
        /// The user's password.
        password: String,
    },
}

/// Whether the registry speaks TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Plain HTTP.
    Http,
    /// HTTPS with a certificate issued by [`Registry::authority`].
    Https,
}

/// One line of the access log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoggedRequest {
    /// The method.
    pub method: String,
    /// The path with its query.
    pub path: String,
    /// The status of the answer.
    pub status: u16,
    /// Bytes of body sent.
    pub bytes: u64,
}

/// A running registry. When it is dropped, it stops and its storage is removed.
#[derive(Debug)]
pub struct Registry {
    port: u16,
    process: Process,
    authority: Option<Authority>,
    tokens: Option<TokenServer>,
    directory: TempDir,
}

impl Registry {
    /// Starts a registry that admits everybody over plain HTTP.
    pub fn start() -> Result<Self> {
        Self::start_with(&Access::Anonymous, Transport::Http)
    }

    /// Starts a registry with this access and transport.
    pub fn start_with(access: &Access, transport: Transport) -> Result<Self> {
        // Tries once more, because another process may have taken the port in between.
        Self::try_start(access, transport, "").or_else(|_| Self::try_start(access, transport, ""))
    }

    /// Starts a registry that admits everybody and sends notifications to `url` with `secret` as bearer token.
    pub fn start_notifying(url: &str, secret: &str) -> Result<Self> {
        let lines = format!(
            "notifications:\n  endpoints:\n    - name: cachefs\n      url: {url}\n      headers:\n        Authorization: \
             [\"Bearer {secret}\"]\n      timeout: 5s\n      threshold: 3\n      backoff: 1s\n"
        );
        Self::try_start(&Access::Anonymous, Transport::Http, &lines)
    }

    fn try_start(access: &Access, transport: Transport, more: &str) -> Result<Self> {
        let directory = tempfile::tempdir().context("cannot make a directory for the registry")?;
        let port = free_port()?;
        let mut lines = format!("http:\n  addr: 127.0.0.1:{port}\n  secret: test\n");
        let authority = match transport {
            Transport::Http => None,
            Transport::Https => Some(Authority::new()?),
        };
        if let Some(authority) = &authority {
            let (certificate, key) = authority.issue(directory.path(), "registry")?;
            lines += &format!("  tls:\n    certificate: {}\n    key: {}\n", certificate.display(), key.display());
        }
        let tokens = access_lines(access, directory.path(), &mut lines)?;
        lines += more;
        let process = spawn(directory.path(), "registry", &lines)?;
        Ok(Self { port, process, authority, tokens, directory })
    }

    /// `127.0.0.1:PORT`, the part of image names before the first slash.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The name of an image in this registry: `127.0.0.1:PORT/name:tag`.
    pub fn reference(&self, name: &str, tag: &str) -> String {
        format!("{}/{name}:{tag}", self.address())
    }

    /// The authority that signed its certificate, if it speaks TLS.
    pub fn authority(&self) -> Option<&Authority> {
        self.authority.as_ref()
    }

    /// Its token server, if it requires tokens.
    pub fn tokens(&self) -> Option<&TokenServer> {
        self.tokens.as_ref()
    }

    /// The directory with its storage, for tests that damage it.
    pub fn storage(&self) -> PathBuf {
        self.directory.path().join("storage")
    }

    /// The file that holds a blob's bytes in the storage.
    pub fn blob_file(&self, digest: &str) -> PathBuf {
        let hex = crate::images::hex(digest);
        self.storage().join("docker/registry/v2/blobs/sha256").join(&hex[..2]).join(hex).join("data")
    }

    /// Uploads an image unchanged as `name:tag` and returns its reference for clients.
    pub fn push(&self, image: &ImageFiles, name: &str, tag: &str) -> Result<String> {
        let manifest = (image.manifest.media_type.clone(), image.blob(&image.manifest.digest)?);
        self.upload(|door| push_image(door, image, name, tag, &manifest))?;
        Ok(self.reference(name, tag))
    }

    /// Like [`Registry::push`], but through the registry itself, which must admit everybody. The push is logged, and
    /// notifications are sent.
    pub fn push_through(&self, image: &ImageFiles, name: &str, tag: &str) -> Result<String> {
        let manifest = (image.manifest.media_type.clone(), image.blob(&image.manifest.digest)?);
        push_image(&self.address(), image, name, tag, &manifest)?;
        Ok(self.reference(name, tag))
    }

    /// Uploads an image as `name:tag` with a manifest in the media types of `family`.
    pub fn push_as(&self, family: MediaTypes, image: &ImageFiles, name: &str, tag: &str) -> Result<String> {
        let manifest = image.manifest_as(family)?;
        self.upload(|door| push_image(door, image, name, tag, &manifest))?;
        Ok(self.reference(name, tag))
    }

    /// Uploads an index (manifest list) and all its images as `name:tag`.
    pub fn push_index(&self, index: &IndexFiles, name: &str, tag: &str) -> Result<String> {
        self.upload(|door| {
            for image in &index.images {
                let manifest = (image.manifest.media_type.clone(), image.blob(&image.manifest.digest)?);
                push_image(door, image, name, &image.manifest.digest, &manifest)?;
            }
            let path = index.oci.join("blobs/sha256").join(crate::images::hex(&index.index.digest));
            put_manifest(door, name, tag, &index.index.media_type, &std::fs::read(path)?)
        })?;
        Ok(self.reference(name, tag))
    }

    /// Runs `work` with the address of a second registry on the same storage. That one admits everybody.
    fn upload(&self, work: impl FnOnce(&str) -> Result<()>) -> Result<()> {
        let port = free_port()?;
        let name = format!("door-{port}");
        let lines = format!("http:\n  addr: 127.0.0.1:{port}\n  secret: test\n");
        let _door = spawn(self.directory.path(), &name, &lines)?;
        work(&format!("127.0.0.1:{port}"))
    }

    /// Every request to the registry, oldest first.
    pub fn accesses(&self) -> Vec<LoggedRequest> {
        self.process.log().lines().filter_map(parse_access).collect()
    }

    /// How often a blob was requested by GET with success, in whole or in part.
    pub fn blob_fetches(&self, digest: &str) -> usize {
        let path = format!("/blobs/{digest}");
        let good = |access: &&LoggedRequest| access.method == "GET" && matches!(access.status, 200 | 206 | 307);
        self.accesses().iter().filter(good).filter(|access| access.path.ends_with(&path)).count()
    }

    /// Bytes of blobs that it sent.
    pub fn blob_bytes(&self) -> u64 {
        let blobs = |access: &&LoggedRequest| access.method == "GET" && access.path.contains("/blobs/sha256:");
        self.accesses().iter().filter(blobs).map(|access| access.bytes).sum()
    }

    /// Its process: log, signals (SIGSTOP makes it hang).
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Stops it. Its port refuses connections from then on.
    pub fn stop(&mut self) -> Result<()> {
        self.process.terminate(TIMEOUT).map(drop)
    }

    /// Ends it with SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Starts it again on the same port, with the same storage and settings.
    pub fn restart(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process = launch(self.directory.path(), "registry")?;
        Ok(())
    }
}

/// A TCP port of 127.0.0.1 that is free, outside the range of ports for outgoing connections, and that no other test process is
/// given as long as this one lives.
pub fn free_port() -> Result<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    /// An abstract socket for each port that was given: such a name belongs to one process, and is free again when that ends.
    static RESERVED: Mutex<Vec<UnixDatagram>> = Mutex::new(Vec::new());
    for _ in 0..1000 {
        // Test processes run in parallel, so each one starts at another port.
        let step = u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = 10_000 + (std::process::id().wrapping_mul(7919).wrapping_add(step) % 20_000);
        let port = u16::try_from(port)?;
        let name = SocketAddr::from_abstract_name(format!("cachefs-tests-port-{port}"))?;
        let Ok(reservation) = UnixDatagram::bind_addr(&name) else { continue };
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            RESERVED.lock().unwrap_or_else(PoisonError::into_inner).push(reservation);
            return Ok(port);
        }
    }
    bail!("no port of 127.0.0.1 is free")
}

fn access_lines(access: &Access, directory: &Path, lines: &mut String) -> Result<Option<TokenServer>> {
    match access {
        Access::Anonymous => Ok(None),
        Access::Password { user, password } => {
            let file = directory.join("htpasswd");
            let line = run(Command::new("htpasswd").args(["-Bbn", user, password]))?.ok()?;
            std::fs::write(&file, line)?;
            *lines += &format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", file.display());
            Ok(None)
        }
        Access::Token { user, password } => {
            let server = TokenServer::start(user, password)?;
            let bundle = directory.join("token.pem");
            std::fs::write(&bundle, server.certificate())?;
            *lines += &format!(
                "auth:\n  token:\n    realm: {}\n    service: test-registry\n    issuer: {}\n    rootcertbundle: {}\n",
                server.realm(),
                token::ISSUER,
                bundle.display()
            );
            Ok(Some(server))
        }
    }
}

fn spawn(directory: &Path, name: &str, lines: &str) -> Result<Process> {
    let storage = directory.join("storage");
    let config = format!(
        "version: 0.1\nlog:\n  level: info\n  accesslog:\n    disabled: false\nstorage:\n  delete:\n    enabled: true\n  \
         filesystem:\n    rootdirectory: {}\n{lines}",
        storage.display()
    );
    std::fs::write(directory.join(format!("{name}.yml")), config)?;
    launch(directory, name)
}

fn launch(directory: &Path, name: &str) -> Result<Process> {
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(directory.join(format!("{name}.yml"))).env("OTEL_TRACES_EXPORTER", "none");
    let log = directory.join(format!("{name}.log"));
    let earlier = std::fs::metadata(&log).map_or(0, |status| status.len());
    let mut process = Process::spawn("docker-registry", &mut command, &log)?;
    process.wait_ready(TIMEOUT, || {
        let text = std::fs::read(&log)?;
        let text = String::from_utf8_lossy(&text[usize::try_from(earlier)?.min(text.len())..]);
        Ok(text.contains("listening on"))
    })?;
    Ok(process)
}

fn push_image(
    address: &str,
    image: &ImageFiles,
    name: &str,
    tag: &str,
    (media_type, manifest): &(String, Vec<u8>),
) -> Result<()> {
    put_blob(address, name, &image.config.digest, &image.blob_path(&image.config.digest))?;
    for layer in &image.layers {
        put_blob(address, name, &layer.blob.digest, &image.blob_path(&layer.blob.digest))?;
    }
    put_manifest(address, name, tag, media_type, manifest)
}

fn put_blob(address: &str, name: &str, digest: &str, file: &Path) -> Result<()> {
    let head = http::request(address, "HEAD", &format!("/v2/{name}/blobs/{digest}"), &[], 0, std::io::empty())?;
    if head.status == 200 {
        return Ok(());
    }
    let begun = http::request(address, "POST", &format!("/v2/{name}/blobs/uploads/"), &[], 0, std::io::empty())?;
    let location = begun.head.header("Location").context("the registry gave no place to upload to")?;
    let path = location.trim_start_matches(&format!("http://{address}"));
    let path = format!("{path}{}digest={digest}", if path.contains('?') { '&' } else { '?' });
    let content = std::fs::File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
    let size = content.metadata()?.len();
    let answer = http::request(address, "PUT", &path, &[("Content-Type", "application/octet-stream")], size, content)?;
    if answer.status != 201 {
        bail!("the registry refused {digest}: {} {}", answer.status, String::from_utf8_lossy(&answer.body));
    }
    Ok(())
}

fn put_manifest(address: &str, name: &str, tag: &str, media_type: &str, manifest: &[u8]) -> Result<()> {
    let (path, size) = (format!("/v2/{name}/manifests/{tag}"), manifest.len() as u64);
    let answer = http::request(address, "PUT", &path, &[("Content-Type", media_type)], size, manifest)?;
    if answer.status != 201 {
        bail!("the registry refused the manifest: {} {}", answer.status, String::from_utf8_lossy(&answer.body));
    }
    Ok(())
}

/// Parses a line like `127.0.0.1 - - [time] "GET /v2/ HTTP/1.1" 200 2 "" "agent"`.
fn parse_access(line: &str) -> Option<LoggedRequest> {
    let mut quoted = line.split('"');
    let source = quoted.next()?;
    let mut request = quoted.next()?.split(' ');
    let mut result = quoted.next()?.split_whitespace();
    if !source.contains(" - ") {
        return None;
    }
    Some(LoggedRequest {
        method: request.next()?.to_owned(),
        path: request.next()?.to_owned(),
        status: result.next()?.parse().ok()?,
        bytes: result.next()?.parse().ok()?,
    })
}
