//! A bounded pipe of byte blocks between tasks and threads, which keeps a pull's memory bounded.
//!
//! The writer waits while [`CAPACITY`] blocks are queued. The reader sees the end only if the writer has called [`PipeWriter::finish`]. A
//! writer that is dropped before that is an error, so that half a layer never looks like a whole one. When the pipe is stopped, the reader
//! and a blocking writer fail at once, whatever is still queued: what is left of a few megabytes may be hours of work.

use std::io::{self, BufRead, Read};

use bytes::{Buf, Bytes, BytesMut};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Blocks in the queue; with [`BLOCK`] this bounds a pipe to 4 MiB.
const CAPACITY: usize = 16;
/// Small pieces are joined up to this size, and large ones are cut. Waking a thread for each TCP segment would cost more than the work.
const BLOCK: usize = 256 << 10;

/// The reading end is gone, or the pipe is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReaderGone;

enum Item {
    Block(Bytes),
    End,
}

/// The writing end.
pub struct PipeWriter {
    sender: mpsc::Sender<Item>,
    pending: BytesMut,
    stop: CancellationToken,
}

/// The reading end, for threads that may block.
pub struct PipeReader {
    receiver: mpsc::Receiver<Item>,
    block: Bytes,
    ended: bool,
    stop: CancellationToken,
}

/// A new pipe.
pub fn pipe() -> (PipeWriter, PipeReader) {
    pipe_until(&CancellationToken::new())
}

/// A new pipe that is stopped when `stop` is cancelled.
pub fn pipe_until(stop: &CancellationToken) -> (PipeWriter, PipeReader) {
    let (sender, receiver) = mpsc::channel(CAPACITY);
    let writer = PipeWriter { sender, pending: BytesMut::new(), stop: stop.clone() };
    (writer, PipeReader { receiver, block: Bytes::new(), ended: false, stop: stop.clone() })
}

impl PipeWriter {
    /// Writes from a task.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), ReaderGone> {
        for piece in bytes.chunks(BLOCK) {
            self.pending.extend_from_slice(piece);
            if let Some(block) = self.full_block() {
                self.sender.send(Item::Block(block)).await.map_err(|_| ReaderGone)?;
            }
        }
        Ok(())
    }

    /// Writes from a thread that may block.
    pub fn write_blocking(&mut self, bytes: &[u8]) -> Result<(), ReaderGone> {
        if self.stop.is_cancelled() {
            return Err(ReaderGone);
        }
        self.sender.blocking_send(Item::Block(Bytes::copy_from_slice(bytes))).map_err(|_| ReaderGone)
    }

    /// Marks the end, from a task.
    pub async fn finish(mut self) -> Result<(), ReaderGone> {
        let rest = self.pending.split().freeze();
        self.sender.send(Item::Block(rest)).await.map_err(|_| ReaderGone)?;
        self.sender.send(Item::End).await.map_err(|_| ReaderGone)
    }

    /// Marks the end, from a thread that may block.
    pub fn finish_blocking(self) -> Result<(), ReaderGone> {
        self.sender.blocking_send(Item::End).map_err(|_| ReaderGone)
    }

    fn full_block(&mut self) -> Option<Bytes> {
        (self.pending.len() >= BLOCK).then(|| self.pending.split().freeze())
    }
}

impl PipeReader {
    /// Waits until `block` is not empty, or the end is reached.
    fn fill(&mut self) -> io::Result<()> {
        if self.stop.is_cancelled() {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the transfer was stopped"));
        }
        while self.block.is_empty() && !self.ended {
            match self.receiver.blocking_recv() {
                Some(Item::Block(block)) => self.block = block,
                Some(Item::End) => self.ended = true,
                None => return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the transfer was broken off")),
            }
        }
        Ok(())
    }
}

impl BufRead for PipeReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.fill()?;
        Ok(&self.block)
    }

    fn consume(&mut self, count: usize) {
        self.block.advance(count);
    }
}

impl Read for PipeReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.fill()?;
        let count = out.len().min(self.block.len());
        out[..count].copy_from_slice(&self.block[..count]);
        self.block.advance(count);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_arrive_in_order_and_the_end_must_be_said() {
        let (mut writer, mut reader) = pipe();
        let bytes: Vec<u8> = (0..3_000_000u32).map(|n| n as u8).collect();
        let expected = bytes.clone();
        let read = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).map(|_| all)
        });
        for piece in bytes.chunks(70_001) {
            writer.write(piece).await.unwrap();
        }
        writer.finish().await.unwrap();
        assert!(read.await.unwrap().unwrap() == expected);

        let (mut writer, mut reader) = pipe();
        writer.write(b"half").await.unwrap();
        drop(writer);
        let read = tokio::task::spawn_blocking(move || reader.read_to_end(&mut Vec::new()));
        assert_eq!(read.await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    }

    #[tokio::test]
    async fn a_stopped_pipe_gives_nothing_more() {
        let stop = CancellationToken::new();
        let (mut writer, mut reader) = pipe_until(&stop);
        writer.write(&[7; BLOCK]).await.unwrap();
        stop.cancel();
        let read = tokio::task::spawn_blocking(move || reader.read(&mut [0; 10]));
        assert_eq!(read.await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        let written = tokio::task::spawn_blocking(move || writer.write_blocking(&[7; 10]));
        assert_eq!(written.await.unwrap(), Err(ReaderGone));
    }

    #[tokio::test]
    async fn a_writer_learns_that_nobody_reads() {
        let (mut writer, reader) = pipe();
        drop(reader);
        assert_eq!(writer.write(&[0; BLOCK]).await, Err(ReaderGone));
    }
}
