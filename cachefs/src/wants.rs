//! Images that somebody on this host looked for and did not find: the coordinator is told, so that it hurries.
//!
//! A lookup notes a name and goes on: it never waits for the coordinator, and a coordinator that does not answer costs
//! nothing. A name is told once in [`AGAIN`], however often it is looked for, or as seldom as the coordinator wishes, and a host
//! tells [`BURST`] names at once and one in [`PAUSE`] after that: each may become a pull job, and whoever walks through names that
//! are not there must not fill the coordinator's list. A coordinator that has heard enough for now is told again later. Only tags of repositories that the store knows are told: of another path nobody can say where the
//! repository ends and the tag begins.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use coordinator_api::Client;
use coordinator_api::client::ClientError;
use coordinator_api::error::ErrorCode;
use coordinator_api::wanted::{Wanted, WantedAnswer};
use parking_lot::{Condvar, Mutex};
use store::image::ImageRef;

/// A name is told again after this.
const AGAIN: Duration = Duration::from_secs(30);
/// Names that are told at once when none was told for long: as many as wait; more are dropped, they will be looked for again.
const BURST: u32 = 16;
/// Then one more may be told in this time.
const PAUSE: Duration = Duration::from_secs(15);
/// A coordinator that has heard enough for now is told again after this.
const LATER: Duration = Duration::from_secs(15);
/// No coordinator's wish for silence about a name is followed for longer.
const LONGEST: Duration = Duration::from_secs(3600);
/// As many names wait at most.
const WAITING: usize = 256;
/// A coordinator that takes longer is not waited for.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<String>,
    /// Until when names are not told again.
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
        // What is no name of an image would be refused.
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

    /// Takes a coordinator's answer about `image`, and tells whether it is to be left alone for a while.
    fn heard(&self, image: String, told: &Result<WantedAnswer, ClientError>, now: Instant) -> bool {
        match told {
            Ok(answer) => {
                tracing::info!("image {image} is not in the store: {:?}", answer.outcome);
                if let Some(seconds) = answer.again_seconds {
                    let until = now + Duration::from_secs(seconds).min(LONGEST);
                    self.state.lock().told.insert(image, until);
                }
                false
            }
            Err(error) if error.code() == Some(ErrorCode::Busy) => {
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
                Ok(told) => {
                    if self.heard(wanted.image, &told, Instant::now()) {
                        std::thread::sleep(LATER);
                    }
                }
                Err(_) => tracing::debug!("the coordinator takes too long to hear that {} lacks", wanted.image),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use coordinator_api::error::ErrorDetail;
    use coordinator_api::wanted::WantedOutcome;

    use super::*;

    #[test]
    fn a_name_is_told_once_in_a_while_and_lists_stay_short() {
        let (wants, now) = (ImageMisses::default(), Instant::now());
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
    fn a_name_that_the_coordinator_does_not_take_now_is_told_again_and_one_that_is_not_there_more_rarely() {
        let (wants, now) = (ImageMisses::default(), Instant::now());
        wants.note("r/a:1", now);
        wants.note("r/a:2", now);
        let busy = Err(ClientError::Refused(ErrorDetail { code: ErrorCode::Busy, message: "later".to_owned() }));
        assert!(wants.heard(wants.next(), &busy, now));
        assert_eq!(wants.next(), "r/a:1", "what was not taken goes first");
        let answer = WantedAnswer { outcome: WantedOutcome::Noted, job: None, again_seconds: Some(600) };
        assert!(!wants.heard("r/a:1".to_owned(), &Ok(answer), now));
        wants.note("r/a:1", now + Duration::from_secs(599));
        assert_eq!(wants.next(), "r/a:2");
        assert!(wants.state.lock().waiting.is_empty());
        wants.note("r/a:1", now + Duration::from_secs(600));
        assert_eq!(wants.next(), "r/a:1");
    }

    #[test]
    fn however_many_names_are_looked_for_few_are_told() {
        let (wants, start) = (ImageMisses::default(), Instant::now());
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
