//! Layers whose tar is never whole anywhere: it is hashed on its way into the compressor.

use std::io::Write;

use anyhow::Result;

use crate::images::{Compression, Layer, Pools};

/// Hashes what passes.
struct Hashed<W> {
    inner: W,
    hash: ring::digest::Context,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.hash.update(bytes);
        self.inner.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// A layer whose tar is what `write` writes, compressed by zstd.
pub fn layer(pools: &Pools, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<Layer> {
    let hash = ring::digest::Context::new(&ring::digest::SHA256);
    let mut hashed = Hashed { inner: zstd::Encoder::new(Vec::new(), 1)?, hash };
    write(&mut hashed)?;
    let Hashed { inner, hash } = hashed;
    let diff_id: String = hash.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    pools.raw_layer(&inner.finish()?, Compression::Zstd.layer_type(), &format!("sha256:{diff_id}"))
}
