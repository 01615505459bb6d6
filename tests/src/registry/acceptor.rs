//! A loopback port that serves each connection on its own thread.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

/// Accepts connections until it is dropped. Connections in progress continue.
#[derive(Debug)]
pub(super) struct Acceptor {
    port: u16,
    ending: Arc<AtomicBool>,
}

impl Acceptor {
    /// Accepts on a free port. `what` names the server in errors.
    pub(super) fn start(what: &str, serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").with_context(|| format!("no port is free for {what}"))?;
        let (port, ending) = (listener.local_addr()?.port(), Arc::new(AtomicBool::new(false)));
        let (seen, serve) = (Arc::clone(&ending), Arc::new(serve));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if seen.load(Ordering::Relaxed) {
                    return;
                }
                let serve = Arc::clone(&serve);
                std::thread::spawn(move || serve(stream));
            }
        });
        Ok(Self { port, ending })
    }

    /// The port.
    pub(super) fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts connections.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}
