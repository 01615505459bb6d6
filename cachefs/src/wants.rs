//! Images that somebody on this host looked for and did not find: the coordinator is told, so that it hurries.
//!
//! A lookup notes a name and goes on: it never waits for the coordinator, and a coordinator that does not answer costs
//! nothing. A name is told once in [`AGAIN`], however often it is looked for. Only tags of repositories that the store knows are
//! told: of another path nobody can say where the repository ends and the tag begins.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use coordinator_api::Client;
use coordinator_api::wanted::Wanted;
use parking_lot::{Condvar, Mutex};

/// A name is told again after this.
const AGAIN: Duration = Duration::from_secs(30);
/// Names that wait to be told; more are dropped, they will be looked for again.
const WAITING_MAX: usize = 64;
/// Names whose last telling is remembered.
const TOLD_MAX: usize = 1024;
/// A coordinator that takes longer is not waited for.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<String>,
    told: HashMap<String, Instant>,
}

/// What this host lacks.
#[derive(Debug, Default)]
pub struct Wants {
    /// Guards both lists; never held during I/O.
    state: Mutex<State>,
    rung: Condvar,
}

impl Wants {
    /// Notes that `image` was looked for at `now`.
    pub fn note(&self, image: &str, now: Instant) {
        let mut state = self.state.lock();
        let fresh = state.told.get(image).is_none_or(|told| now.duration_since(*told) >= AGAIN);
        if !fresh || state.waiting.len() >= WAITING_MAX {
            return;
        }
        if state.told.len() >= TOLD_MAX {
            state.told.retain(|_, told| now.duration_since(*told) < AGAIN);
        }
        if state.told.len() < TOLD_MAX {
            state.told.insert(image.to_owned(), now);
            state.waiting.push_back(image.to_owned());
            self.rung.notify_one();
        }
    }

    /// The next name, once there is one.
    fn next(&self) -> String {
        let mut state = self.state.lock();
        loop {
            match state.waiting.pop_front() {
                Some(image) => return image,
                None => self.rung.wait(&mut state),
            }
        }
    }

    /// Tells the coordinator; never returns.
    pub fn run(&self, client: &Client) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return tracing::error!("the coordinator is not told which images lack: {error}"),
        };
        loop {
            let wanted = Wanted { image: self.next() };
            let told = runtime.block_on(async { tokio::time::timeout(PATIENCE, client.want(&wanted)).await });
            match told {
                Ok(Ok(answer)) => tracing::info!("image {} is not in the store: {:?}", wanted.image, answer.outcome),
                Ok(Err(error)) => tracing::debug!("the coordinator is not told that {} lacks: {error}", wanted.image),
                Err(_) => tracing::debug!("the coordinator takes too long to hear that {} lacks", wanted.image),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_told_once_in_a_while_and_lists_stay_short() {
        let (wants, now) = (Wants::default(), Instant::now());
        wants.note("r/a:1", now);
        wants.note("r/a:1", now + Duration::from_secs(5));
        wants.note("r/a:2", now);
        assert_eq!((wants.next(), wants.next()), ("r/a:1".to_owned(), "r/a:2".to_owned()));
        wants.note("r/a:1", now + AGAIN);
        assert_eq!(wants.next(), "r/a:1");
        (0..5000).for_each(|n| wants.note(&format!("r/b:{n}"), now));
        let state = wants.state.lock();
        assert!(state.waiting.len() == WAITING_MAX && state.told.len() <= TOLD_MAX);
    }
}
