//! The contract: what lies on the shared disk, how it is read, how it is published.
//!
//! `store/FORMAT.md` is the one description of the bytes; this crate is its implementation. It is plain
//! synchronous std: no FUSE, no HTTP, no async runtime, so that a host, a coordinator and a repair tool can all
//! link it.
//!
//! Module order (imports point up this list only):
//!
//! - [`error`]: what a caller can do about a failure.
//! - [`crash`]: where a test kills the process.
//! - [`digest`]: [`Digest`] (SHA-256, the only name OCI content has) and [`ContentDigest`] (BLAKE3, what is checked
//!   on every read).
//! - [`wire`]: little-endian fields. [`go_json`]: JSON as the programs that wrote it read it.
//! - [`durable`]: files that appear whole and synced, or not at all.
//! - [`layout`]: the only place where a digest becomes a path.
//! - [`reserve`]: a little room for when the disk is full.
//! - [`version`]: the format version and the three feature sets.
//! - [`chunk`]: [`chunk::RawChunk`] -> [`chunk::VerifiedChunk`]: bytes cannot be read unverified.
//! - [`pack`]: chunks appended to one file; what is left of it when it is thinned.
//! - [`layer`]: the index of one layer: its file tree, and where each byte lies.
//! - [`recipe`]: what gives a layer's tar stream back byte for byte.
//! - [`image`]: references, and the ordered layers behind a tag.
//! - [`image_config`]: configs, as Docker reads them.
//! - [`trace`]: what one container's start read. [`profile`]: what the starts of one image need, and its startup pack.
//! - [`catalogue`]: generations of the list of images.
//! - [`lease`]: who may write, fenced by an epoch. [`ledger`]: what one leader leaves to the next besides.
//! - [`reader`]: the only way to the bytes. [`publisher`]: the only way in, and out of the store again.
//!
//! Invariants, each with a test: a published file never changes (but for packs that are thinned, of which nothing goes that
//! a layer uses); a path is a function of a digest; a layer is visible whole and verified or not at all; no bytes leave a [`chunk::RawChunk`] without a digest check.

pub mod catalogue;
pub mod chunk;
pub mod crash;
pub mod digest;
mod durable;
pub mod error;
pub mod go_json;
pub mod image;
pub mod image_config;
pub mod layer;
pub mod layout;
pub mod lease;
pub mod ledger;
pub mod pack;
pub mod profile;
pub mod publisher;
pub mod reader;
pub mod recipe;
pub mod reserve;
pub mod trace;
pub mod version;
pub mod wire;

pub use digest::{ContentDigest, Digest};
pub use error::Error;
