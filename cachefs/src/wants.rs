//! Images that somebody on this host looked for and did not find: the coordinator is told, so that it hurries.
//!
//! A lookup notes a name and goes on: it never waits for the coordinator, and a coordinator that does not answer costs
//! nothing. A name is told once in [`AGAIN`], however often it is looked for, and a host tells [`BURST`] names at once and one
//! in [`PAUSE`] after that: each may become a pull job, and whoever walks through names that are not there must not fill the
//! coordinator's list. Only tags of repositories that the store knows are told: of another path nobody can say where the
//! repository ends and the tag begins.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use coordinator_api::Client;
use coordinator_api::wanted::Wanted;
use parking_lot::{Condvar, Mutex};
use store::image::ImageRef;

/// A name is told again after this.
const AGAIN: Duration = Duration::from_secs(30);
/// Names that are told at once when none was told for long: as many as wait; more are dropped, they will be looked for again.
const BURST: u32 = 16;
/// Then one more may be told in this time.
const PAUSE: Duration = Duration::from_secs(15);
/// A coordinator that takes longer is not waited for.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<String>,
    told: HashMap<String, Instant>,
    /// When all that is allowed at once may be told again: each name puts it off by a pause.
    rested: Option<Instant>,
    dropped: u64,
}

impl State {
    /// Whether one more name may be told.
    fn may_tell(&mut self, now: Instant) -> bool {
        let rested = self.rested.map_or(now, |rested| rested.max(now)) + PAUSE;
        let may = rested <= now + PAUSE * BURST;
        if may {
            self.rested = Some(rested);
        }
        may
    }
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
        // What is no name of an image would be refused.
        if !fresh || image.parse::<ImageRef>().is_err() {
            return;
        }
        if !state.may_tell(now) {
            state.dropped += 1;
            if state.dropped.is_power_of_two() {
                tracing::warn!(
                    "images are looked for that are not in the store, more than the coordinator is told of: {} so far, the last \
                     one is {image:?}",
                    state.dropped
                );
            }
            return;
        }
        state.told.retain(|_, told| now.duration_since(*told) < AGAIN);
        state.told.insert(image.to_owned(), now);
        state.waiting.push_back(image.to_owned());
        self.rung.notify_one();
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
        wants.note("r/a: no name", now + AGAIN);
        assert!(wants.state.lock().waiting.is_empty());
    }

    #[test]
    fn however_many_names_are_looked_for_few_are_told() {
        let (wants, start) = (Wants::default(), Instant::now());
        let look = |from: u32, now: Instant| (from..from + 5000).for_each(|n| wants.note(&format!("r/b:{n}"), now));
        let told = || std::mem::take(&mut wants.state.lock().waiting).len() as u32;
        look(0, start);
        assert_eq!(told(), BURST);
        look(5000, start + PAUSE / 2);
        assert_eq!(told(), 0);
        look(10_000, start + PAUSE);
        assert_eq!(told(), 1);
        look(15_000, start + PAUSE * 4);
        assert_eq!(told(), 3);
        look(20_000, start + PAUSE * 1000);
        assert_eq!(told(), BURST, "never more at once");
        assert!(wants.state.lock().told.len() <= 2 * BURST as usize);
    }
}
