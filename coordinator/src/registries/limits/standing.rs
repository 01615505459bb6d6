//! How one registry stands, and each repository of it that has failed: breakers, the pauses that were asked for, what is left of its rate
//! limit, and how fast it is. Pure: the time is given, and [`super::Limits`] guards it.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;

use crate::registries::limits::breaker::{self, Breaker, Pass, Turn};
use crate::registries::limits::bucket::Bucket;
use crate::registries::limits::pause::Pause;
use crate::registries::limits::rate_limit::RateLimit;
use crate::registries::limits::speed::Speed;
use crate::registries::limits::{Held, HeldBy, Outcome};
use crate::state::clock::{after, until};

/// How long a first 429 holds at most: as long as a request waits.
const FIRST_LIMIT: Duration = Duration::from_secs(300);

/// How long a first fault with a `Retry-After` holds at most.
const FIRST_FAULT: Duration = Duration::from_secs(60);

/// How far apart manifests are asked for at most while headers say that none are left.
const LONGEST_SHARE: Duration = Duration::from_secs(5);

/// Of more repositories of one registry than these is not remembered that they failed.
pub(super) const MOST_REPOSITORIES: usize = 100;

/// How a registry, or one repository of it, stands.
#[derive(Default)]
pub(super) struct Standing {
    pub(super) breaker: Breaker,
    pub(super) failure: String,
    pub(super) pause: Pause,
}

impl Standing {
    /// Why nothing goes out at `now`, the breaker's probe apart; `whose` is who stands so.
    pub(super) fn held(&self, now: Timestamp, by: HeldBy, whose: &str) -> Option<Held> {
        let open = self.breaker.opens_at(now).map(|until| Held { by, until, why: self.why_open(whose) });
        let paused = self.pause.until(now).map(|until| {
            let why = format!("{whose} asked us to wait");
            Held { by: HeldBy::Wish, until, why }
        });
        open.into_iter().chain(paused).max_by_key(|held| held.until)
    }

    pub(super) fn why_open(&self, whose: &str) -> String {
        let failure = &self.failure;
        match self.breaker.failures() {
            _ if self.breaker.is_slow() => format!("{whose} sends too slowly, last: {failure}"),
            _ if self.breaker.is_failing_everywhere() => {
                format!("documents of {} repositories failed and none came, last with: {failure}", breaker::SEVERAL)
            }
            1 => format!("{whose} failed: {failure}"),
            failures => format!("{whose} failed {failures} times in a row, last with: {failure}"),
        }
    }

    /// Whether there is nothing to remember.
    pub(super) fn is_idle(&self, now: Timestamp) -> bool {
        self.breaker == Breaker::default() && self.pause.until(now).is_none()
    }
}

/// What is known of one registry.
pub(super) struct Registry {
    pub(super) own: Standing,
    /// Repositories that failed.
    pub(super) repositories: HashMap<String, Standing>,
    pub(super) allowance: Option<RateLimit>,
    /// When the next manifest may be asked for, while the allowance says that none are left.
    pub(super) next_manifest: Timestamp,
    pub(super) requests: Bucket,
    pub(super) bytes: Bucket,
    pub(super) speed: Speed,
}

impl Registry {
    pub(super) fn new(now: Timestamp, speed: Option<f64>) -> Registry {
        Registry {
            own: Standing::default(),
            repositories: HashMap::new(),
            allowance: None,
            next_manifest: Timestamp::UNIX_EPOCH,
            requests: Bucket::new(now),
            bytes: Bucket::new(now),
            speed: Speed::new(speed),
        }
    }

    /// Why nothing goes out at `now`, probes apart, to the registry or one repository of it.
    pub(super) fn held(&self, now: Timestamp, repository: Option<&str>) -> Option<Held> {
        let own = self.own.held(now, HeldBy::Registry, "it");
        let standing = repository.and_then(|name| Some((name, self.repositories.get(name)?)));
        let its = standing.and_then(|(name, standing)| standing.held(now, HeldBy::Repository, &its(name)));
        own.into_iter().chain(its).max_by_key(|held| held.until)
    }

    /// Whether forgetting it loses nothing but a measured speed.
    pub(super) fn is_idle(&self, now: Timestamp) -> bool {
        let is_due = |allowance: &RateLimit| now < allowance.more_at;
        self.speed.active() == 0
            && self.own.is_idle(now)
            && self.repositories.values().all(|standing| standing.is_idle(now))
            && !self.allowance.as_ref().is_some_and(is_due)
    }

    /// How a repository stands that has failed; nothing if too many others have.
    pub(super) fn standing(&mut self, repository: &str, now: Timestamp) -> Option<&mut Standing> {
        if self.repositories.len() >= MOST_REPOSITORIES && !self.repositories.contains_key(repository) {
            self.repositories.retain(|_, standing| standing.held(now, HeldBy::Repository, "").is_some());
            if self.repositories.len() >= MOST_REPOSITORIES {
                return None;
            }
        }
        Some(self.repositories.entry(repository.to_owned()).or_default())
    }

    /// Lets a request or a probe out.
    pub(super) fn admit(&mut self, now: Timestamp, repository: Option<&str>) -> Result<Pass, Held> {
        let own = &mut self.own;
        let pass =
            own.breaker.admit(now).map_err(|until| Held { by: HeldBy::Registry, until, why: own.why_open("it") })?;
        let standing = repository.and_then(|name| Some((name, self.repositories.get_mut(name)?)));
        if let (Pass::Go, Some((name, standing))) = (pass, standing) {
            // Its probe is the request itself.
            let admitted = standing.breaker.admit(now);
            admitted.map_err(|until| Held { by: HeldBy::Repository, until, why: standing.why_open(&its(name)) })?;
        }
        Ok(pass)
    }

    /// When a manifest may be asked for, if headers say that none are left and that is not now.
    pub(super) fn next_manifest(&self, now: Timestamp) -> Option<Timestamp> {
        let is_spent = self.allowance.is_some_and(|allowance| allowance.remaining == 0 && now < allowance.more_at);
        // What is further away was noted by a clock that was ahead.
        let is_soon = now < self.next_manifest && self.next_manifest <= after(now, LONGEST_SHARE);
        (is_spent && is_soon).then_some(self.next_manifest)
    }

    /// A manifest goes out, or has come: the next one waits its share.
    pub(super) fn share(&mut self, now: Timestamp) {
        if let Some(allowance) = self.allowance.filter(|allowance| allowance.remaining == 0) {
            self.next_manifest = after(now, until(now, allowance.more_at).min(LONGEST_SHARE));
        }
    }

    /// Notes how a request ended; how the registry's own breaker turned, and its repository's.
    pub(super) fn note(&mut self, repository: Option<&str>, outcome: Outcome, now: Timestamp) -> [Turn; 2] {
        match outcome {
            Outcome::Answered => self.answered(repository, now),
            Outcome::Refused => {
                self.undecided(repository, now);
                [self.own.breaker.refused(), Turn::Same]
            }
            Outcome::Unanswered(why) => {
                self.undecided(repository, now);
                self.own.failure = why;
                [self.own.breaker.failed(now), Turn::Same]
            }
            Outcome::Failed(why) => self.failed(repository, why, now),
            Outcome::AskedToWait { wait, fault: None } => {
                self.undecided(repository, now);
                self.own.pause.ask(now, wait, FIRST_LIMIT);
                [self.own.breaker.refused(), Turn::Same]
            }
            Outcome::AskedToWait { wait, fault: Some(why) } => {
                let standing = match repository {
                    Some(name) => self.standing(name, now),
                    None => Some(&mut self.own),
                };
                if let Some(standing) = standing {
                    standing.pause.ask(now, wait, FIRST_FAULT);
                }
                self.failed(repository, why, now)
            }
        }
    }

    /// What happened tells nothing of a repository.
    fn undecided(&mut self, repository: Option<&str>, now: Timestamp) {
        if let Some(standing) = repository.and_then(|name| self.repositories.get_mut(name)) {
            standing.breaker.undecided(now);
        }
    }

    fn answered(&mut self, repository: Option<&str>, now: Timestamp) -> [Turn; 2] {
        self.own.pause.answered(now);
        // That it is there tells nothing of its documents.
        let Some(name) = repository else { return [self.own.breaker.refused(), Turn::Same] };
        let turn = self.own.breaker.succeeded();
        let Some(standing) = self.repositories.get_mut(name) else { return [turn, Turn::Same] };
        standing.pause.answered(now);
        let its = standing.breaker.succeeded();
        if standing.is_idle(now) {
            self.repositories.remove(name);
        }
        [turn, its]
    }

    fn failed(&mut self, repository: Option<&str>, why: String, now: Timestamp) -> [Turn; 2] {
        self.own.failure.clone_from(&why);
        let Some(name) = repository else { return [self.own.breaker.failed(now), Turn::Same] };
        let turn = self.own.breaker.document_failed(name, now);
        let Some(standing) = self.standing(name, now) else { return [turn, Turn::Same] };
        standing.failure = why;
        let its = standing.breaker.failed(now);
        if matches!(its, Turn::Opened(_)) {
            self.own.breaker.suspect(now);
        }
        [turn, its]
    }
}

/// What a message about a registry calls a repository of it.
pub(super) fn its(repository: &str) -> String {
    format!("its repository {repository}")
}
