//! What can go wrong between us and a registry, named for what a person can do about it.

use store::Digest;

/// A failure to get something from a registry or an archive; cloneable, because several jobs may wait for one fetch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// The registry does not know the repository or tag.
    #[error("registry {registry} has no image {image}: check the name and the tag")]
    UnknownImage {
        /// The registry's host.
        registry: String,
        /// The image as it was asked for.
        image: String,
    },
    /// The registry knows the image but not this blob of it.
    #[error("registry {registry} lacks {what}: push the image again")]
    MissingBlob {
        /// The registry's host.
        registry: String,
        /// The blob.
        what: String,
    },
    /// 401 or 403, after our best credentials were shown.
    #[error("registry {registry} refuses {image} to {who}: {remedy}")]
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
    #[error("the credentials for {registry} cannot be read: {why}")]
    Credentials {
        /// The registry's host.
        registry: String,
        /// What is wrong with them.
        why: String,
    },
    /// No connection.
    #[error("cannot reach registry {registry}: {why}; is it running, and is the name right?")]
    Unreachable {
        /// The registry's host.
        registry: String,
        /// What the system says.
        why: String,
    },
    /// A connection, but no trust.
    #[error(
        "no trusted connection to registry {registry}: {why}; add its CA to ca_certificates or, for plain HTTP, the \
         registry to insecure_registries"
    )]
    Tls {
        /// The registry's host.
        registry: String,
        /// What TLS says.
        why: String,
    },
    /// 429 for longer than we are ready to wait.
    #[error(
        "registry {registry} limits requests ({status}) and {patience}: try again later or log in to raise the limit"
    )]
    Limited {
        /// The registry's host.
        registry: String,
        /// The HTTP status.
        status: u16,
        /// How long it wants us to wait, or how often we tried.
        patience: String,
    },
    /// We do not ask, because it failed too often or asked us to wait.
    #[error("registry {registry} is not asked before {until}: {why}; try again then")]
    Held {
        /// The registry's host.
        registry: String,
        /// Until when.
        until: jiff::Timestamp,
        /// Why.
        why: String,
    },
    /// A fault of the registry that did not go away.
    #[error("registry {registry} fails on {what} after {attempts} attempts: {why}")]
    Failing {
        /// The registry's host.
        registry: String,
        /// What was asked.
        what: String,
        /// How often.
        attempts: u32,
        /// The last answer.
        why: String,
    },
    /// An answer that breaks the protocol.
    #[error("registry {registry} gives an unusable answer on {what}: {why}")]
    BadAnswer {
        /// The registry's host.
        registry: String,
        /// What was asked.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// A media type that is not an image manifest, config or layer that we can store.
    #[error("unsupported media type {media_type} of {what}{hint}")]
    Unsupported {
        /// The media type.
        media_type: String,
        /// The object.
        what: String,
        /// What to do, from the comma or colon on; may be empty.
        hint: &'static str,
    },
    /// The image exists, but not for this platform.
    #[error("image {image} does not exist for {wanted}: it is offered for {offered}")]
    NoPlatform {
        /// The image.
        image: String,
        /// What was asked for.
        wanted: String,
        /// What there is.
        offered: String,
    },
    /// Bytes that are not what their name says.
    #[error(
        "{what} has digest {actual} instead of {expected}: what the registry sends is damaged or forged; push the image again"
    )]
    DigestMismatch {
        /// The object.
        what: String,
        /// Its name.
        expected: Digest,
        /// What was received.
        actual: Digest,
    },
    /// More bytes than announced.
    #[error("{what} claims {claimed} bytes but sends more")]
    TooLong {
        /// The object.
        what: String,
        /// The size in its descriptor.
        claimed: u64,
    },
    /// Fewer bytes than announced.
    #[error("{what} claims {claimed} bytes but ends after {received}: push the image again")]
    TooShort {
        /// The object.
        what: String,
        /// The size in its descriptor.
        claimed: u64,
        /// What came.
        received: u64,
    },
    /// A document that is no JSON of the expected shape.
    #[error("{what} cannot be understood: {why}")]
    Malformed {
        /// The object.
        what: String,
        /// The rule it breaks.
        why: String,
    },
    /// The archive itself.
    #[error("the archive cannot be loaded: {why}")]
    Archive {
        /// What is wrong, and what to do.
        why: String,
    },
}
