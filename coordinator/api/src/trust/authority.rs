//! What Go asks of certificates and webpki does not. A trusted certificate must be valid now, and be that of an
//! authority for servers. A server's certificate must only be signed by one, even if it could sign others itself.

use rustls::pki_types::{CertificateDer, SignatureVerificationAlgorithm, TrustAnchor, UnixTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{ExtendedKeyUsage, GeneralName};
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::X509Version;

/// RSA keys with fewer bits are refused by *ring*, and have been by the world's authorities since 2014.
const LEAST_RSA: usize = 2048;

/// A trusted certificate, read.
#[derive(Debug)]
pub(super) struct Authority {
    /// As webpki knows it.
    anchor: TrustAnchor<'static>,
    certificate: CertificateDer<'static>,
    /// First and last second, since the epoch.
    valid: (i64, i64),
    is_authority: bool,
    is_for_servers: bool,
    /// How many authorities may stand between it and a server.
    path_length: Option<u32>,
}

/// Parses `der`, which must be one certificate and nothing else.
pub(super) fn read<'a>(der: &'a CertificateDer<'_>) -> Option<X509Certificate<'a>> {
    X509Certificate::from_der(der).ok().filter(|(rest, _)| rest.is_empty()).map(|(_, read)| read)
}

impl Authority {
    /// Reads a certificate; `None` if it is not one, or if webpki cannot use it.
    pub(super) fn read(certificate: &CertificateDer<'static>) -> Option<Authority> {
        let read = read(certificate)?;
        let constraints = read.basic_constraints().ok()?.map(|found| found.value);
        let usage = read.key_usage().ok()?.map(|found| found.value);
        let is_authority = match constraints {
            Some(constraints) => constraints.ca,
            None => read.version() != X509Version::V3,
        };
        Some(Authority {
            anchor: webpki::anchor_from_trusted_cert(certificate).ok()?.to_owned(),
            valid: (read.validity().not_before.timestamp(), read.validity().not_after.timestamp()),
            is_authority: is_authority && usage.is_none_or(|usage| usage.key_cert_sign()),
            is_for_servers: is_for_servers(&read),
            path_length: constraints.and_then(|constraints| constraints.path_len_constraint),
            certificate: certificate.clone(),
        })
    }

    /// Whether it may sign others.
    pub(super) fn is_authority(&self) -> bool {
        self.is_authority
    }

    /// The certificate itself.
    pub(super) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The trust anchor for webpki.
    pub(super) fn anchor(&self) -> &TrustAnchor<'static> {
        &self.anchor
    }

    /// Why it does not vouch for a server with so many authorities in between: a phrase about the authority.
    pub(super) fn objection(&self, now: UnixTime, between: usize) -> Option<&'static str> {
        if !is_within(self.valid, now) {
            Some("has expired or is not valid yet")
        } else if !self.is_for_servers {
            Some("is not one for servers")
        } else if self.path_length.is_some_and(|most| between > most as usize) {
            Some("may not stand so far above a server")
        } else {
            None
        }
    }

    /// Whether this authority signed the server's certificate, which may be that of an authority itself, and was
    /// allowed to. False if it limits the names for which it vouches: that is left to webpki.
    pub(super) fn has_signed(
        &self,
        server: &CertificateDer<'_>,
        now: UnixTime,
        algorithms: &[&dyn SignatureVerificationAlgorithm],
    ) -> bool {
        let (Some(server), Ok(own)) = (read(server), webpki::EndEntityCert::try_from(&self.certificate)) else {
            return false;
        };
        // The algorithm inside of what is signed is the same, or webpki would not have read the server's certificate.
        let algorithm = server.signature_algorithm.algorithm.as_bytes();
        let is_meant = |known: &&&dyn SignatureVerificationAlgorithm| {
            known.signature_alg_id().as_ref().get(2..).is_some_and(|known| known.starts_with(algorithm))
        };
        let has_signed = |known: &&dyn SignatureVerificationAlgorithm| {
            own.verify_signature(*known, server.tbs_certificate.as_ref(), &server.signature_value.data).is_ok()
        };
        self.is_authority
            && self.objection(now, 0).is_none()
            && self.anchor.name_constraints.is_none()
            && own.subject() == issuer_of(&server)
            && algorithms.iter().filter(is_meant).any(has_signed)
    }
}

/// Checks that a server's certificate is valid now, and for servers.
pub(super) fn is_usable(server: &CertificateDer<'_>, now: UnixTime) -> Result<(), Unusable> {
    let read = read(server).ok_or(Unusable::Purpose)?;
    let valid = (read.validity().not_before.timestamp(), read.validity().not_after.timestamp());
    match now.as_secs().cast_signed() {
        now if now < valid.0 => Err(Unusable::NotYet),
        now if now > valid.1 => Err(Unusable::Expired),
        _ if !is_for_servers(&read) => Err(Unusable::Purpose),
        _ => Ok(()),
    }
}

/// Why a certificate cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unusable {
    /// It is not valid yet.
    NotYet,
    /// It has expired.
    Expired,
    /// It is for something else.
    Purpose,
}

/// Whether a server's certificate has a wildcard right below a top-level domain that covers `name`: `*.lan` for
/// `r.lan`. webpki refuses such wildcards; Go does not, and private networks have them.
pub(super) fn is_for_all_below(server: &CertificateDer<'_>, name: &str) -> bool {
    let Some((label, domain)) = name.split_once('.').filter(|(_, domain)| !domain.contains('.')) else { return false };
    let Some(read) = read(server) else { return false };
    let Ok(Some(names)) = read.subject_alternative_name() else { return false };
    let is_it = |own: &GeneralName<'_>| match own {
        GeneralName::DNSName(own) => own.strip_prefix("*.").is_some_and(|own| own.eq_ignore_ascii_case(domain)),
        _ => false,
    };
    !label.is_empty() && !domain.is_empty() && names.value.general_names.iter().any(is_it)
}

/// The bits of an RSA key that is too short; `None` for any other key.
pub(super) fn short_rsa(certificate: &CertificateDer<'_>) -> Option<usize> {
    let read = read(certificate)?;
    match read.public_key().parsed() {
        Ok(PublicKey::RSA(key)) if key.key_size() < LEAST_RSA => Some(key.key_size()),
        _ => None,
    }
}

/// Whether `signer` has the name of the issuer of `signed`.
pub(super) fn may_have_signed(signer: &CertificateDer<'_>, signed: &CertificateDer<'_>) -> bool {
    match (read(signer), read(signed)) {
        (Some(signer), Some(signed)) => signer.subject().as_raw() == signed.issuer().as_raw(),
        _ => false,
    }
}

/// The name of a certificate's issuer, without the header of the sequence: as webpki gives names.
fn issuer_of<'a>(certificate: &'a X509Certificate<'_>) -> &'a [u8] {
    without_header(certificate.issuer().as_raw())
}

/// The contents of a DER sequence. Its length takes one byte, or that byte says how many bytes follow that give it.
fn without_header(der: &[u8]) -> &[u8] {
    let more = der.get(1).filter(|length| **length >= 0x80).map_or(0, |length| usize::from(length & 0x7f));
    der.get(2 + more..).unwrap_or_default()
}

/// Whether a certificate may be used by servers: it is for them, for any use, or does not say.
fn is_for_servers(certificate: &X509Certificate<'_>) -> bool {
    let serves = |usage: &ExtendedKeyUsage<'_>| usage.any || usage.server_auth;
    match certificate.extended_key_usage() {
        Ok(usage) => usage.is_none_or(|found| serves(found.value)),
        Err(_) => false,
    }
}

fn is_within((first, last): (i64, i64), now: UnixTime) -> bool {
    (first..=last).contains(&now.as_secs().cast_signed())
}
