//! Classifies a failed request by the chain of causes that the HTTP client gives.

use std::error::Error as StdError;
use std::io;

use coordinator_api::trust::explain;

use crate::registries::oci::egress::Forbidden;
use crate::registries::oci::raw_target::ExactError;

/// What kind of transport failure this is.
#[derive(Debug)]
pub(super) enum Fault {
    /// The peer speaks TLS but is not trusted, or does not trust us.
    Certificate(String),
    /// The peer speaks TLS, but asks for something that is not supported, or refuses what is offered.
    Handshake(String),
    /// The peer's answer is not TLS.
    NotTls(String),
    /// The peer hangs up on a TLS greeting.
    HungUp(String),
    /// A registry led to where it must not.
    Forbidden(Forbidden),
    /// No connection, or a broken one.
    Connection(String),
}

/// The causes of an error, outermost first, looking into `io::Error`s, which hide theirs.
fn causes<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn StdError + 'static)| {
        let error: &'a (dyn StdError + 'static) = *error;
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        match inner {
            Some(inner) => Some(inner as &(dyn StdError + 'static)),
            None => error.source(),
        }
    })
}

/// The innermost cause in words: outer layers only repeat that there was an error (and the URL, which may be signed).
pub(super) fn root_cause(error: &(dyn StdError + 'static)) -> String {
    causes(error).last().map(ToString::to_string).unwrap_or_default()
}

/// An error of one of the HTTP clients.
pub(super) trait Failure: StdError + 'static {
    /// Whether there is no connection.
    fn is_connect(&self) -> bool;
    /// Whether nothing came in time.
    fn is_timeout(&self) -> bool;
}

impl Failure for reqwest::Error {
    fn is_connect(&self) -> bool {
        reqwest::Error::is_connect(self)
    }

    fn is_timeout(&self) -> bool {
        reqwest::Error::is_timeout(self)
    }
}

impl Failure for ExactError {
    fn is_connect(&self) -> bool {
        matches!(self, ExactError::Failed(error) if error.is_connect())
    }

    fn is_timeout(&self) -> bool {
        let is_late = |error: &io::Error| error.kind() == io::ErrorKind::TimedOut;
        matches!(self, ExactError::Silent) || causes(self).filter_map(|cause| cause.downcast_ref()).any(is_late)
    }
}

/// Why a handshake failed, and what to do.
fn handshake(error: &rustls::Error) -> String {
    use rustls::{AlertDescription as Alert, Error, PeerIncompatible};
    match error {
        Error::AlertReceived(Alert::CertificateRequired) => {
            "it wants a certificate of ours: put NAME.cert and NAME.key for it into its directory of certs_d".to_owned()
        }
        Error::AlertReceived(
            alert @ (Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::AccessDenied),
        ) => format!("it refuses our certificate ({alert:?}): look at NAME.cert in its directory of certs_d"),
        Error::AlertReceived(Alert::ProtocolVersion)
        | Error::PeerIncompatible(PeerIncompatible::ServerDoesNotSupportTls12Or13) => {
            "it knows TLS 1.0 and 1.1 alone, which are not safe: let it speak TLS 1.2 or 1.3".to_owned()
        }
        Error::AlertReceived(Alert::HandshakeFailure | Alert::InsufficientSecurity | Alert::IllegalParameter)
        | Error::PeerIncompatible(_) => {
            "it has no cipher suite or kind of key in common with us: let it offer ECDHE with AES-GCM or ChaCha20, and a key of \
             RSA, ECDSA or Ed25519; if it wants a certificate of ours, put NAME.cert and NAME.key into its directory of certs_d"
                .to_owned()
        }
        other => format!("the handshake fails ({other})"),
    }
}

/// Classifies an error.
pub(super) fn fault(error: &impl Failure) -> Fault {
    let why = root_cause(error);
    if let Some(forbidden) = causes(error).find_map(|cause| cause.downcast_ref::<Forbidden>()) {
        return Fault::Forbidden(forbidden.clone());
    }
    if let Some(tls) = causes(error).find_map(|cause| cause.downcast_ref::<rustls::Error>()) {
        return match tls {
            rustls::Error::InvalidMessage(_) => Fault::NotTls("it does not speak TLS".to_owned()),
            rustls::Error::InvalidCertificate(reason) => Fault::Certificate(explain(reason)),
            other => Fault::Handshake(handshake(other)),
        };
    }
    // A peer that hangs up on a TLS greeting does not speak TLS either.
    let hung_up = causes(error)
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|error| matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset));
    if error.is_connect() && hung_up {
        Fault::HungUp(why)
    } else if error.is_timeout() {
        Fault::Connection("it does not answer in time".to_owned())
    } else {
        Fault::Connection(why)
    }
}
