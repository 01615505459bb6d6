//! Integration with container engines: one module per engine, each a layout that the engine reads or a protocol that it
//! speaks.
//!
//! - [`data_root`]: dockerd's data-root with the classic overlay2 driver (Docker 20.10 to 28).

pub mod data_root;
