//! File content and layer indexes, read through the local disk.
//!
//! - [`cache`]: file content.
//! - [`indexes`]: layer indexes, fetched once and read in blocks.
//! - [`prefetch`]: startup packs of images that start, and whole images.

pub mod cache;
pub mod indexes;
pub mod prefetch;
