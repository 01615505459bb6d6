//! Layers whose tar is never stored whole: it is hashed on its way into the compressor.

use std::io::Write;

use anyhow::Result;

use crate::images::{Compression, Layer, Pools};

/// A writer that hashes what passes through it.
pub struct Hashed<W> {
    inner: W,
    hash: ring::digest::Context,
}

impl<W> std::fmt::Debug for Hashed<W> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Hashed")
    }
}

impl<W> Hashed<W> {
    /// A writer that passes everything on to `inner`.
    pub fn new(inner: W) -> Self {
        Self { inner, hash: ring::digest::Context::new(&ring::digest::SHA256) }
    }

    /// Returns the inner writer, and the digest (`sha256:...`) of everything written.
    pub fn finish(self) -> (W, String) {
        let hex: String = self.hash.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        (self.inner, format!("sha256:{hex}"))
    }
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

/// A layer whose tar `write` produces, compressed with zstd.
pub fn layer(pools: &Pools, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<Layer> {
    let mut hashed = Hashed::new(zstd::Encoder::new(Vec::new(), 1)?);
    write(&mut hashed)?;
    let (encoder, diff_id) = hashed.finish();
    pools.raw_layer(&encoder.finish()?, Compression::Zstd.layer_type(), &diff_id)
}
