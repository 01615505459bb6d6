//! Questions to something that may hang: a mount whose daemon is stopped answers nobody.
//!
//! Each question is asked on a thread of its own, which is given up after a time. Threads that were given up end when they are
//! answered, or with the process; while too many wait, nobody is asked.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

/// The most questions that may be open at once.
const OPEN_MAX: usize = 64;

/// Asks questions with a time limit.
#[derive(Debug, Default)]
pub struct Bounded {
    open: Arc<AtomicUsize>,
}

impl Bounded {
    /// The answer to `question`, or an error of the kind `TimedOut` after `limit`.
    pub fn ask<R: Send + 'static>(
        &self,
        limit: Duration,
        question: impl FnOnce() -> io::Result<R> + Send + 'static,
    ) -> io::Result<R> {
        let late = || io::Error::new(io::ErrorKind::TimedOut, "there is no answer in time");
        let open = Arc::clone(&self.open);
        if open.fetch_add(1, Ordering::AcqRel) >= OPEN_MAX {
            open.fetch_sub(1, Ordering::AcqRel);
            return Err(late());
        }
        let (send, receive) = channel();
        let thread = std::thread::Builder::new().name("snapshotter-ask".to_owned());
        let counted = Arc::clone(&open);
        let spawned = thread.spawn(move || {
            let _ = send.send(question());
            counted.fetch_sub(1, Ordering::AcqRel);
        });
        if let Err(error) = spawned {
            open.fetch_sub(1, Ordering::AcqRel);
            return Err(error);
        }
        receive.recv_timeout(limit).map_err(|_| late())?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_does_not_answer_is_given_up_and_not_asked_without_end() {
        let bounded = Bounded::default();
        let forever = Duration::from_secs(3600);
        assert_eq!(bounded.ask(forever, || Ok(7)).unwrap(), 7);
        assert_eq!(
            bounded.ask::<()>(forever, || Err(io::ErrorKind::NotFound.into())).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        let (end, ends) = channel::<()>();
        let ends = Arc::new(std::sync::Mutex::new(ends));
        for _ in 0..OPEN_MAX + 5 {
            let ends = Arc::clone(&ends);
            let wait = move || {
                let _ = ends.lock().map(|ends| ends.recv());
                Ok(())
            };
            let error = bounded.ask(Duration::ZERO, wait).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        }
        assert!(bounded.open.load(Ordering::Acquire) <= OPEN_MAX);
        drop(end);
        while bounded.open.load(Ordering::Acquire) > 0 {
            std::thread::yield_now();
        }
        assert_eq!(bounded.ask(forever, || Ok(7)).unwrap(), 7);
    }
}
