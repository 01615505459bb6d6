//! Where the coordinator listens: the unix socket, TLS, and the loopback in the clear if it was told to.
//!
//! Every connection carries a [`crate::identity::caller::Peer`] from here on: who opened the socket, as the kernel says, or from which address.
//!
//! - `serving`: from an accepted connection to answered requests, within limits. `patience`: how long a peer is waited for.
//!
//! The certificate is looked at every [`LOOK`]; a new one serves from the next connection on, one that cannot be used is reported
//! and the old one stays.

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

/// Why there is no listening.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address.
    #[error("cannot listen on {address}: {why}")]
    Address {
        /// The socket or address.
        address: String,
        /// Why, and what to do.
        why: String,
    },
    /// The certificate or its key.
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

/// Who may connect to the unix socket at all; what they may do there is decided by who they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketAccess {
    /// Its owner and root.
    Owner,
    /// Every user of this machine.
    Everybody,
}

/// Binds the unix socket. One that nobody listens on any more is replaced.
pub async fn bind_socket(path: &Path, access: SocketAccess) -> Result<UnixListener, ListenError> {
    let failed = |why: String| ListenError::Address { address: format!("unix:{}", path.display()), why };
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        // Whatever else lies there is somebody's, who did not mean it to be removed.
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

/// The certificate that is served now.
#[derive(Debug)]
pub struct Certificate {
    certificate: PathBuf,
    key: PathBuf,
    /// Guards the pointer only.
    served: RwLock<Arc<CertifiedKey>>,
}

/// What changes when somebody puts other files there.
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

    /// Reads both again; what was served before stays if they cannot be used.
    pub fn reload(&self) -> Result<(), ListenError> {
        let fresh = Arc::new(read(&self.certificate, &self.key)?);
        *self.served.write() = fresh;
        Ok(())
    }

    /// Follows the files until `stop`.
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
    // What a parser says of a key may quote it.
    let key = PrivateKeyDer::from_pem_slice(&bytes)
        .map_err(|_| unusable("the key's file holds no private key in PEM".to_owned()))?;
    CertifiedKey::from_der(chain, key, &crypto::ring::default_provider()).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => unusable("the key is not the certificate's".to_owned()),
        _ => unusable("the key or the certificate is of no kind that can be used".to_owned()),
    })
}

/// What brings connections through the TLS handshake with `certificate`, whose files are followed until `stop`.
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
