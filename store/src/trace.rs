//! Access traces: what one container start read of its image, in order, and how well prefetching served it.
//!
//! A host records one trace per start and sends it to the coordinator, which merges it into the image's
//! [`crate::profile::PrefetchProfile`]. Encoded, a trace is one line `cachefs-trace 1`, then JSON with each touch as an
//! array of four numbers, and beside them the touches' blocks as a list of their bits. Without that list, which older
//! hosts do not send, each touch means its whole piece.
//!
//! Invariants of a decoded trace: `chain` is the top chainID of `layers`, each touch names one of them, and the
//! outcome's parts are not larger than their wholes. Only the layers' indexes can tell whether inodes and pieces exist.

use serde::{Deserialize, Serialize};

use crate::blocks::Blocks;
use crate::digest::{ContentDigest, Digest};
use crate::error::{Error, Result};
use crate::layer::InodeIndex;

const MAGIC: &str = "cachefs-trace 1\n";
/// The most layers of one image. Docker and overlayfs stop far below (127 layers).
const LAYERS_MAX: usize = 4096;
/// The longest host name, bytes. The kernel's limit is 64, that of a full domain name 255.
const HOST_MAX: usize = 255;

/// The first access to one piece of a file during a start, and what was read of it in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touch {
    /// Position of the layer in the chain, base first.
    pub layer: u16,
    /// The file's inode in that layer.
    pub inode: InodeIndex,
    /// The piece's number in the file.
    pub piece: u32,
    /// The blocks that were read.
    pub blocks: Blocks,
    /// Milliseconds since the start began.
    pub at_ms: u32,
}

/// How well a start was served. All are bytes of file content.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// What the start read.
    pub touched_bytes: u64,
    /// What was fetched because the profile named it.
    pub prefetched_bytes: u64,
    /// The part of `prefetched_bytes` that the start read.
    pub prefetched_used_bytes: u64,
    /// The part of `touched_bytes` for which somebody had to wait for the shared store.
    pub missed_bytes: u64,
}

impl Outcome {
    /// The share of the prefetched bytes that was read; nothing if nothing was prefetched.
    pub fn precision(&self) -> Option<f64> {
        share(self.prefetched_used_bytes, self.prefetched_bytes)
    }

    /// The share of the bytes read that had been prefetched; nothing if nothing was read.
    pub fn recall(&self) -> Option<f64> {
        share(self.prefetched_used_bytes, self.touched_bytes)
    }

    /// Whether no part is larger than its whole.
    fn is_consistent(&self) -> bool {
        self.prefetched_used_bytes <= self.prefetched_bytes.min(self.touched_bytes)
            && self.missed_bytes <= self.touched_bytes
    }
}

fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// What one start of one image read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Form", into = "Form")]
pub struct AccessTrace {
    /// The image's top chainID.
    pub chain: Digest,
    /// The diffIDs of its layers, base first.
    pub layers: Vec<Digest>,
    /// The host's own name.
    pub host: String,
    /// When the start began, seconds since 1970.
    pub started_at: u64,
    /// How long the start took, milliseconds.
    pub millis: u64,
    /// First touches, in their order.
    pub touches: Vec<Touch>,
    /// How well the start was served.
    pub outcome: Outcome,
    /// The startup pack that was in use.
    pub profile: Option<ContentDigest>,
}

/// The JSON form of a trace.
#[derive(Serialize, Deserialize)]
struct Form {
    chain: Digest,
    layers: Vec<Digest>,
    host: String,
    started_at: u64,
    millis: u64,
    touches: Vec<(u16, u32, u32, u32)>,
    #[serde(default)]
    blocks: Vec<u8>,
    outcome: Outcome,
    profile: Option<ContentDigest>,
}

impl TryFrom<Form> for AccessTrace {
    type Error = &'static str;

    fn try_from(form: Form) -> Result<AccessTrace, &'static str> {
        let Form { chain, layers, host, started_at, millis, touches, mut blocks, outcome, profile } = form;
        if blocks.is_empty() {
            blocks = vec![Blocks::ALL.bits(); touches.len()];
        }
        if blocks.len() != touches.len() {
            return Err("it does not say of each touch which blocks were read");
        }
        let touch = |((layer, inode, piece, at_ms), bits): ((u16, u32, u32, u32), u8)| {
            let (inode, blocks) = (InodeIndex(inode), Blocks::from_bits(bits));
            Touch { layer, inode, piece, blocks, at_ms }
        };
        let touches = touches.into_iter().zip(blocks).map(touch).collect();
        Ok(AccessTrace { chain, layers, host, started_at, millis, touches, outcome, profile })
    }
}

impl From<AccessTrace> for Form {
    fn from(trace: AccessTrace) -> Form {
        let AccessTrace { chain, layers, host, started_at, millis, touches, outcome, profile } = trace;
        let blocks = touches.iter().map(|touch| touch.blocks.bits()).collect();
        let row = |touch: &Touch| (touch.layer, touch.inode.0, touch.piece, touch.at_ms);
        let touches = touches.iter().map(row).collect();
        Form { chain, layers, host, started_at, millis, touches, blocks, outcome, profile }
    }
}

impl AccessTrace {
    /// The most touches of a trace: at a quarter of a megabyte each they could cover 16 GiB.
    pub const TOUCHES_MAX: usize = 65_536;
    /// The longest encoded trace, bytes. A touch takes some 30, and 46 with all its numbers at their largest.
    pub const ENCODED_MAX: usize = 4 << 20;

    /// The trace's bytes. An error if [`AccessTrace::decode`] would refuse them.
    pub fn encode(&self) -> Result<Vec<u8>> {
        self.check()?;
        let mut out = MAGIC.as_bytes().to_vec();
        serde_json::to_writer(&mut out, self).map_err(|e| refused(&e.to_string()))?;
        if out.len() <= Self::ENCODED_MAX { Ok(out) } else { Err(refused("it is too long")) }
    }

    /// Decodes a trace's bytes; refuses a trace that is too large or contradicts itself.
    pub fn decode(bytes: &[u8]) -> Result<AccessTrace> {
        if bytes.len() > Self::ENCODED_MAX {
            return Err(refused("it is too long"));
        }
        let Some(json) = bytes.strip_prefix(MAGIC.as_bytes()) else {
            return Err(if bytes.starts_with(b"cachefs-trace ") {
                Error::Unsupported { what: "an access trace".into(), why: "it has another version".into() }
            } else {
                refused("its first line is not cachefs-trace 1")
            });
        };
        let trace: AccessTrace = serde_json::from_slice(json).map_err(|e| refused(&e.to_string()))?;
        trace.check()?;
        Ok(trace)
    }

    fn check(&self) -> Result<()> {
        let rules = [
            (self.layers.len() <= LAYERS_MAX, "it names more layers than an image can have"),
            (Digest::top_chain(&self.layers) == Some(self.chain), "its layers do not make up its chain"),
            (self.touches.len() <= Self::TOUCHES_MAX, "it has more than 65536 touches"),
            (
                self.touches.iter().all(|touch| usize::from(touch.layer) < self.layers.len()),
                "a touch names a layer that the chain does not have",
            ),
            (self.touches.iter().all(|touch| !touch.blocks.is_empty()), "a touch has read nothing"),
            (self.host.len() <= HOST_MAX, "its host's name is too long"),
            (self.outcome.is_consistent(), "its outcome contradicts itself"),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            None => Ok(()),
            Some((_, why)) => Err(refused(why)),
        }
    }
}

fn refused(why: &str) -> Error {
    Error::corrupt("an access trace", why)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A trace of an image of two layers.
    pub(crate) fn trace(host: &str, touches: impl IntoIterator<Item = (u16, u32, u32)>) -> AccessTrace {
        let layers = vec![Digest::of(b"base"), Digest::of(b"top")];
        let touch = |(at, (layer, inode, piece))| Touch {
            layer,
            inode: InodeIndex(inode),
            piece,
            blocks: Blocks::ALL,
            at_ms: at,
        };
        AccessTrace {
            chain: Digest::chain(Some(&layers[0]), &layers[1]),
            layers,
            host: host.into(),
            started_at: 1_700_000_000,
            millis: 900,
            touches: (0..).zip(touches).map(touch).collect(),
            outcome: Outcome { touched_bytes: 9, prefetched_bytes: 8, prefetched_used_bytes: 6, missed_bytes: 3 },
            profile: Some(ContentDigest::of(b"pack")),
        }
    }

    #[test]
    fn golden_bytes() {
        let trace = trace("h", [(0, 1, 2), (1, 3, 0)]);
        let bytes = trace.encode().unwrap();
        let text = std::str::from_utf8(&bytes).unwrap();
        assert!(text.starts_with("cachefs-trace 1\n{\"chain\":\"sha256:"), "{text}");
        assert!(text.contains("\"touches\":[[0,1,2,0],[1,3,0,1]],\"blocks\":[255,255]"), "{text}");
        assert_eq!(AccessTrace::decode(&bytes).unwrap(), trace);
        let older = text.replace(",\"blocks\":[255,255]", "");
        assert_eq!(AccessTrace::decode(older.as_bytes()).unwrap(), trace, "an older host names pieces only");
        let wrong = text.replace("[255,255]", "[255]");
        assert!(AccessTrace::decode(wrong.as_bytes()).unwrap_err().to_string().contains("of each touch"));
    }

    #[test]
    fn the_largest_trace_fits() {
        let mut largest = trace(&"h".repeat(HOST_MAX), []);
        let (inode, blocks) = (InodeIndex(u32::MAX), Blocks::ALL);
        let touch = Touch { layer: 1, inode, piece: u32::MAX, blocks, at_ms: u32::MAX };
        largest.touches = vec![touch; AccessTrace::TOUCHES_MAX];
        assert_eq!(AccessTrace::decode(&largest.encode().unwrap()).unwrap(), largest);
        largest.touches.push(touch);
        assert!(largest.encode().is_err());
    }

    /// A way to spoil a trace.
    type Spoil = fn(&mut AccessTrace);

    #[test]
    fn contradictions_are_refused() {
        let spoils: [(Spoil, &str); 7] = [
            (|t| t.touches[0].blocks = Blocks::NONE, "has read nothing"),
            (|t| t.chain = Digest::of(b"other"), "do not make up its chain"),
            (|t| t.layers.clear(), "do not make up its chain"),
            (|t| t.touches[0].layer = 2, "a layer that the chain does not have"),
            (|t| t.outcome.prefetched_used_bytes = 9, "contradicts itself"),
            (|t| t.outcome.missed_bytes = 10, "contradicts itself"),
            (|t| t.host = "h".repeat(256), "too long"),
        ];
        for (spoil, why) in spoils {
            let mut bad = trace("h", [(0, 1, 2)]);
            spoil(&mut bad);
            let json = [MAGIC.as_bytes(), &serde_json::to_vec(&bad).unwrap()].concat();
            let error = AccessTrace::decode(&json).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
            assert!(bad.encode().is_err());
        }
        let newer = AccessTrace::decode(b"cachefs-trace 2\n{}").unwrap_err();
        assert!(matches!(newer, Error::Unsupported { .. }));
        assert!(AccessTrace::decode(&vec![b' '; AccessTrace::ENCODED_MAX + 1]).is_err());
    }

    proptest! {
        #[test]
        fn damaged_bytes_never_panic(at in any::<prop::sample::Index>(), to in any::<u8>(), cut in any::<bool>()) {
            let mut bytes = trace("h", [(0, 1, 2), (1, 3, 0)]).encode().unwrap();
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] = to }
            if let Ok(trace) = AccessTrace::decode(&bytes) {
                trace.encode().unwrap();
            }
        }
    }
}
