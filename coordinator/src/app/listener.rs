//! Where the coordinator listens: the unix socket, TLS, and plain HTTP on the loopback if that is configured.
//!
//! Every connection carries a [`crate::identity::caller::Peer`] from here on: the user that opened the socket, as the kernel
//! reports it, or the address.
//!
//! - `serving`: from an accepted connection to answered requests, within limits. `timeouts`: how long to wait for a peer.
//!
//! The certificate's files are looked at every [`LOOK`]. A new certificate is served from the next connection on; one that cannot
//! be used is reported, and the old one stays.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use coordinator_api::trust::read_certificates;
use parking_lot::RwLock;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, crypto};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

mod serving;
mod timeouts;

pub use serving::{Door, serve};

/// How often the certificate's files are looked at.
const LOOK: Duration = Duration::from_secs(2);

/// Why listening failed.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The socket or address cannot be used.
    #[error("cannot listen on {address}: {why}")]
    Address {
        /// The socket or address.
        address: String,
        /// Why, and what to do.
        why: String,
    },
    /// The certificate or its key cannot be used.
    #[error("TLS cannot use {} with key {}: {why}", certificate.display(), key.display())]
    Certificate {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// Who may connect to the unix socket at all. What they may do there depends on who they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketAccess {
    /// Its owner and root.
    Owner,
    /// Every user of this machine.
    Everybody,
}

/// Binds the unix socket. A socket that nobody listens on any more is replaced.
pub async fn bind_socket(path: &Path, access: SocketAccess) -> Result<UnixListener, ListenError> {
    let failed = |why: String| ListenError::Address { address: format!("unix:{}", path.display()), why };
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        // Anything else may be somebody's file and must not be removed.
        if !metadata.file_type().is_socket() {
            return Err(failed("there is a file that is no socket; choose another --socket".to_owned()));
        }
        if UnixStream::connect(path).await.is_ok() {
            return Err(failed("another coordinator listens there; choose another --socket".to_owned()));
        }
        std::fs::remove_file(path).map_err(|e| failed(e.to_string()))?;
    }
    let listener = UnixListener::bind(path).map_err(|e| failed(e.to_string()))?;
    let mode = match access {
        SocketAccess::Owner => 0o600,
        SocketAccess::Everybody => 0o666,
    };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(|e| failed(e.to_string()))?;
    tracing::info!("listening on unix:{}", path.display());
    Ok(listener)
}

/// Binds a TCP address.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, ListenError> {
    let failed = |e: io::Error| ListenError::Address { address: address.to_string(), why: e.to_string() };
    TcpListener::bind(address).await.map_err(failed)
}

/// The certificate that is being served, read again when its files change.
#[derive(Debug)]
pub struct Certificate {
    certificate: PathBuf,
    key: PathBuf,
    /// Guards only the pointer.
    served: RwLock<Arc<CertifiedKey>>,
}

/// Modification time and length of both files, which show that they were replaced.
type Stamp = [Option<(SystemTime, u64)>; 2];

impl Certificate {
    /// Reads certificate and key.
    pub fn load(certificate: &Path, key: &Path) -> Result<Certificate, ListenError> {
        let served = RwLock::new(Arc::new(read(certificate, key)?));
        Ok(Certificate { certificate: certificate.to_owned(), key: key.to_owned(), served })
    }

    fn stamp(&self) -> Stamp {
        [&self.certificate, &self.key].map(|path| {
            let found = std::fs::metadata(path).ok()?;
            Some((found.modified().ok()?, found.len()))
        })
    }

    /// Reads both files again. If they cannot be used, the previous certificate stays.
    pub fn reload(&self) -> Result<(), ListenError> {
        let fresh = Arc::new(read(&self.certificate, &self.key)?);
        *self.served.write() = fresh;
        Ok(())
    }

    /// Watches the files until `stop`.
    async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let mut seen = self.stamp();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            let stamp = self.stamp();
            if stamp == seen {
                continue;
            }
            seen = stamp;
            match self.reload() {
                Ok(()) => tracing::info!("TLS serves the new certificate in {}", self.certificate.display()),
                Err(error) => tracing::error!("TLS goes on with the certificate that it had: {error}"),
            }
        }
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.served.read()))
    }
}

fn read(certificate: &Path, key: &Path) -> Result<CertifiedKey, ListenError> {
    let unusable =
        |why: String| ListenError::Certificate { certificate: certificate.to_owned(), key: key.to_owned(), why };
    let chain = read_certificates(certificate).map_err(|error| unusable(error.to_string()))?;
    let bytes = std::fs::read(key).map_err(|error| unusable(format!("the key cannot be read: {error}")))?;
    // The parser's error may quote the key, so it is not shown.
    let key = PrivateKeyDer::from_pem_slice(&bytes)
        .map_err(|_| unusable("the key's file holds no private key in PEM".to_owned()))?;
    CertifiedKey::from_der(chain, key, &crypto::ring::default_provider()).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => unusable("the key is not the certificate's".to_owned()),
        _ => unusable("the key or the certificate is of no kind that can be used".to_owned()),
    })
}

/// An acceptor that does TLS handshakes with `certificate`, whose files are watched until `stop`.
pub fn tls_acceptor(certificate: Certificate, stop: &CancellationToken) -> io::Result<TlsAcceptor> {
    let certificate = Arc::new(certificate);
    let provider = Arc::new(crypto::ring::default_provider());
    let versions = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = versions.map_err(io::Error::other)?.with_no_client_auth();
    let mut config = builder.with_cert_resolver(Arc::clone(&certificate) as _);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    tokio::spawn(certificate.follow(stop.clone()));
    Ok(TlsAcceptor::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn write(directory: &Path) -> (PathBuf, PathBuf, Vec<u8>) {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
        let paths = (directory.join("c.pem"), directory.join("k.pem"));
        std::fs::write(&paths.0, certificate.pem()).unwrap();
        std::fs::write(&paths.1, key.serialize_pem()).unwrap();
        (paths.0, paths.1, certificate.der().to_vec())
    }

    #[test]
    fn a_new_certificate_replaces_the_old_one_unless_it_is_unusable() {
        let directory = tempfile::tempdir().unwrap();
        let (path, key, first) = write(directory.path());
        let certificate = Certificate::load(&path, &key).unwrap();
        let served = || certificate.served.read().cert[0].to_vec();
        assert_eq!(served(), first);
        let (_, _, second) = write(directory.path());
        certificate.reload().unwrap();
        assert_eq!(served(), second);
        std::fs::write(&key, KeyPair::generate().unwrap().serialize_pem()).unwrap();
        let error = certificate.reload().unwrap_err().to_string();
        assert!(error.contains("the key is not the certificate's") && error.contains("c.pem"), "{error}");
        std::fs::write(&key, "no key").unwrap();
        let error = certificate.reload().unwrap_err().to_string();
        assert!(error.contains("holds no private key") && !error.contains("no key\n"), "{error}");
        assert_eq!(served(), second);
    }
}
