//! Trust over TLS: the system's authorities, those in given files, and servers whose own certificates are in those
//! files; and the certificates shown to servers. The coordinator trusts registries by these rules, and clients trust
//! coordinators.
//!
//! Go's behaviour is the reference, because that is what docker's users have. webpki checks the chain; this module adds
//! what webpki does not do:
//!
//! - A server's certificate that is byte for byte a trusted one is accepted if it is valid now, for servers, and issued
//!   for the server's name. Docker's documentation tells the owners of private registries to make such a certificate
//!   and to give it to the engine.
//! - A server's certificate that could sign others itself is accepted if a trusted authority signed it directly.
//! - A trusted certificate vouches for others only if it is an authority's, for servers, valid now, and no further
//!   above them than it says.
//!
//! - `curves`: the algorithms. `authority`: what certificates say. `client_certificate`: what is shown to servers that
//!   ask.

use std::cell::Cell;
use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, SignatureVerificationAlgorithm, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme,
};

use authority::{Authority, Unusable};

mod authority;
mod client_certificate;
mod curves;

pub use client_certificate::ClientCertificate;

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// A file of certificates.
    #[error("CA certificates {} cannot be used: {why}; give a readable PEM file", path.display())]
    Certificates {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// All certificates together.
    #[error("the CA certificates cannot be used: {0}")]
    Roots(String),
}

/// A TLS configuration that trusts the system and the certificates in the PEM files `paths`, for HTTP/1.1 and HTTP/2.
pub fn client_config(paths: &[PathBuf]) -> Result<ClientConfig, TrustError> {
    let mut own = Vec::new();
    for path in paths {
        own.extend(read_certificates(path)?);
    }
    config_with(own, Vec::new())
}

/// Like [`client_config`], with certificates that were read already, and with certificates to show to servers that ask.
pub fn config_with(
    trusted: Vec<CertificateDer<'static>>,
    shown: Vec<ClientCertificate>,
) -> Result<ClientConfig, TrustError> {
    // The first caller installs the provider that the process uses where none is named.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let failed = |error: Error| TrustError::Roots(error.to_string());
    let verifier = Verifier::new(trusted).map_err(|error| TrustError::Roots(error.to_string()))?;
    let builder = ClientConfig::builder_with_provider(curves::provider());
    let builder = builder.with_safe_default_protocol_versions().map_err(failed)?.dangerous();
    let builder = builder.with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = if shown.is_empty() {
        builder.with_no_client_auth()
    } else {
        builder.with_client_cert_resolver(Arc::new(client_certificate::Choice(shown)))
    };
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

/// The certificates in a PEM text that can be trusted; anything else in it is passed over, as Go does.
pub fn certificates_in(pem: &[u8]) -> Vec<CertificateDer<'static>> {
    let found = CertificateDer::pem_reader_iter(pem).flatten();
    found.filter(|certificate| Authority::read(certificate).is_some()).collect()
}

/// A certificate to show, with those between it and its authority, and its private key: the path and the contents of
/// both files. The error is a sentence that names the file at fault.
pub fn client_certificate(certificate: (&Path, &[u8]), key: (&Path, &[u8])) -> Result<ClientCertificate, String> {
    ClientCertificate::read(certificate, key, &curves::provider())
}

/// webpki's rules, and what this module adds to them.
#[derive(Debug)]
struct Verifier {
    webpki: Arc<WebPkiServerVerifier>,
    roots: Arc<RootCertStore>,
    trusted: Vec<Authority>,
    named: HashSet<CertificateDer<'static>>,
}

impl Verifier {
    fn new(own: Vec<CertificateDer<'static>>) -> Result<Verifier, Box<dyn std::error::Error>> {
        let (mut roots, mut trusted) = (RootCertStore::empty(), Vec::new());
        let native = rustls_native_certs::load_native_certs().certs;
        for certificate in &native {
            match Authority::read(certificate) {
                Some(read) => trusted.push(read),
                // A system certificate that cannot be read here is left to webpki, which ignores it if it cannot read
                // it either.
                None => {
                    roots.add_parsable_certificates([certificate.clone()]);
                }
            }
        }
        if native.is_empty() {
            // A machine without the ca-certificates package: Mozilla's list, as of the build.
            roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        }
        for certificate in &own {
            trusted.push(Authority::read(certificate).ok_or("one of them is no certificate")?);
        }
        roots.extend(trusted.iter().filter(|read| read.is_authority()).map(|read| read.anchor().clone()));
        let roots = Arc::new(roots);
        let webpki = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), curves::provider()).build()?;
        Ok(Verifier { webpki, roots, trusted, named: native.into_iter().chain(own).collect() })
    }

    /// Checks validity, purpose and name of a server's certificate that is trusted already.
    fn by_itself(server: &CertificateDer<'_>, name: &ServerName<'_>, now: UnixTime) -> Result<(), Error> {
        let parsed = ParsedCertificate::try_from(server)?;
        authority::is_usable(server, now).map_err(|why| match why {
            Unusable::NotYet => CertificateError::NotValidYet,
            Unusable::Expired => CertificateError::Expired,
            Unusable::Purpose => CertificateError::InvalidPurpose,
        })?;
        if is_for_all(server, name) { Ok(()) } else { verify_server_name(&parsed, name) }
    }

    /// Looks for a chain to a trusted certificate that has no objection. webpki has found that there are chains.
    fn by_authority(
        &self,
        server: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let parsed = webpki::EndEntityCert::try_from(server).map_err(|_| CertificateError::BadEncoding)?;
        let objection = Cell::new(None);
        let fits = |path: &webpki::VerifiedPath<'_>| {
            let number = path.intermediate_certificates().count();
            let known = self.trusted.iter().filter(|trusted| trusted.anchor() == path.anchor());
            // Two certificates may have the same name and key: after a renewal, for example.
            let objections: Vec<_> = known.map(|trusted| trusted.objection(now, number)).collect();
            match objections.first() {
                Some(first) if !objections.contains(&None) => {
                    objection.set(*first);
                    Err(webpki::Error::UnknownIssuer)
                }
                _ => Ok(()),
            }
        };
        let usage = webpki::KeyUsage::server_auth();
        let found = parsed.verify_for_usage(algorithms(), &self.roots.roots, between, now, usage, None, Some(&fits));
        match (found, objection.get()) {
            (Ok(_), _) => Ok(()),
            (Err(_), why) => Err(Refusal::Authority(why.unwrap_or("does not vouch for it")).into()),
        }
    }

    /// The same refusal, or a clearer one.
    fn refusal(&self, error: Error, server: &CertificateDer<'_>, between: &[CertificateDer<'_>]) -> Error {
        let is_unsigned = matches!(error, Error::InvalidCertificate(CertificateError::BadSignature));
        let signers = between.iter().chain(self.trusted.iter().map(|trusted| trusted.certificate()));
        let mut signers = signers.filter(|signer| authority::may_have_signed(signer, server));
        match signers.find_map(authority::short_rsa) {
            Some(bits) if is_unsigned => {
                Refusal::ShortKey { whose: "the key of its certificate's authority", bits }.into()
            }
            _ => error,
        }
    }

    /// The refusal of a signature, with a clearer reason if there is one.
    fn signature(server: &CertificateDer<'_>, error: Error) -> Error {
        match authority::short_rsa(server) {
            Some(bits) => Refusal::ShortKey { whose: "its certificate's key", bits }.into(),
            None => error,
        }
    }
}

/// The algorithms that signatures may have.
fn algorithms() -> &'static [&'static dyn SignatureVerificationAlgorithm] {
    curves::provider().signature_verification_algorithms.all
}

/// What is wrong with a certificate, where rustls has no error for it.
#[derive(Debug)]
enum Refusal {
    /// What is wrong with its authority's certificate.
    Authority(&'static str),
    /// An RSA key is too short.
    ShortKey { whose: &'static str, bits: usize },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Authority(why) => write!(f, "the trusted authority that signed its certificate {why}"),
            Refusal::ShortKey { whose, bits } => {
                write!(f, "{whose} has {bits} bits, and RSA with fewer than 2048 is not safe: make a longer one")
            }
        }
    }
}

impl std::error::Error for Refusal {}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Error {
        Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refusal))))
    }
}

/// Whether a wildcard that webpki refuses covers a name.
fn is_for_all(server: &CertificateDer<'_>, name: &ServerName<'_>) -> bool {
    matches!(name, ServerName::DnsName(name) if authority::is_for_all_below(server, name.as_ref()))
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
        if self.named.contains(server) {
            Verifier::by_itself(server, name, now)?;
            return Ok(ServerCertVerified::assertion());
        }
        match self.webpki.verify_server_cert(server, intermediates, name, ocsp, now) {
            Ok(_) => self.by_authority(server, intermediates, now)?,
            Err(error) if is_authority_as_server(&error) => {
                let has_signed = |trusted: &Authority| trusted.has_signed(server, now, algorithms());
                if !self.trusted.iter().any(has_signed) {
                    return Err(error);
                }
                Verifier::by_itself(server, name, now)?;
            }
            // webpki looks at names last: everything else is right.
            Err(Error::InvalidCertificate(CertificateError::NotValidForNameContext { .. }))
                if is_for_all(server, name) =>
            {
                self.by_authority(server, intermediates, now)?;
            }
            Err(error) => return Err(self.refusal(error, server, intermediates)),
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        server: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let verified = self.webpki.verify_tls12_signature(message, server, signed);
        verified.map_err(|error| Verifier::signature(server, error))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        server: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let verified = self.webpki.verify_tls13_signature(message, server, signed);
        verified.map_err(|error| Verifier::signature(server, error))
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
        CertificateError::NotValidForNameContext { presented, .. } if presented.is_empty() => {
            "its certificate names no host: it needs a subjectAltName, for a common name does not count".to_owned()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "its certificate is made out for another name".to_owned()
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "its certificate is not one for servers".to_owned()
        }
        CertificateError::BadSignature => {
            "its certificate is not signed by the authority of that name that is trusted".to_owned()
        }
        CertificateError::UnsupportedSignatureAlgorithmContext { .. }
        | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            "its certificate is signed in a way that is not safe or not known, such as with SHA-1".to_owned()
        }
        CertificateError::Other(OtherError(inner)) => match inner.downcast_ref::<Refusal>() {
            Some(refusal) => refusal.to_string(),
            None if inner.downcast_ref() == Some(&webpki::Error::CaUsedAsEndEntity) => {
                "its certificate is an authority's, and neither it nor one that signed it is among the trusted ones"
                    .to_owned()
            }
            None => format!("its certificate is not valid ({inner})"),
        },
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
        assert!(
            refused(&other, "localhost", 2026).contains("neither it nor one that signed it is among the trusted ones")
        );
    }

    #[test]
    fn an_authority_vouches_while_it_is_valid_and_a_wildcard_is_one_label() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_before = date_time_ymd(2026, 1, 1);
        params.not_after = date_time_ymd(2027, 1, 1);
        let issuer = rcgen::CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        // The server's certificate is valid for longer.
        let server = CertificateParams::new(vec!["*.r.test".to_owned()]).unwrap();
        let server = server.signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap();
        let verifier = Verifier::new(vec![issuer.der().clone()]).unwrap();
        assert_eq!(verify(&verifier, server.der(), "a.r.test", 2026), Ok(()));
        for name in ["r.test", "a.b.r.test", "a.test"] {
            let refused = verify(&verifier, server.der(), name, 2026).unwrap_err();
            assert_eq!(refused, "its certificate is made out for another name", "{name}");
        }
        let lan = CertificateParams::new(vec!["*.lan".to_owned()]).unwrap();
        let lan = lan.signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap();
        assert_eq!(verify(&verifier, lan.der(), "R.lan", 2026), Ok(()));
        for name in ["lan", "a.b.lan", "r.lan.test", "r.wan"] {
            assert!(verify(&verifier, lan.der(), name, 2026).is_err(), "{name}");
        }
        assert!(verify(&verifier, lan.der(), "r.lan", 2028).unwrap_err().contains("authority"));
        let expired = verify(&verifier, server.der(), "a.r.test", 2028).unwrap_err();
        assert_eq!(expired, "the trusted authority that signed its certificate has expired or is not valid yet");
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
