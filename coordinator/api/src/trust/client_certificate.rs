//! Client certificates, shown to servers that ask for one: a file `NAME.cert` with the certificate and those between it
//! and its authority, and `NAME.key` with its private key.
//!
//! As in Go, a server is shown the first certificate that it would accept. A server that names no authorities is shown
//! the first one.

use std::path::Path;
use std::sync::Arc;

use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem};
use rustls::sign::CertifiedKey;

use crate::trust::authority;

/// A certificate and its private key.
#[derive(Debug, Clone)]
pub struct ClientCertificate {
    certified: Arc<CertifiedKey>,
    /// The issuers' names in its chain, as servers write them.
    issuers: Vec<Vec<u8>>,
}

impl ClientCertificate {
    /// Joins the contents of two files; the error names the file at fault.
    pub(super) fn read(
        certificate: (&Path, &[u8]),
        key: (&Path, &[u8]),
        provider: &CryptoProvider,
    ) -> Result<ClientCertificate, String> {
        let chain: Result<Vec<CertificateDer<'static>>, _> = CertificateDer::pem_slice_iter(certificate.1).collect();
        let file = certificate.0.display();
        let chain = chain.map_err(|error| format!("{file} cannot be read as PEM: {error}"))?;
        let first = chain.first().ok_or(format!("{file} holds no certificate in PEM"))?;
        let read = authority::read(first).ok_or(format!("{file} holds something that is no certificate"))?;
        let spki = read.public_key().raw.to_vec();
        let file = key.0.display();
        let signing = provider.key_provider.load_private_key(private_key(key.0, key.1)?);
        let signing = signing.map_err(|_| {
            format!(
                "{file} holds a private key of a kind that is not known here: it takes RSA of 2048 to 4096 bits, \
                     ECDSA on P-256, P-384 or P-521, and Ed25519"
            )
        })?;
        if signing.public_key().is_some_and(|own| own.as_ref() != spki) {
            return Err(format!("{file} is not the private key of the certificate {}", certificate.0.display()));
        }
        let issuers = chain.iter().filter_map(authority::read).map(|read| read.issuer().as_raw().to_vec()).collect();
        Ok(ClientCertificate { certified: Arc::new(CertifiedKey::new(chain.clone(), signing)), issuers })
    }

    /// Whether a server that trusts these authorities (none: it does not say which) would accept it.
    fn is_wanted(&self, authorities: &[&[u8]], schemes: &[SignatureScheme]) -> bool {
        let is_known = authorities.is_empty() || self.issuers.iter().any(|own| authorities.contains(&own.as_slice()));
        is_known && self.certified.key.choose_scheme(schemes).is_some()
    }
}

/// The first private key of a file.
fn private_key(path: &Path, text: &[u8]) -> Result<PrivateKeyDer<'static>, String> {
    let file = path.display();
    PrivateKeyDer::from_pem_slice(text).map_err(|error| match error {
        pem::Error::NoItemsFound if is_encrypted(text) => {
            format!("the private key in {file} is encrypted: give it without a passphrase, in a file that only the coordinator may read")
        }
        pem::Error::NoItemsFound => format!("{file} holds no private key in PEM"),
        other => format!("{file} cannot be read as PEM: {other}"),
    })
}

fn is_encrypted(text: &[u8]) -> bool {
    String::from_utf8_lossy(text).contains("BEGIN ENCRYPTED PRIVATE KEY")
}

/// Chooses among all client certificates.
#[derive(Debug)]
pub(super) struct Choice(pub(super) Vec<ClientCertificate>);

impl ResolvesClientCert for Choice {
    fn resolve(&self, authorities: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let wanted = self.0.iter().find(|own| own.is_wanted(authorities, schemes));
        wanted.map(|own| Arc::clone(&own.certified))
    }

    fn has_certs(&self) -> bool {
        !self.0.is_empty()
    }
}
