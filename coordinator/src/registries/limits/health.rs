//! The condition of one registry, and of each of its repositories that has failed: breakers, pauses that were asked for, what is left of
//! its rate limit, and its speed. Pure logic: the caller passes the time, and [`super::Limits`] holds the lock.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;

use crate::registries::limits::breaker::{self, Breaker, Pass, Transition};
use crate::registries::limits::bucket::Bucket;
use crate::registries::limits::outcome::{HoldReason, OnHold, Outcome};
use crate::registries::limits::pause::Pause;
use crate::registries::limits::rate_limit::RateLimit;
use crate::registries::limits::speed::Speed;
use crate::state::clock::{after, until};

/// The longest pause after a first 429: as long as a request waits.
const FIRST_LIMIT: Duration = Duration::from_secs(300);

/// The longest pause after a first fault with a `Retry-After`.
const FIRST_FAULT: Duration = Duration::from_secs(60);

/// The longest interval between requests for manifests while headers say that none are left.
const LONGEST_SHARE: Duration = Duration::from_secs(5);

/// Maximum number of repositories of one registry whose failures are remembered.
pub(super) const MOST_REPOSITORIES: usize = 100;

/// The condition of a registry, or of one of its repositories.
#[derive(Default)]
pub(super) struct Health {
    pub(super) breaker: Breaker,
    pub(super) failure: String,
    pub(super) pause: Pause,
}

impl Health {
    /// Why requests, other than the breaker's probe, are held back at `now`, if they are. `whose` names the registry or repository in the
    /// reason.
    pub(super) fn held(&self, now: Timestamp, by: HoldReason, whose: &str) -> Option<OnHold> {
        let open = self.breaker.opens_at(now).map(|until| OnHold { by, until, why: self.why_open(whose) });
        let paused = self.pause.until(now).map(|until| {
            let why = format!("{whose} asked us to wait");
            OnHold { by: HoldReason::RetryAfter, until, why }
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
pub(super) struct RegistryHealth {
    pub(super) own: Health,
    /// Repositories that failed.
    pub(super) repositories: HashMap<String, Health>,
    pub(super) rate_limit: Option<RateLimit>,
    /// When the next manifest may be requested, while the rate limit says that none are left.
    pub(super) next_manifest: Timestamp,
    pub(super) requests: Bucket,
    pub(super) bytes: Bucket,
    pub(super) speed: Speed,
}

impl RegistryHealth {
    pub(super) fn new(now: Timestamp, speed: Option<f64>) -> RegistryHealth {
        RegistryHealth {
            own: Health::default(),
            repositories: HashMap::new(),
            rate_limit: None,
            next_manifest: Timestamp::UNIX_EPOCH,
            requests: Bucket::new(now),
            bytes: Bucket::new(now),
            speed: Speed::new(speed),
        }
    }

    /// Why requests, other than probes, to the registry or one of its repositories are held back at `now`, if they are.
    pub(super) fn held(&self, now: Timestamp, repository: Option<&str>) -> Option<OnHold> {
        let own = self.own.held(now, HoldReason::Registry, "it");
        let health = repository.and_then(|name| Some((name, self.repositories.get(name)?)));
        let its = health.and_then(|(name, health)| health.held(now, HoldReason::Repository, &its(name)));
        own.into_iter().chain(its).max_by_key(|held| held.until)
    }

    /// Whether forgetting it loses nothing but a measured speed.
    pub(super) fn is_idle(&self, now: Timestamp) -> bool {
        let is_due = |rate_limit: &RateLimit| now < rate_limit.more_at;
        self.speed.active() == 0
            && self.own.is_idle(now)
            && self.repositories.values().all(|health| health.is_idle(now))
            && !self.rate_limit.as_ref().is_some_and(is_due)
    }

    /// The condition of a repository that has failed; `None` if too many others have.
    pub(super) fn health(&mut self, repository: &str, now: Timestamp) -> Option<&mut Health> {
        if self.repositories.len() >= MOST_REPOSITORIES && !self.repositories.contains_key(repository) {
            self.repositories.retain(|_, health| health.held(now, HoldReason::Repository, "").is_some());
            if self.repositories.len() >= MOST_REPOSITORIES {
                return None;
            }
        }
        Some(self.repositories.entry(repository.to_owned()).or_default())
    }

    /// Admits a request or a probe.
    pub(super) fn admit(&mut self, now: Timestamp, repository: Option<&str>) -> Result<Pass, OnHold> {
        let own = &mut self.own;
        let pass = own.breaker.admit(now).map_err(|until| OnHold {
            by: HoldReason::Registry,
            until,
            why: own.why_open("it"),
        })?;
        let health = repository.and_then(|name| Some((name, self.repositories.get_mut(name)?)));
        if let (Pass::Go, Some((name, health))) = (pass, health) {
            // A repository's probe is the request itself.
            let admitted = health.breaker.admit(now);
            admitted.map_err(|until| OnHold { by: HoldReason::Repository, until, why: health.why_open(&its(name)) })?;
        }
        Ok(pass)
    }

    /// When the next manifest may be requested, if headers say that none are left and that time is still to come.
    pub(super) fn next_manifest(&self, now: Timestamp) -> Option<Timestamp> {
        let is_spent = self.rate_limit.is_some_and(|rate_limit| rate_limit.remaining == 0 && now < rate_limit.more_at);
        // A time further away was computed by a clock that was ahead.
        let is_soon = now < self.next_manifest && self.next_manifest <= after(now, LONGEST_SHARE);
        (is_spent && is_soon).then_some(self.next_manifest)
    }

    /// Delays the next manifest by its share, after one was requested or received.
    pub(super) fn share(&mut self, now: Timestamp) {
        if let Some(rate_limit) = self.rate_limit.filter(|rate_limit| rate_limit.remaining == 0) {
            self.next_manifest = after(now, until(now, rate_limit.more_at).min(LONGEST_SHARE));
        }
    }

    /// Records how a request ended. Returns how the registry's own breaker changed, and its repository's.
    pub(super) fn note(&mut self, repository: Option<&str>, outcome: Outcome, now: Timestamp) -> [Transition; 2] {
        match outcome {
            Outcome::Answered => self.answered(repository, now),
            Outcome::Refused => {
                self.undecided(repository, now);
                [self.own.breaker.refused(), Transition::Same]
            }
            Outcome::Unanswered(why) => {
                self.undecided(repository, now);
                self.own.failure = why;
                [self.own.breaker.failed(now), Transition::Same]
            }
            Outcome::Failed(why) => self.failed(repository, why, now),
            Outcome::AskedToWait { wait, fault: None } => {
                self.undecided(repository, now);
                self.own.pause.ask(now, wait, FIRST_LIMIT);
                [self.own.breaker.refused(), Transition::Same]
            }
            Outcome::AskedToWait { wait, fault: Some(why) } => {
                let health = match repository {
                    Some(name) => self.health(name, now),
                    None => Some(&mut self.own),
                };
                if let Some(health) = health {
                    health.pause.ask(now, wait, FIRST_FAULT);
                }
                self.failed(repository, why, now)
            }
        }
    }

    /// Records an outcome that says nothing about the repository.
    fn undecided(&mut self, repository: Option<&str>, now: Timestamp) {
        if let Some(health) = repository.and_then(|name| self.repositories.get_mut(name)) {
            health.breaker.undecided(now);
        }
    }

    fn answered(&mut self, repository: Option<&str>, now: Timestamp) -> [Transition; 2] {
        self.own.pause.answered(now);
        // An answer by the registry itself says nothing about its documents.
        let Some(name) = repository else { return [self.own.breaker.refused(), Transition::Same] };
        let transition = self.own.breaker.succeeded();
        let Some(health) = self.repositories.get_mut(name) else { return [transition, Transition::Same] };
        health.pause.answered(now);
        let its = health.breaker.succeeded();
        if health.is_idle(now) {
            self.repositories.remove(name);
        }
        [transition, its]
    }

    fn failed(&mut self, repository: Option<&str>, why: String, now: Timestamp) -> [Transition; 2] {
        self.own.failure.clone_from(&why);
        let Some(name) = repository else { return [self.own.breaker.failed(now), Transition::Same] };
        let transition = self.own.breaker.document_failed(name, now);
        let Some(health) = self.health(name, now) else { return [transition, Transition::Same] };
        health.failure = why;
        let its = health.breaker.failed(now);
        if matches!(its, Transition::Opened(_)) {
            self.own.breaker.suspect(now);
        }
        [transition, its]
    }
}

/// How a message about a registry refers to one of its repositories.
pub(super) fn its(repository: &str) -> String {
    format!("its repository {repository}")
}
