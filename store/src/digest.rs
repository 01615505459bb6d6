//! The two digests that name content.
//!
//! [`Digest`] is SHA-256, by which OCI names layers, configs and manifests. [`ContentDigest`] is BLAKE3, which this
//! format checks on every read, because it is an order of magnitude faster where the processor has no SHA extensions.
//! Both are parsed once and are fixed-size values from then on.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use crate::error::Error;

/// A SHA-256 digest, written `sha256:<64 hex digits>` as in the OCI image specification.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

/// A BLAKE3 digest of a chunk's or a file's bytes, written as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContentDigest([u8; 32]);

/// Lower-case hex of `bytes`.
fn hex(bytes: &[u8; 32]) -> String {
    String::from_utf8_lossy(&hex_digits(bytes)).into_owned()
}

fn hex_digits(bytes: &[u8; 32]) -> [u8; 64] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut digits = [0; 64];
    for (pair, byte) in digits.chunks_exact_mut(2).zip(bytes) {
        pair.copy_from_slice(&[DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
    }
    digits
}

/// Parses 64 lower-case hex digits into 32 bytes.
fn unhex(text: &str) -> Option<[u8; 32]> {
    let text = text.as_bytes();
    if text.len() != 64 {
        return None;
    }
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Digest {
        let mut hasher = Sha256::new();
        hasher.update(bytes);
        hasher.finish()
    }

    /// Takes the raw 32 bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Digest {
        Digest(bytes)
    }

    /// Parses 64 hex digits without the `sha256:` prefix (the form used in paths).
    pub fn from_hex(text: &str) -> Option<Digest> {
        unhex(text).map(Digest)
    }

    /// The raw 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// 64 hex digits, without a prefix: the form used in paths (overlayfs splits at colons).
    pub fn hex(&self) -> String {
        hex(&self.0)
    }

    /// The chainID of the last of some layers, base first; nothing without layers.
    pub fn top_chain<'a>(diff_ids: impl IntoIterator<Item = &'a Digest>) -> Option<Digest> {
        diff_ids.into_iter().fold(None, |chain, diff_id| Some(Digest::chain(chain.as_ref(), diff_id)))
    }

    /// The chainID of a layer on top of `parent` (OCI image specification, "Layer ChainID").
    pub fn chain(parent: Option<&Digest>, diff_id: &Digest) -> Digest {
        match parent {
            None => *diff_id,
            // `PARENT DIFFID`, without an allocation: a large catalogue has many chains.
            Some(parent) => {
                let mut text = *b"sha256:0000000000000000000000000000000000000000000000000000000000000000 \
sha256:0000000000000000000000000000000000000000000000000000000000000000";
                text[7..71].copy_from_slice(&hex_digits(&parent.0));
                text[79..].copy_from_slice(&hex_digits(&diff_id.0));
                Digest::of(&text)
            }
        }
    }
}

impl ContentDigest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> ContentDigest {
        ContentDigest(*blake3::hash(bytes).as_bytes())
    }

    /// Takes the raw 32 bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> ContentDigest {
        ContentDigest(bytes)
    }

    /// Parses 64 hex digits.
    pub fn from_hex(text: &str) -> Option<ContentDigest> {
        unhex(text).map(ContentDigest)
    }

    /// The raw 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// 64 hex digits.
    pub fn hex(&self) -> String {
        hex(&self.0)
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Digest, Error> {
        text.strip_prefix("sha256:").and_then(Digest::from_hex).ok_or_else(|| Error::Invalid {
            kind: "digest",
            what: text.chars().take(100).collect(),
            why: match text.split_once(':') {
                Some((algorithm, _)) if algorithm != "sha256" => {
                    "only sha256 is supported: write sha256: and 64 lower-case hex digits"
                }
                _ => "expected sha256: and 64 lower-case hex digits",
            },
        })
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;

    fn try_from(text: String) -> Result<Digest, Error> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

impl TryFrom<String> for ContentDigest {
    type Error = Error;

    fn try_from(text: String) -> Result<ContentDigest, Error> {
        ContentDigest::from_hex(&text).ok_or_else(|| Error::Invalid {
            kind: "BLAKE3 digest",
            what: text.chars().take(100).collect(),
            why: "expected 64 lower-case hex digits",
        })
    }
}

impl From<ContentDigest> for String {
    fn from(digest: ContentDigest) -> String {
        digest.hex()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for ContentDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.hex())
    }
}

impl fmt::Debug for ContentDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blake3:{}", self.hex())
    }
}

/// A streaming SHA-256, on the fastest backend this processor has: `sha2` where it has SHA instructions (`sha2` uses
/// them), `ring`'s AVX code where it has not (measured: 340 against 184 MB/s on such a machine).
pub struct Sha256(Backend);

enum Backend {
    Sha2(sha2::Sha256),
    Ring(ring::digest::Context),
}

/// Whether the processor has SHA-256 instructions.
fn has_sha_instructions() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        return std::arch::is_x86_feature_detected!("sha");
        #[cfg(not(target_arch = "x86_64"))]
        return true;
    })
}

impl Sha256 {
    /// A hasher that has seen no bytes yet.
    pub fn new() -> Sha256 {
        Sha256(if has_sha_instructions() {
            Backend::Sha2(sha2::Sha256::new())
        } else {
            Backend::Ring(ring::digest::Context::new(&ring::digest::SHA256))
        })
    }

    /// Adds `bytes`.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            Backend::Sha2(hasher) => hasher.update(bytes),
            Backend::Ring(context) => context.update(bytes),
        }
    }

    /// The digest of all bytes added.
    pub fn finish(self) -> Digest {
        let mut bytes = [0; 32];
        match self.0 {
            Backend::Sha2(hasher) => bytes.copy_from_slice(&hasher.finalize()),
            Backend::Ring(context) => bytes.copy_from_slice(context.finish().as_ref()),
        }
        Digest(bytes)
    }
}

impl Default for Sha256 {
    fn default() -> Sha256 {
        Sha256::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_backends_agree_with_the_standard() {
        let mut sha2 = Sha256(Backend::Sha2(sha2::Sha256::new()));
        let mut ring = Sha256(Backend::Ring(ring::digest::Context::new(&ring::digest::SHA256)));
        for part in [&b"a"[..], b"b", b"c"] {
            sha2.update(part);
            ring.update(part);
        }
        let expected = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha2.finish().to_string(), expected);
        assert_eq!(ring.finish().to_string(), expected);
        assert_eq!(Digest::of(b"abc").to_string(), expected);
    }

    #[test]
    fn only_the_canonical_form_parses() {
        let good = format!("sha256:{}", "0a".repeat(32));
        assert_eq!(good.parse::<Digest>().unwrap().to_string(), good);
        for bad in ["", "sha256:", "0a", "sha512:00", &good.to_uppercase(), &format!("{good}0"), &good[..70]] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn chain_follows_the_specification() {
        let a = Digest::of(b"a");
        let b = Digest::of(b"b");
        assert_eq!(Digest::chain(None, &a), a);
        assert_eq!(Digest::chain(Some(&a), &b), Digest::of(format!("{a} {b}").as_bytes()));
    }
}
