//! Limits on pulling, enforced where resources are used: slots for layers, bytes a second, requests. Also tracks the condition of each
//! registry.
//!
//! ```text
//!  a layer   ── permit() ─▶ waits for a free slot, in all and at its registry; the most urgent goes first
//!  a request ── admit() ──▶ waits while the breaker is open, the registry asked to wait, or the minute's requests are spent
//!  an answer ── report() ─▶ opens or closes breakers, notes Retry-After and rate-limit headers
//!  bytes     ── spend() ──▶ waits as long as the bandwidth limits require
//! ```
//!
//! What an answer delays: a 429 with `Retry-After` holds back all requests to its registry. A fault (503) with `Retry-After` holds back its
//! repository if it answered a request for a document, and otherwise its registry. Neither holds for long the first time ([`pause`]).
//! Headers that report no requests left only slow down requests for manifests: the registry still answers, and sends 429 when it does not.
//!
//! Rules may change at any moment, and apply to requests that already wait. `state` guards everything and is never held across an await.

pub mod breaker;
pub mod bucket;
mod health;
pub mod jobs;
mod outcome;
pub mod pause;
pub mod priority;
pub mod rate_limit;
pub mod rules;
pub mod slots;
pub mod speed;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use coordinator_api::limits::RegistryCondition;
use jiff::Timestamp;
use parking_lot::Mutex;
use store::image::ImageRef;
use tokio::sync::Notify;

use crate::registries::limits::breaker::{Pass, Transition};
use crate::registries::limits::bucket::Bucket;
use crate::registries::limits::health::{RegistryHealth, its};
use crate::registries::limits::priority::Waiters;
use crate::registries::limits::rate_limit::RateLimit;
use crate::registries::limits::rules::Rules;
use crate::registries::limits::slots::{Capacity, Slots, beyond};

pub use crate::registries::limits::outcome::{HoldReason, OnHold, Outcome};
use crate::state::clock::{Clock, SystemClock, after, until};

/// Longest sleep before the rules are read again, because they may have changed.
const SLICE: Duration = Duration::from_secs(1);

/// How long a request waits for a repository whose breaker is open. A short fault should be waited out, but a waiting request occupies a
/// slot that others need. Jobs that have not started wait without a slot.
const REPOSITORY_TIMEOUT: Duration = Duration::from_secs(20);

/// From this many registries on, idle ones are forgotten.
const MOST_REGISTRIES: usize = 1000;

/// Default number of layers fetched at a time: the same as dockerd's (max-concurrent-downloads).
pub const DEFAULT_PARALLEL_LAYERS: usize = 3;

/// The kind of a request: registries count kinds differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestKind {
    /// A request for a manifest: the kind that Docker Hub counts.
    Manifest,
    /// Anything else.
    Other,
}

/// What a request is addressed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target<'a> {
    /// The registry, or a token service.
    pub registry: &'a str,
    /// The repository that the request is for; `None` if it concerns the registry itself.
    pub repository: Option<&'a str>,
}

impl<'a> Target<'a> {
    /// The registry itself.
    pub fn registry(registry: &'a str) -> Target<'a> {
        Target { registry, repository: None }
    }
}

/// A change of a registry's breaker that is reported as an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegistryEvent {
    /// Its breaker has opened.
    Opened {
        /// The registry.
        registry: String,
        /// Until when it stays open.
        until: Timestamp,
        /// The last failure.
        why: String,
    },
    /// Its breaker has closed again.
    Closed {
        /// The registry.
        registry: String,
    },
}

struct State {
    rules: Arc<Rules>,
    registries: HashMap<String, RegistryHealth>,
    bytes: Bucket,
    slots: Slots,
    events: Vec<RegistryEvent>,
}

impl State {
    fn registry(&mut self, name: &str, now: Timestamp) -> &mut RegistryHealth {
        if self.registries.len() >= MOST_REGISTRIES && !self.registries.contains_key(name) {
            // Registries may name any number of token services, so the map must be bounded.
            self.registries.retain(|_, registry| !registry.is_idle(now));
            if self.registries.len() >= MOST_REGISTRIES {
                self.registries.retain(|_, registry| registry.speed.active() > 0);
            }
        }
        self.registries.entry(name.to_owned()).or_insert_with(|| RegistryHealth::new(now, None))
    }
}

/// All limits of one coordinator.
pub struct Limits {
    clock: Arc<dyn Clock>,
    /// Layers fetched at a time if the rules do not say.
    parallel_layers: usize,
    state: Mutex<State>,
    /// Notified when a slot becomes free, a ticket is given up, the rules change, or a breaker changes state.
    changed: Notify,
}

impl std::fmt::Debug for Limits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Limits").finish_non_exhaustive()
    }
}

/// How many layers may be fetched at a time, according to the rules.
struct LayerCapacity<'a> {
    rules: &'a Rules,
    default: usize,
}

impl Capacity for LayerCapacity<'_> {
    fn in_all(&self) -> usize {
        self.rules.parallel_layers.unwrap_or(self.default)
    }

    fn of(&self, registry: &str) -> usize {
        self.rules.registry(registry).parallel_layers.unwrap_or(usize::MAX)
    }

    fn beyond(&self) -> usize {
        beyond(self.in_all())
    }
}

/// The right to fetch one layer: a slot, given back on drop.
pub struct LayerPermit {
    limits: Arc<Limits>,
    registry: String,
}

impl Drop for LayerPermit {
    fn drop(&mut self) {
        let now = self.limits.clock.now();
        let mut state = self.limits.state.lock();
        state.slots.give_back(&self.registry);
        state.registry(&self.registry, now).speed.end(now);
        drop(state);
        self.limits.changed.notify_waiters();
    }
}

/// A ticket in the queue for a slot, given up on drop.
struct Ticket<'a> {
    limits: &'a Limits,
    number: u64,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.limits.state.lock().slots.leave(self.number);
        self.limits.changed.notify_waiters();
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits::new(Arc::new(SystemClock), DEFAULT_PARALLEL_LAYERS)
    }
}

impl Limits {
    /// Limits without rules. `parallel_layers` applies where the rules do not say how many layers to fetch at a time.
    pub fn new(clock: Arc<dyn Clock>, parallel_layers: usize) -> Limits {
        let state = State {
            rules: Arc::default(),
            registries: HashMap::new(),
            bytes: Bucket::new(clock.now()),
            slots: Slots::default(),
            events: Vec::new(),
        };
        Limits { clock, parallel_layers, state: Mutex::new(state), changed: Notify::new() }
    }

    /// The current time of the clock that the limits use.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Replaces the rules. This takes effect at once.
    pub fn set(&self, rules: Rules) {
        self.state.lock().rules = Arc::new(rules);
        self.changed.notify_waiters();
    }

    /// The current rules.
    pub fn rules(&self) -> Arc<Rules> {
        Arc::clone(&self.state.lock().rules)
    }

    /// Restores a speed that was measured before a restart, in bytes a second.
    pub fn remember_speed(&self, registry: &str, speed: f64) {
        let now = self.clock.now();
        self.state.lock().registries.insert(registry.to_owned(), RegistryHealth::new(now, Some(speed)));
    }

    /// Measured bytes a second by registry; registries without a measurement are left out.
    pub fn speeds(&self) -> Vec<(String, f64)> {
        let state = self.state.lock();
        let known =
            state.registries.iter().filter_map(|(name, registry)| Some((name.clone(), registry.speed.average()?)));
        known.collect()
    }

    /// Measured bytes a second of one registry, if known.
    pub fn speed(&self, registry: &str) -> Option<f64> {
        self.state.lock().registries.get(registry)?.speed.average()
    }

    /// The rate limit that a registry last stated, until it expires.
    pub fn rate_limit(&self, registry: &str) -> Option<RateLimit> {
        let now = self.clock.now();
        self.state.lock().registries.get(registry)?.rate_limit.filter(|rate_limit| now < rate_limit.more_at)
    }

    /// Why requests to a registry are held back at present, if they are.
    pub fn held(&self, registry: &str) -> Option<OnHold> {
        let now = self.clock.now();
        self.state.lock().registries.get(registry)?.held(now, None)
    }

    /// Until when requests for an image are held back because its registry asked for a pause, if it did.
    pub fn asked_to_wait(&self, image: &ImageRef) -> Option<Timestamp> {
        self.held_from(image).filter(|held| held.by == HoldReason::RetryAfter).map(|held| held.until)
    }

    /// Why requests for an image are held back at present, if they are. Its jobs need not be started then.
    pub fn held_from(&self, image: &ImageRef) -> Option<OnHold> {
        let now = self.clock.now();
        self.state.lock().registries.get(image.registry())?.held(now, Some(image.path()))
    }

    /// What is wrong with an image's registry or repository, if the last request failed.
    pub fn trouble(&self, image: &ImageRef) -> Option<String> {
        let (registry, path) = (image.registry(), image.path());
        let state = self.state.lock();
        let known = state.registries.get(registry)?;
        if known.own.breaker.failures() > 0 {
            return Some(format!("registry {registry} gives no answer: {}", known.own.why_open("it")));
        }
        let health = known.repositories.get(path).filter(|health| health.breaker.failures() > 0)?;
        Some(format!("registry {registry} fails: {}", health.why_open(&its(path))))
    }

    /// Takes the events about breakers since the last call.
    pub fn take_events(&self) -> Vec<RegistryEvent> {
        std::mem::take(&mut self.state.lock().events)
    }

    /// Waits for a slot to fetch one layer from `registry`. The priority is that of `waiters`, the jobs that want the layer.
    pub async fn permit(self: &Arc<Self>, registry: &str, waiters: &Arc<Waiters>) -> LayerPermit {
        let now = self.clock.now();
        let ticket = Ticket { limits: self, number: self.state.lock().slots.queue(registry, waiters, now) };
        loop {
            let mut freed = std::pin::pin!(self.changed.notified());
            // Notifications from here on are not missed.
            freed.as_mut().enable();
            let now = self.clock.now();
            let taken = {
                let mut state = self.state.lock();
                let rules = Arc::clone(&state.rules);
                let capacity = LayerCapacity { rules: &rules, default: self.parallel_layers };
                let taken = state.slots.take(ticket.number, &capacity, now);
                if taken {
                    state.registry(registry, now).speed.begin(now);
                }
                taken
            };
            if taken {
                return LayerPermit { limits: Arc::clone(self), registry: registry.to_owned() };
            }
            freed.await;
        }
    }

    /// Waits until a request, or a probe of the registry, may be sent. Fails at once if that would be later than `patience` from now.
    pub async fn admit(&self, target: Target<'_>, kind: RequestKind, patience: Duration) -> Result<Pass, OnHold> {
        let deadline = after(self.clock.now(), patience);
        loop {
            let held = match self.try_admit(target, kind) {
                Ok(pass) => return Ok(pass),
                Err(held) => held,
            };
            let latest = match held.by {
                HoldReason::Registry | HoldReason::RetryAfter => deadline,
                HoldReason::Repository => deadline.min(after(self.clock.now(), REPOSITORY_TIMEOUT)),
            };
            if held.until > latest {
                return Err(held);
            }
            let wait = until(self.clock.now(), held.until).clamp(Duration::from_millis(1), SLICE);
            let _ = tokio::time::timeout(wait, self.changed.notified()).await;
        }
    }

    fn try_admit(&self, target: Target<'_>, kind: RequestKind) -> Result<Pass, OnHold> {
        let now = self.clock.now();
        let mut state = self.state.lock();
        let rules = Arc::clone(&state.rules);
        let registry = state.registry(target.registry, now);
        if let Some(held) = registry.held(now, target.repository) {
            return Err(held);
        }
        if let (RequestKind::Manifest, Some(until)) = (kind, registry.next_manifest(now)) {
            return Err(OnHold { by: HoldReason::Registry, until, why: "its rate limit is used up".to_owned() });
        }
        let rate = rules.registry(target.registry).requests_per_minute;
        if let Some(requests) = rate {
            let wait = registry.requests.wait(now, f64::from(requests) / 60.0);
            if !wait.is_zero() {
                return Err(OnHold {
                    by: HoldReason::Registry,
                    until: after(now, wait),
                    why: format!("{requests} requests a minute are allowed"),
                });
            }
        }
        let pass = registry.admit(now, target.repository)?;
        if let Some(requests) = rate {
            registry.requests.take(now, 1.0, f64::from(requests) / 60.0);
        }
        if (kind, pass) == (RequestKind::Manifest, Pass::Go) {
            registry.share(now);
        }
        Ok(pass)
    }

    /// Records how a request ended, and the rate limit that the answer stated.
    pub fn report(&self, target: Target<'_>, outcome: Outcome, rate_limit: Option<RateLimit>) {
        let now = self.clock.now();
        let mut state = self.state.lock();
        let registry = state.registry(target.registry, now);
        if let Some(said) = rate_limit {
            registry.rate_limit = Some(RateLimit { more_at: said.more_at.min(after(now, pause::LONGEST)), ..said });
            registry.share(now);
        }
        let [own, its] = registry.note(target.repository, outcome, now);
        if let (Transition::Opened(until), Some(name)) = (its, target.repository) {
            let why = registry.repositories.get(name).map(|health| health.failure.as_str()).unwrap_or_default();
            tracing::warn!(
                "repository {name} of {} is left alone until {until}: it keeps failing ({why})",
                target.registry
            );
        }
        let is_turned = tell(&mut state, target.registry, own) | (its != Transition::Same);
        drop(state);
        if is_turned {
            self.changed.notify_waiters();
        }
    }

    /// Records that a transfer was aborted because it was too slow. Enough of these open the breaker, even though the registry answers.
    pub fn stalled(&self, name: &str, why: String) {
        let now = self.clock.now();
        let mut state = self.state.lock();
        let registry = state.registry(name, now);
        registry.own.failure = why;
        let transition = registry.own.breaker.stalled(now);
        let is_turned = tell(&mut state, name, transition);
        drop(state);
        if is_turned {
            self.changed.notify_waiters();
        }
    }

    /// Records that a transfer was fast enough.
    pub fn flowed(&self, name: &str) {
        let now = self.clock.now();
        self.state.lock().registry(name, now).own.breaker.flowed();
    }

    /// Counts bytes received from `registry`, then waits as long as the bandwidth limits require.
    pub async fn spend(&self, registry: &str, bytes: u64) {
        {
            let now = self.clock.now();
            let mut state = self.state.lock();
            state.registry(registry, now).speed.add(now, bytes);
            self.rates(&mut state, registry, now, |bucket, rate| bucket.take(now, bytes as f64, rate));
        }
        loop {
            let now = self.clock.now();
            let mut wait = Duration::ZERO;
            {
                let mut state = self.state.lock();
                self.rates(&mut state, registry, now, |bucket, rate| wait = wait.max(bucket.wait(now, rate)));
                if wait.is_zero() {
                    return;
                }
                state.registry(registry, now).speed.hold();
            }
            let _ = tokio::time::timeout(wait.min(SLICE), self.changed.notified()).await;
        }
    }

    /// Calls `each` with every bandwidth bucket that applies to bytes from `registry`, and with its rate in bytes a second.
    fn rates(&self, state: &mut State, registry: &str, now: Timestamp, mut each: impl FnMut(&mut Bucket, f64)) {
        let rules = Arc::clone(&state.rules);
        if let Some(rate) = rules.bandwidth_at(now) {
            each(&mut state.bytes, rate as f64);
        }
        if let Some(rate) = rules.registry(registry).bandwidth {
            each(&mut state.registry(registry, now).bytes, rate as f64);
        }
    }

    /// The condition of every known registry, sorted by name.
    pub fn view(&self) -> Vec<RegistryCondition> {
        let now = self.clock.now();
        let state = self.state.lock();
        let condition = |(name, registry): (&String, &RegistryHealth)| {
            let held = registry.held(now, None);
            RegistryCondition {
                registry: name.clone(),
                breaker: registry.own.breaker.view(),
                failures: registry.own.breaker.failures(),
                waits_until: held.as_ref().map(|held| held.until),
                why: held.map(|held| held.why),
                rate_limit_remaining: registry.rate_limit.map(|rate_limit| rate_limit.remaining),
                fetching: state.slots.of(name),
                bytes_per_second: registry.speed.average().map(|speed| speed as u64),
            }
        };
        // Archives have no registry (its name is empty), but their layers take slots, too.
        let registries = state.registries.iter().filter(|(name, _)| !name.is_empty());
        let mut conditions: Vec<_> = registries.map(condition).collect();
        conditions.sort_by(|a, b| a.registry.cmp(&b.registry));
        conditions
    }
}

/// Records an event if a registry's breaker opened or closed. Returns whether the breaker changed.
fn tell(state: &mut State, name: &str, transition: Transition) -> bool {
    let registry = name.to_owned();
    match transition {
        Transition::Same => return false,
        Transition::Cleared => {}
        Transition::Opened(until) => {
            let why = state.registries.get(name).map(|registry| registry.own.failure.clone()).unwrap_or_default();
            state.events.push(RegistryEvent::Opened { registry, until, why });
        }
        Transition::Closed => state.events.push(RegistryEvent::Closed { registry }),
    }
    true
}

#[cfg(test)]
mod tests;
