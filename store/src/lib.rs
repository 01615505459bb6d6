//! The store: the format on the shared disk, its reader and its publisher.
//!
//! `store/FORMAT.md` is the authoritative description of the bytes; this crate implements it. It is plain synchronous
//! std: no FUSE, no HTTP, no async runtime. A host, a coordinator and a repair tool can all link it.
//!
//! Module order (imports point up this list only):
//!
//! - [`error`]: errors, named for what a caller can do about them.
//! - [`crash`]: crash points, where tests kill the process.
//! - [`digest`]: [`Digest`] (SHA-256, the only name that OCI content has) and [`ContentDigest`] (BLAKE3, checked on
//!   every read).
//! - [`wire`]: little-endian fields. [`go_json`]: JSON, read as Go reads it.
//! - [`durable`]: files that appear whole and synced, or not at all.
//! - [`layout`]: the only place where a digest becomes a path.
//! - [`reserve`]: disk space set aside for small writes on a full disk.
//! - [`version`]: the format version and the three feature sets.
//! - [`chunk`]: compressed chunks; a [`chunk::RawChunk`] gives its bytes only as a [`chunk::VerifiedChunk`].
//! - [`blocks`]: parts of pieces, compared with the digest of the whole piece.
//! - [`pack`]: files of chunks, whole or thinned.
//! - [`layer`]: the index of one layer: its file tree, and where each byte lies.
//! - [`recipe`]: tar recipes, from which a layer's tar stream is written again byte for byte.
//! - [`image`]: image references, and what the store records of an image: its ordered layers among others.
//! - [`image_config`]: image configs, read as Docker reads them.
//! - [`trace`]: what one container start read. [`profile`]: what the starts of one image need, and its startup pack.
//! - [`catalogue`]: generations of the list of images.
//! - [`lease`]: the right to write, fenced by an epoch. [`handover_log`]: what a leader leaves to its successor besides
//!   images.
//! - [`reader`]: the only way to read the store. [`publisher`]: the only way to write to it, and to remove from it.
//!
//! Invariants, each with a test: a published file never changes, except that thinning a pack drops chunks that no layer
//! uses; a path is a function of a digest; a layer is visible whole and verified, or not at all; no bytes leave a
//! [`chunk::RawChunk`] without a digest check.

pub mod blocks;
pub mod catalogue;
pub mod chunk;
pub mod crash;
pub mod digest;
mod durable;
pub mod error;
pub mod go_json;
pub mod handover_log;
pub mod image;
pub mod image_config;
pub mod layer;
pub mod layout;
pub mod lease;
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
