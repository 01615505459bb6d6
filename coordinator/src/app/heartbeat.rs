//! Renews the lease on the store, on a thread of its own, so that neither requests nor pulls can delay it.
//!
//! The thread needs neither the runtime's threads nor those for blocking work. It keeps a few descriptors in reserve: when the
//! process has used up all others, it frees them to renew the lease.
//!
//! A leader that finds itself replaced, or that could not renew for as long as a lease lives, must stop: [`Heartbeat::lost`] then
//! returns. A full disk is no reason to stop; see [`crate::app::serve`].

use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use store::lease::TIME_TO_LIVE;
use store::publisher::Publisher;
use tokio::sync::oneshot;

use crate::app::error::ServeError;

/// How often the lease is renewed.
const PERIOD: Duration = Duration::from_secs(TIME_TO_LIVE.as_secs() / 5);
/// Descriptors that a renewal needs: a directory, a file, and one to spare.
const RESERVE: usize = 4;

/// The thread that renews the lease. It ends when this is dropped.
pub(crate) struct Heartbeat {
    /// Dropped with this struct; the thread waits for that.
    _running: Sender<()>,
    lost: oneshot::Receiver<ServeError>,
}

/// Open files that only occupy descriptors.
struct Reserve(Vec<File>);

fn is_for_want_of_descriptors(error: &store::Error) -> bool {
    let store::Error::Io { source, .. } = error else { return false };
    source.raw_os_error().is_some_and(|code| [nix::libc::EMFILE, nix::libc::ENFILE].contains(&code))
}

impl Reserve {
    fn fill(&mut self) {
        while self.0.len() < RESERVE {
            match File::open("/dev/null") {
                Ok(file) => self.0.push(file),
                Err(_) => return,
            }
        }
    }

    /// Renews. If that fails for want of descriptors, frees the reserve and tries again.
    fn renew(&mut self, renew: &dyn Fn() -> Result<(), store::Error>) -> Result<(), store::Error> {
        let renewed = match renew() {
            Err(error) if is_for_want_of_descriptors(&error) => {
                self.0.clear();
                renew()
            }
            other => other,
        };
        self.fill();
        renewed
    }
}

impl Heartbeat {
    /// Starts renewing the lease of `publisher`.
    pub(crate) fn start(publisher: Arc<Publisher>) -> Result<Heartbeat, ServeError> {
        let (running, stopped) = channel();
        let (losing, lost) = oneshot::channel();
        let work = move || {
            let mut reserve = Reserve(Vec::new());
            reserve.fill();
            let mut renewed = Instant::now();
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(PERIOD) {
                match reserve.renew(&|| publisher.renew()) {
                    Ok(()) => renewed = Instant::now(),
                    Err(error @ store::Error::Fenced { .. }) => return drop(losing.send(error.into())),
                    Err(error @ store::Error::Full { .. }) => {
                        renewed = Instant::now();
                        tracing::warn!("the lease is not renewed, trying again: {error}");
                    }
                    Err(last) if renewed.elapsed() >= TIME_TO_LIVE => {
                        return drop(losing.send(ServeError::LeaseLost { last }));
                    }
                    Err(error) => tracing::warn!("the lease is not renewed, trying again: {error}"),
                }
            }
        };
        std::thread::Builder::new().name("lease".to_owned()).spawn(work).map_err(ServeError::Thread)?;
        Ok(Heartbeat { _running: running, lost })
    }

    /// Waits until the lease is lost.
    pub(crate) async fn lost(&mut self) -> ServeError {
        match (&mut self.lost).await {
            Ok(why) => why,
            // The thread sends nothing only if it was told to end or has crashed. In the latter case nobody renews.
            Err(_) => ServeError::LeaseLost {
                last: store::Error::corrupt(
                    "this coordinator",
                    "the thread that renews the lease crashed: see its log",
                ),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_renewal_that_finds_no_descriptor_gets_those_of_the_reserve() {
        let mut reserve = Reserve(Vec::new());
        reserve.fill();
        assert_eq!(reserve.0.len(), RESERVE);
        let attempts = Cell::new(0);
        let full = || {
            attempts.set(attempts.get() + 1);
            match attempts.get() {
                1 => Err(store::Error::io(
                    "write",
                    std::path::Path::new("beat"),
                    std::io::Error::from_raw_os_error(nix::libc::EMFILE),
                )),
                _ => Ok(()),
            }
        };
        reserve.renew(&full).unwrap();
        assert_eq!((attempts.get(), reserve.0.len()), (2, RESERVE));
        let broken = || Err(store::Error::io("write", std::path::Path::new("beat"), std::io::Error::other("no")));
        assert!(reserve.renew(&broken).is_err());
    }
}
