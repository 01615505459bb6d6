//! Images that somebody on this host looked for and did not find. The coordinator is told, so that it hurries to
//! provide them.
//!
//! A look-up notes a name and goes on: it never waits for the coordinator, and a coordinator that does not answer costs
//! nothing. However often a name is looked for, it is told once in [`AGAIN`], or as seldom as the coordinator wishes. A
//! host tells [`BURST`] names at once and one in [`PAUSE`] after that: each may become a pull job, and whoever walks
//! through names that do not exist must not fill the coordinator's list. A coordinator that is busy is told again
//! later. Only tags of repositories that the store knows are told: of another path nobody can say where the repository
//! ends and the tag begins.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use coordinator_api::Client;
use coordinator_api::error::ErrorCode;
use coordinator_api::wanted::{Wanted, WantedAnswer};
use parking_lot::{Condvar, Mutex};
use store::image::ImageRef;

use crate::uplink::coordinator::{AskError, Coordinator};

/// How long a name is not told again.
const AGAIN: Duration = Duration::from_secs(30);
/// How many names may wait to be told at once, when none was told for long. Further ones are dropped: they will be
/// looked for again.
const BURST: u32 = 16;
/// After a burst, one more name may be told in this time.
const PAUSE: Duration = Duration::from_secs(15);
/// A coordinator that is busy is told again after this.
const LATER: Duration = Duration::from_secs(15);
/// The longest time for which a coordinator may ask not to be told a name again.
const LONGEST: Duration = Duration::from_secs(3600);
/// The most names that wait to be told.
const WAITING: usize = 256;
/// How long to wait for the coordinator's answer.
const TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<String>,
    /// Names that were told, and the time until which they are not told again.
    told: HashMap<String, Instant>,
    /// When a whole burst may be told again: each name puts this off by [`PAUSE`].
    rested: Option<Instant>,
    dropped: u64,
}

impl State {
    /// Whether one more name may be told now; if so, it is counted.
    fn may_tell(&mut self, now: Instant) -> bool {
        let rested = self.rested.map_or(now, |rested| rested.max(now)) + PAUSE;
        let may = rested <= now + PAUSE * BURST;
        if may {
            self.rested = Some(rested);
        }
        may
    }
}

/// Images that this host has looked for in vain.
#[derive(Debug, Default)]
pub struct ImageMisses {
    /// Guards both lists; never held during I/O.
    state: Mutex<State>,
    rung: Condvar,
}

impl ImageMisses {
    /// Notes that `image` was looked for at `now`.
    pub fn note(&self, image: &str, now: Instant) {
        let mut state = self.state.lock();
        let fresh = state.told.get(image).is_none_or(|until| now >= *until);
        // The coordinator would refuse a text that is not the name of an image.
        if !fresh || image.parse::<ImageRef>().is_err() {
            return;
        }
        if state.waiting.len() >= WAITING || !state.may_tell(now) {
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
        state.told.retain(|_, until| now < *until);
        state.told.insert(image.to_owned(), now + AGAIN);
        state.waiting.push_back(image.to_owned());
        self.rung.notify_one();
    }

    /// Waits for the next name.
    fn next(&self) -> String {
        let mut state = self.state.lock();
        loop {
            match state.waiting.pop_front() {
                Some(image) => return image,
                None => self.rung.wait(&mut state),
            }
        }
    }

    /// Takes the coordinator's answer about `image`; returns whether to leave the coordinator alone for a while.
    fn heard(&self, image: String, told: &Result<WantedAnswer, AskError>, now: Instant) -> bool {
        match told {
            Ok(answer) => {
                tracing::info!("image {image} is not in the store: {:?}", answer.outcome);
                if let Some(seconds) = answer.again_seconds {
                    let until = now + Duration::from_secs(seconds).min(LONGEST);
                    self.state.lock().told.insert(image, until);
                }
                false
            }
            Err(AskError::Client(error)) if error.code() == Some(ErrorCode::Busy) => {
                tracing::debug!("the coordinator is told later that {image} lacks: {error}");
                self.state.lock().waiting.push_front(image);
                true
            }
            Err(error) => {
                tracing::debug!("the coordinator is not told that {image} lacks: {error}");
                false
            }
        }
    }

    /// Tells the coordinator of names; never returns, unless there can be no client.
    pub fn run(&self, client: Client) {
        let coordinator = match Coordinator::new(client) {
            Ok(coordinator) => coordinator,
            Err(error) => return tracing::error!("the coordinator is not told which images lack: {error}"),
        };
        loop {
            let wanted = Wanted { image: self.next() };
            let told = coordinator.ask(TIMEOUT, async |client| client.want(&wanted).await);
            if self.heard(wanted.image, &told, Instant::now()) {
                std::thread::sleep(LATER);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use coordinator_api::client::ClientError;
    use coordinator_api::error::ErrorDetail;
    use coordinator_api::wanted::WantedOutcome;

    use super::*;

    #[test]
    fn a_name_is_told_once_in_a_while_and_lists_stay_short() {
        let (misses, now) = (ImageMisses::default(), Instant::now());
        misses.note("r/a:1", now);
        misses.note("r/a:1", now + Duration::from_secs(5));
        misses.note("r/a:2", now);
        assert_eq!((misses.next(), misses.next()), ("r/a:1".to_owned(), "r/a:2".to_owned()));
        misses.note("r/a:1", now + AGAIN);
        assert_eq!(misses.next(), "r/a:1");
        misses.note("r/a: no name", now + AGAIN);
        assert!(misses.state.lock().waiting.is_empty());
    }

    #[test]
    fn a_name_that_the_coordinator_does_not_take_now_is_told_again_and_one_that_is_not_there_more_rarely() {
        let (misses, now) = (ImageMisses::default(), Instant::now());
        misses.note("r/a:1", now);
        misses.note("r/a:2", now);
        let busy = Err(AskError::Client(ClientError::Refused(ErrorDetail {
            code: ErrorCode::Busy,
            message: "later".to_owned(),
        })));
        assert!(misses.heard(misses.next(), &busy, now));
        assert_eq!(misses.next(), "r/a:1", "what was not taken goes first");
        let answer = WantedAnswer { outcome: WantedOutcome::Noted, job: None, again_seconds: Some(600) };
        assert!(!misses.heard("r/a:1".to_owned(), &Ok(answer), now));
        misses.note("r/a:1", now + Duration::from_secs(599));
        assert_eq!(misses.next(), "r/a:2");
        assert!(misses.state.lock().waiting.is_empty());
        misses.note("r/a:1", now + Duration::from_secs(600));
        assert_eq!(misses.next(), "r/a:1");
    }

    #[test]
    fn however_many_names_are_looked_for_few_are_told() {
        let (misses, start) = (ImageMisses::default(), Instant::now());
        let look = |from: u32, now: Instant| (from..from + 5000).for_each(|n| misses.note(&format!("r/b:{n}"), now));
        let told = || std::mem::take(&mut misses.state.lock().waiting).len() as u32;
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
        assert!(misses.state.lock().told.len() <= 2 * BURST as usize);
    }
}
