//! Whom we trust over TLS: the system's authorities, those of given files, and the servers named there themselves. The
//! coordinator trusts registries by these rules, and clients trust coordinators.
//!
//! Docker's documentation tells the owners of private registries to make a self-signed certificate and to give it to
//! the engine as its own authority. Go accepts such a server; webpki refuses it, because an authority's certificate may
//! not be a server's. It is accepted here if it is byte for byte one of those given, valid now and made out for the server's
//! name.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme,
};

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// A file of them.
    #[error("CA certificates {} cannot be used: {why}; give a readable PEM file", path.display())]
    Certificates {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// All of them together.
    #[error("the CA certificates cannot be used: {0}")]
    Roots(String),
}

/// A TLS configuration that trusts the system and the certificates in the PEM files `paths`, for HTTP/1.1 and HTTP/2.
pub fn client_config(paths: &[PathBuf]) -> Result<ClientConfig, TrustError> {
    // The process needs one provider; whoever comes first installs the same one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut own = Vec::new();
    for path in paths {
        own.extend(read_certificates(path)?);
    }
    let verifier = Verifier::new(own).map_err(|error| TrustError::Roots(error.to_string()))?;
    let dangerous = ClientConfig::builder().dangerous();
    let mut config = dangerous.with_custom_certificate_verifier(Arc::new(verifier)).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// The certificates of one PEM file, at least one.
pub fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TrustError> {
    let unusable = |why: String| TrustError::Certificates { path: path.to_owned(), why };
    let pem = std::fs::read(path).map_err(|error| unusable(error.to_string()))?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match found {
        Ok(found) if found.is_empty() => Err(unusable("it holds no certificate".to_owned())),
        Ok(found) => Ok(found),
        Err(error) => Err(unusable(error.to_string())),
    }
}

/// webpki's rules, and the one exception for certificates that the configuration names.
#[derive(Debug)]
struct Verifier {
    webpki: Arc<WebPkiServerVerifier>,
    named: HashSet<CertificateDer<'static>>,
}

impl Verifier {
    fn new(own: Vec<CertificateDer<'static>>) -> Result<Verifier, Box<dyn std::error::Error>> {
        let mut roots = RootCertStore::empty();
        // What the system has and webpki cannot read is left out, as every other program here does.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            // A machine without the ca-certificates package: Mozilla's list, as of the build.
            roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        }
        for certificate in &own {
            roots.add(certificate.clone())?;
        }
        let webpki = WebPkiServerVerifier::builder(Arc::new(roots)).build()?;
        Ok(Verifier { webpki, named: own.into_iter().collect() })
    }
}

/// Whether the only fault is that the server's certificate could sign others. webpki finds this out after it has checked
/// the time.
fn is_authority_as_server(error: &Error) -> bool {
    match error {
        Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) => {
            inner.downcast_ref() == Some(&webpki::Error::CaUsedAsEndEntity)
        }
        _ => false,
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        server: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match self.webpki.verify_server_cert(server, intermediates, name, ocsp, now) {
            Err(error) if is_authority_as_server(&error) && self.named.contains(server) => {
                verify_server_name(&ParsedCertificate::try_from(server)?, name)?;
                Ok(ServerCertVerified::assertion())
            }
            answer => answer,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        server: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls12_signature(message, server, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        server: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls13_signature(message, server, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

/// What is wrong with a server's certificate, in words.
pub fn explain(error: &CertificateError) -> String {
    match error {
        CertificateError::UnknownIssuer => "its certificate is signed by an authority that is not trusted".to_owned(),
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "its certificate has expired".to_owned(),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "its certificate is not valid yet".to_owned()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "its certificate is made out for another name".to_owned()
        }
        CertificateError::BadSignature => {
            "its certificate is not signed by the authority of that name that is trusted".to_owned()
        }
        CertificateError::Other(_) => "its certificate is self-signed and not among the trusted ones".to_owned(),
        other => format!("its certificate is not valid ({other})"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, date_time_ymd};

    use super::*;

    /// A certificate as `openssl req -x509` makes it: its own authority, for `localhost`, valid in 2026.
    fn self_signed() -> CertificateDer<'static> {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_before = date_time_ymd(2026, 1, 1);
        params.not_after = date_time_ymd(2027, 1, 1);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    fn verify(verifier: &Verifier, server: &CertificateDer<'_>, name: &str, year: u64) -> Result<(), String> {
        let now = UnixTime::since_unix_epoch(Duration::from_secs((year - 1970) * 31_557_600 + 15_000_000));
        let name = ServerName::try_from(name.to_owned()).unwrap();
        match verifier.verify_server_cert(server, &[], &name, &[], now) {
            Ok(_) => Ok(()),
            Err(Error::InvalidCertificate(error)) => Err(explain(&error)),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn a_self_signed_server_is_trusted_if_it_is_named_itself() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (server, other) = (self_signed(), self_signed());
        let verifier = Verifier::new(vec![server.clone()]).unwrap();
        assert_eq!(verify(&verifier, &server, "localhost", 2026), Ok(()));
        let refused = |server, name, year| verify(&verifier, server, name, year).unwrap_err();
        assert_eq!(refused(&server, "elsewhere", 2026), "its certificate is made out for another name");
        assert_eq!(refused(&server, "localhost", 2028), "its certificate has expired");
        assert_eq!(refused(&server, "localhost", 2024), "its certificate is not valid yet");
        assert_eq!(refused(&other, "localhost", 2026), "its certificate is self-signed and not among the trusted ones");
    }

    #[test]
    fn files_without_a_certificate_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        for (text, words) in [("", "holds no certificate"), ("-----BEGIN CERTIFICATE-----\n!\n", "cannot be used")] {
            std::fs::write(&path, text).unwrap();
            let error = client_config(std::slice::from_ref(&path)).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("ca.pem"), "{error}");
        }
    }
}
