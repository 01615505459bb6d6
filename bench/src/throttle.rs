//! A TCP proxy with a limited bandwidth, placed between a registry and its clients.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ::tests::registry::free_port;
use anyhow::{Context, Result};
use parking_lot::Mutex;

/// Bytes that are sent in one turn.
const PIECE: usize = 64 << 10;

/// A running proxy. It stops listening when dropped; each connection ends when its ends close.
#[derive(Debug)]
pub(crate) struct Throttle {
    address: String,
    ending: Arc<AtomicBool>,
}

impl Throttle {
    /// Forwards to `target`. The answers of all connections together are limited to `bandwidth`, bytes a second.
    pub(crate) fn start(target: &str, bandwidth: u64) -> Result<Throttle> {
        let address = format!("127.0.0.1:{}", free_port()?);
        let listener = TcpListener::bind(&address).with_context(|| format!("cannot listen at {address}"))?;
        let ending = Arc::new(AtomicBool::new(false));
        let (stop, target) = (Arc::clone(&ending), target.to_owned());
        std::thread::spawn(move || {
            let free_at = Arc::new(Mutex::new(Instant::now()));
            for near in listener.incoming().flatten() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                // If the target cannot be reached, the connection is closed, as it would be without a proxy.
                let Ok(far) = TcpStream::connect(&target) else { continue };
                let (Ok(near_too), Ok(far_too)) = (near.try_clone(), far.try_clone()) else { continue };
                let _ = (near.set_nodelay(true), far.set_nodelay(true));
                let free_at = Arc::clone(&free_at);
                std::thread::spawn(move || pump(near_too, far_too, |_| {}));
                std::thread::spawn(move || pump(far, near, |bytes| take_turn(&free_at, bytes, bandwidth)));
            }
        });
        Ok(Throttle { address, ending })
    }

    /// The address that it listens on.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(&self.address);
    }
}

/// Waits until the wire has carried these bytes and all bytes before them.
fn take_turn(free_at: &Mutex<Instant>, bytes: usize, bandwidth: u64) {
    let over = {
        let mut free_at = free_at.lock();
        *free_at = free_at.max(Instant::now()) + Duration::from_secs_f64(bytes as f64 / bandwidth as f64);
        *free_at
    };
    std::thread::sleep(over.saturating_duration_since(Instant::now()));
}

fn pump(mut from: TcpStream, mut to: TcpStream, turn: impl Fn(usize)) {
    let mut piece = vec![0; PIECE];
    while let Ok(bytes) = from.read(&mut piece) {
        turn(bytes);
        if bytes == 0 || to.write_all(&piece[..bytes]).is_err() {
            break;
        }
    }
    let _ = (to.shutdown(Shutdown::Write), from.shutdown(Shutdown::Read));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_arrive_whole_and_no_faster_than_allowed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut question = [0; 4];
            stream.read_exact(&mut question).unwrap();
            stream.write_all(&vec![7; 1 << 20]).unwrap();
            question
        });
        let throttle = Throttle::start(&target, 4 << 20).unwrap();
        let start = Instant::now();
        let mut stream = TcpStream::connect(throttle.address()).unwrap();
        stream.write_all(b"send").unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert_eq!((answer, server.join().unwrap()), (vec![7; 1 << 20], *b"send"));
        assert!(start.elapsed() >= Duration::from_millis(200), "1 MiB at 4 MiB a second took {:?}", start.elapsed());
    }
}
