//! Errors of registries and archives, named for what a person can do about them.
//!
//! Reasons, media types and names may be a registry's own words, so characters that could deceive are escaped when they are printed.

use coordinator_api::printable::printable;
use store::Digest;

/// A failure to get something from a registry or an archive; cloneable, because several jobs may wait for one fetch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// The registry does not know the repository or tag.
    #[error("registry {registry} has no image {}: check the name and the tag", printable(image))]
    UnknownImage {
        /// The registry's host.
        registry: String,
        /// The image as it was asked for.
        image: String,
    },
    /// The registry knows the image but not this blob of it.
    #[error("registry {registry} lacks {}: push the image again", printable(what))]
    MissingBlob {
        /// The registry's host.
        registry: String,
        /// The blob.
        what: String,
    },
    /// An error, together with the registry's own explanation.
    #[error("{error}; the registry says: {}", printable(said))]
    Explained {
        /// The error.
        error: Box<RegistryError>,
        /// The registry's explanation.
        said: String,
    },
    /// 401 or 403, although the best credentials at hand were sent.
    #[error("registry {registry} refuses {image} to {}: {remedy}", printable(who))]
    Denied {
        /// The registry's host.
        registry: String,
        /// The image.
        image: String,
        /// The user that was refused.
        who: String,
        /// What to do.
        remedy: String,
    },
    /// The stored credentials cannot be read.
    #[error("the credentials for {registry} cannot be read: {}", printable(why))]
    Credentials {
        /// The registry's host.
        registry: String,
        /// What is wrong with them.
        why: String,
    },
    /// No connection.
    #[error("cannot reach registry {registry}: {}; is it running, and is the name right?", printable(why))]
    Unreachable {
        /// The registry's host.
        registry: String,
        /// What the system says.
        why: String,
    },
    /// The registry was reached, but it does not speak TLS or is not trusted.
    #[error(
        "no trusted connection to registry {registry}: {}; add its CA to ca_certificates or certs_d or, for plain HTTP, the \
         registry to insecure_registries",
        printable(why)
    )]
    Tls {
        /// The registry's host.
        registry: String,
        /// What TLS says.
        why: String,
    },
    /// The registry speaks TLS, but the handshake fails.
    #[error("registry {registry} cannot be spoken to over TLS: {}", printable(why))]
    Handshake {
        /// The registry's host.
        registry: String,
        /// What is missing, and what to do.
        why: String,
    },
    /// The certificates that are configured for the registry cannot be used.
    #[error("the certificates for registry {registry} cannot be used: {}", printable(why))]
    Certificates {
        /// The registry's host.
        registry: String,
        /// The file, what is wrong with it, and what to do.
        why: String,
    },
    /// The registry leads to a place where requests may not go.
    #[error(
        "registry {registry} leads to {}, which is not followed: {}; check the registry's storage and token settings",
        printable(to),
        printable(why)
    )]
    Led {
        /// The registry's host.
        registry: String,
        /// The host that it leads to.
        to: String,
        /// Why it is not followed.
        why: String,
    },
    /// 429 for longer than a request waits.
    #[error(
        "registry {registry} limits requests ({status}) and {patience}: try again later or log in to raise the limit"
    )]
    Limited {
        /// The registry's host.
        registry: String,
        /// The HTTP status.
        status: u16,
        /// How long the registry asks to wait, or how often it was tried.
        patience: String,
    },
    /// No request is sent, because the registry failed too often, asked for a pause, or its limits are used up.
    #[error("registry {registry} is not asked before {until}: {}; try again then", printable(why))]
    Postponed {
        /// The registry's host.
        registry: String,
        /// Until when requests are held back.
        until: jiff::Timestamp,
        /// Why they are held back.
        why: String,
    },
    /// A fault of the registry that did not go away.
    #[error("registry {registry} fails on {} after {attempts} attempts: {}", printable(what), printable(why))]
    Failing {
        /// The registry's host.
        registry: String,
        /// What was requested.
        what: String,
        /// The number of attempts.
        attempts: u32,
        /// The last answer.
        why: String,
    },
    /// An answer that breaks the protocol.
    #[error("registry {registry} gives an unusable answer on {}: {}", printable(what), printable(why))]
    BadAnswer {
        /// The registry's host.
        registry: String,
        /// What was requested.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// A media type that is no image manifest, config or layer that can be stored.
    #[error("unsupported media type {} of {}{hint}", printable(media_type), printable(what))]
    Unsupported {
        /// The media type.
        media_type: String,
        /// The object.
        what: String,
        /// What to do, from the comma or colon on; may be empty.
        hint: &'static str,
    },
    /// The image exists, but not for this platform.
    #[error("image {image} does not exist for {wanted}: it is offered for {}", printable(offered))]
    NoPlatform {
        /// The image.
        image: String,
        /// The platform that was asked for.
        wanted: String,
        /// The platforms that exist.
        offered: String,
    },
    /// Bytes that do not match their digest.
    #[error(
        "{} has digest {actual} instead of {expected}: what the registry sends is damaged or forged; push the image again",
        printable(what)
    )]
    DigestMismatch {
        /// The object.
        what: String,
        /// The digest that was asked for.
        expected: Digest,
        /// The digest of what was received.
        actual: Digest,
    },
    /// More bytes than announced.
    #[error("{} claims {claimed} bytes but sends more than {limit}: push the image again", printable(what))]
    TooLong {
        /// The object.
        what: String,
        /// The size in its descriptor.
        claimed: u64,
        /// The most bytes that are read.
        limit: u64,
    },
    /// Fewer bytes than announced.
    #[error("{} claims {claimed} bytes but ends after {received}: push the image again", printable(what))]
    TooShort {
        /// The object.
        what: String,
        /// The size in its descriptor.
        claimed: u64,
        /// The number of bytes received.
        received: u64,
    },
    /// A document that is not JSON of the expected shape, or breaks another rule.
    #[error("{} cannot be understood: {}", printable(what), printable(why))]
    Malformed {
        /// The object.
        what: String,
        /// The rule it breaks.
        why: String,
    },
    /// An archive that cannot be loaded.
    #[error("the archive cannot be loaded: {}", printable(why))]
    Archive {
        /// What is wrong, and what to do.
        why: String,
    },
}

impl RegistryError {
    /// Whether the registry denied access, with or without an explanation.
    pub fn is_denial(&self) -> bool {
        match self {
            RegistryError::Explained { error, .. } => error.is_denial(),
            error => matches!(error, RegistryError::Denied { .. }),
        }
    }
}

#[cfg(test)]
mod tests {
    use coordinator_api::printable::is_deceptive;

    use super::*;

    #[test]
    fn a_registrys_own_words_are_printed_escaped() {
        let (registry, evil) = ("r.io".to_owned(), || "x\u{1b}[2J\r\nforged\u{202e}\u{9b}".to_owned());
        let (what, why) = (evil(), evil());
        let digest = Digest::of(b"x");
        for error in [
            RegistryError::BadAnswer { registry: registry.clone(), what: what.clone(), why: why.clone() },
            RegistryError::Failing { registry: registry.clone(), what: what.clone(), attempts: 1, why: why.clone() },
            RegistryError::Led { registry: registry.clone(), to: evil(), why: why.clone() },
            RegistryError::Unreachable { registry: registry.clone(), why: why.clone() },
            RegistryError::Tls { registry: registry.clone(), why: why.clone() },
            RegistryError::Handshake { registry: registry.clone(), why: why.clone() },
            RegistryError::Certificates { registry: registry.clone(), why: why.clone() },
            RegistryError::MissingBlob { registry: registry.clone(), what: what.clone() },
            RegistryError::Unsupported { media_type: evil(), what: what.clone(), hint: "" },
            RegistryError::NoPlatform { image: "a".to_owned(), wanted: "b".to_owned(), offered: evil() },
            RegistryError::DigestMismatch { what: what.clone(), expected: digest, actual: digest },
            RegistryError::TooLong { what: what.clone(), claimed: 1, limit: 2 },
            RegistryError::TooShort { what: what.clone(), claimed: 1, received: 0 },
            RegistryError::Malformed { what: what.clone(), why: why.clone() },
            RegistryError::Archive { why: why.clone() },
            RegistryError::Explained { error: Box::new(RegistryError::Archive { why: why.clone() }), said: evil() },
        ] {
            let text = error.to_string();
            assert!(!text.chars().any(is_deceptive) && text.contains("\\u{1b}[2J\\r\\nforged\\u{202e}"), "{text}");
        }
    }
}
