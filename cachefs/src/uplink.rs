//! What this host tells the coordinator. Nothing here is needed to serve a container.
//!
//! - [`recorder`]: traces of what starts read, and their upload.
//! - `coordinator`: requests to the coordinator, each with a timeout.
//! - [`image_misses`]: images that were looked for in vain.
//! - [`lease`]: which layers this host uses, so that they are kept.

mod coordinator;
pub mod image_misses;
pub mod lease;
pub mod recorder;
