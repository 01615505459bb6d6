//! Plans deadlines backwards, and forecasts them forwards.
//!
//! **Backwards**: deadlines share the way into the store, so their work is done one after the other, the earliest deadline first. Beginning
//! with the last deadline, each is given the latest stretch that ends before its own deadline and before the next one's stretch begins. The
//! stretch includes a margin: a share of the estimate ([`MARGIN`]), but at least the time for some retries ([`LEAST_MARGIN`]). Starting as
//! late as is safe finds the newest image.
//!
//! **Forwards**: from now on, in the same order, each starts at its planned time or when the one before has ended. If it ends after its
//! deadline, the deadline is at risk, which is reported as soon as it is known.
//!
//! Speed is what was measured, cut by the limits for each time of day. Everything here is pure.

use std::time::Duration;

use jiff::Timestamp;

use crate::registries::limits::rules::Rules;
use crate::state::clock::{after, until};

/// The speed that is assumed before any was measured, in bytes a second: 100 Mbit/s.
pub const UNMEASURED: f64 = 12_500_000.0;
/// The share of the estimate that is added for the unforeseen.
pub const MARGIN: f64 = 0.25;
/// The least that is added: time to wait out a registry's fault and to try again.
pub const LEAST_MARGIN: Duration = Duration::from_secs(600);
/// What every run takes, however little is missing: requests, unpacking the last layer, publishing.
pub const FIXED: Duration = Duration::from_secs(5);
/// What every layer takes besides its bytes.
pub const PER_LAYER: Duration = Duration::from_millis(300);
/// Forecasts go no further than this.
const HORIZON: Duration = Duration::from_secs(60 * 24 * 3600);

/// The work for one deadline.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    /// When it must be done.
    pub deadline: Timestamp,
    /// Compressed bytes to fetch.
    pub bytes: u64,
    /// Layers to fetch.
    pub layers: usize,
    /// The registry of the first image; all bytes are planned at its speed.
    pub registry: String,
    /// The measured speed of that registry, in bytes a second.
    pub speed: Option<f64>,
    /// Nothing can be fetched before this time: the registry is down or asked to wait.
    pub not_before: Option<Timestamp>,
    /// Whether it has begun.
    pub running: bool,
}

/// When a task starts and ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// When it starts; for one that runs, now.
    pub start: Timestamp,
    /// When it ends.
    pub end: Timestamp,
}

impl Task {
    /// Bytes a second at the time `at`, limits included.
    pub fn speed_at(&self, rules: &Rules, at: Timestamp) -> f64 {
        let limits = [rules.bandwidth_at(at), rules.registry(&self.registry).bandwidth];
        let limit = limits.into_iter().flatten().map(|limit| limit as f64).fold(f64::INFINITY, f64::min);
        self.speed.unwrap_or(UNMEASURED).min(limit).max(1.0)
    }

    fn fixed(&self) -> Duration {
        FIXED + PER_LAYER * u32::try_from(self.layers).unwrap_or(u32::MAX)
    }

    /// When it ends if it starts at `start`.
    pub fn end(&self, rules: &Rules, start: Timestamp) -> Timestamp {
        let (mut at, mut left) = (start, self.bytes as f64);
        let horizon = after(start, HORIZON);
        loop {
            let speed = self.speed_at(rules, at);
            let change = rules.next_change(at).unwrap_or(Timestamp::MAX).min(horizon);
            let possible = until(at, change).as_secs_f64() * speed;
            if left <= possible || change >= horizon {
                let seconds = Duration::try_from_secs_f64(left / speed).unwrap_or(HORIZON).min(HORIZON);
                return after(after(at, seconds), self.fixed());
            }
            left -= possible;
            at = change;
        }
    }

    /// The latest start with which it ends by `end`, including the margin.
    fn latest_start(&self, rules: &Rules, end: Timestamp) -> Timestamp {
        let with_margin = |start: Timestamp| {
            let lasts = until(start, self.end(rules, start));
            after(start, lasts + lasts.mul_f64(MARGIN).max(LEAST_MARGIN))
        };
        let (mut early, mut late) = (Duration::ZERO, HORIZON);
        // Bisects how long before `end` it must start. Whether a lead suffices is monotone, except at the edges of windows.
        while late.saturating_sub(early) > Duration::from_millis(500) {
            let middle = (early + late) / 2;
            if with_margin(before(end, middle)) <= end { late = middle } else { early = middle }
        }
        before(end, late)
    }
}

fn before(time: Timestamp, duration: Duration) -> Timestamp {
    let duration = jiff::SignedDuration::try_from(duration).unwrap_or(jiff::SignedDuration::MAX);
    time.checked_sub(duration).unwrap_or(Timestamp::MIN)
}

/// The plan of all tasks, in their order, seen from `now`.
pub fn plan(tasks: &[Task], rules: &Rules, now: Timestamp) -> Vec<Stretch> {
    let mut order: Vec<usize> = (0..tasks.len()).collect();
    order.sort_by_key(|task| (!tasks[*task].running, tasks[*task].deadline, *task));
    let mut starts = vec![now; tasks.len()];
    let mut free_until = Timestamp::MAX;
    for &index in order.iter().rev().filter(|index| !tasks[**index].running) {
        let task = &tasks[index];
        starts[index] = task.latest_start(rules, task.deadline.min(free_until));
        free_until = starts[index];
    }
    let mut stretches = vec![Stretch { start: now, end: now }; tasks.len()];
    let mut free_from = now;
    for index in order {
        let task = &tasks[index];
        let start = starts[index].max(free_from).max(task.not_before.unwrap_or(now));
        stretches[index] = Stretch { start, end: task.end(rules, start) };
        free_from = stretches[index].end;
    }
    stretches
}

#[cfg(test)]
mod tests {
    use coordinator_api::limits as api;
    use proptest::prelude::*;

    use super::*;

    fn time(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn task(deadline: Timestamp, bytes: u64) -> Task {
        let (registry, speed) = ("r.io".to_owned(), Some(1_000_000.0));
        Task { deadline, bytes, layers: 0, registry, speed, not_before: None, running: false }
    }

    #[test]
    fn a_deadline_is_started_as_late_as_is_safe() {
        let deadline = time("2026-11-21T08:00:00Z");
        let made = plan(&[task(deadline, 1_000_000_000)], &Rules::default(), time("2026-11-20T20:00:00Z"));
        let lead = until(made[0].start, deadline).as_secs();
        assert!((1604..1607).contains(&lead), "1005 s and ten minutes, not {lead} s");
        let longer = plan(&[task(deadline, 4_000_000_000)], &Rules::default(), time("2026-11-20T20:00:00Z"));
        let lead = until(longer[0].start, deadline).as_secs();
        assert!((5005..5008).contains(&lead), "4005 s and a quarter, not {lead} s");
        assert!(made[0].end < deadline);
    }

    #[test]
    fn deadlines_do_not_get_into_each_others_way() {
        let (first, second) = (time("2026-11-21T08:00:00Z"), time("2026-11-21T08:10:00Z"));
        let tasks = [task(second, 3_000_000_000), task(first, 1_000_000_000)];
        let plan = plan(&tasks, &Rules::default(), time("2026-11-20T20:00:00Z"));
        assert!(plan[1].end <= plan[0].start, "the first is done when the second begins");
        assert!(plan[0].end < second && plan[1].end < first);
    }

    #[test]
    fn a_slow_window_is_planned_around() {
        let window = api::Window {
            from: "06:00".to_owned(),
            to: "20:00".to_owned(),
            bandwidth: Some("10k".to_owned()),
            ..api::Window::default()
        };
        let rules = Rules::parse(&api::Limits { windows: vec![window], ..api::Limits::default() }).unwrap();
        let plan = plan(&[task(time("2026-11-21T08:00:00Z"), 500_000_000)], &rules, time("2026-11-20T20:00:00Z"));
        assert!(plan[0].start < time("2026-11-21T06:00:00Z"), "before the slow hours: {}", plan[0].start);
        assert!(plan[0].end < time("2026-11-21T08:00:00Z"));
    }

    #[test]
    fn what_cannot_be_done_in_time_is_known_at_once() {
        let (now, deadline) = (time("2026-11-21T07:50:00Z"), time("2026-11-21T08:00:00Z"));
        let late = plan(&[task(deadline, 1_000_000_000)], &Rules::default(), now);
        assert_eq!((late[0].start, late[0].end > deadline), (now, true));
        let down = Task { not_before: Some(time("2026-11-21T08:05:00Z")), ..task(deadline, 10) };
        assert!(plan(&[down], &Rules::default(), now)[0].end > deadline);
    }

    proptest! {
        /// Stretches never overlap, none starts in the past, and more bytes never end earlier.
        #[test]
        fn plans_are_sound(sizes in prop::collection::vec((1u64..5_000_000_000, 1i64..100_000), 1..8)) {
            let now = time("2026-11-21T00:00:00Z");
            let at = |seconds: i64| now + jiff::SignedDuration::from_secs(seconds);
            let tasks: Vec<Task> = sizes.iter().map(|(bytes, seconds)| task(at(*seconds), *bytes)).collect();
            let stretches = plan(&tasks, &Rules::default(), now);
            let mut sorted = stretches.clone();
            sorted.sort_by_key(|stretch| stretch.start);
            for pair in sorted.windows(2) {
                prop_assert!(pair[0].end <= pair[1].start);
            }
            for (task, stretch) in tasks.iter().zip(&stretches) {
                prop_assert!(stretch.start >= now);
                let bigger = Task { bytes: task.bytes * 2, ..task.clone() };
                prop_assert!(bigger.end(&Rules::default(), now) >= task.end(&Rules::default(), now));
            }
        }
    }
}
