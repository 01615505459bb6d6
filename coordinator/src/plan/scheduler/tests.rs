//! The scheduler in simulated time, one behaviour each.

use std::time::Duration;

use coordinator_api::job::JobState;
use coordinator_api::limits as api;
use coordinator_api::schedule::{PlanState, RunState, ScheduleSpec};
use jiff::Timestamp;

use super::world::{World, image};
use crate::plan::scheduler::ScheduleError;
use crate::registries::oci::simulated::{Faults, layer};
use crate::registries::webhook::Push;
use crate::state::clock::Clock;

const NOON: &str = "2026-11-21T12:00:00Z";
/// Bytes a second of one connection.
const SPEED: f64 = 200_000.0;

fn spec(name: &str, images: &[&str]) -> ScheduleSpec {
    let images = images.iter().map(|name| image(name)).collect();
    ScheduleSpec { name: name.to_owned(), images, ..ScheduleSpec::default() }
}

fn text(text: &str) -> Option<String> {
    Some(text.to_owned())
}

fn hours(count: u64) -> Duration {
    Duration::from_secs(count * 3600)
}

fn time(text: &str) -> Timestamp {
    text.parse().unwrap()
}

#[tokio::test(start_paused = true)]
async fn cron_pulls_at_its_time_and_what_was_missed_is_made_up_once() {
    let mut world = World::new(NOON, 1, SPEED);
    let first = world.hub.push("app", "1", &[layer(1, 50_000)]);
    world.add(ScheduleSpec {
        cron: text("0 3 * * *"),
        time_zone: text("Europe/Berlin"),
        ..spec("nightly", &["app:1"])
    });
    world.pass_until("2026-11-22T01:59:00Z").await;
    assert_eq!(world.published("app:1"), None);
    world.pass_until("2026-11-22T02:05:00Z").await;
    assert_eq!(world.published("app:1"), Some(first), "03:00 in Berlin");
    world.kill().await;
    let second = world.hub.push("app", "1", &[layer(1, 50_000), layer(2, 50_000)]);
    world.pass(hours(3 * 24 + 5)).await;
    world.start();
    world.pass(Duration::from_secs(60)).await;
    assert_eq!(world.published("app:1"), Some(second));
    let view = world.now_running().scheduler.get("nightly").unwrap();
    let runs: Vec<_> = view.runs.iter().map(|run| (run.slot, run.made_up, run.state)).collect();
    let made_up = (time("2026-11-25T02:00:00Z"), 2, RunState::Published);
    assert_eq!(runs, [made_up, (time("2026-11-22T02:00:00Z"), 0, RunState::Published)]);
    assert_eq!(view.next_at, Some(time("2026-11-26T02:00:00Z")));
    assert_eq!(world.now_running().queue.list()[0].origin.as_deref(), Some("schedule nightly"));
}

#[tokio::test(start_paused = true)]
async fn repositories_that_fail_hold_up_no_other_of_their_registry_and_come_when_they_are_mended() {
    // With twenty, it waits for the slots of those that go before it.
    for (count, most) in [(3, 30), (20, 150)] {
        let world = World::new(NOON, 1, SPEED);
        let broken: Vec<String> = (0..count).map(|number| format!("bad-{number}")).collect();
        for name in &broken {
            world.hub.push(name, "1", &[layer(1, 50_000)]);
        }
        world.hub.break_repositories(&broken);
        let images: Vec<String> = broken.iter().map(|name| format!("{name}:1")).collect();
        let images: Vec<&str> = images.iter().map(String::as_str).collect();
        world.add(ScheduleSpec { every: text("5m"), ..spec("bad", &images) });
        world.pass(Duration::from_secs(400)).await;
        let good = world.hub.push("good", "1", &[layer(2, 50_000)]);
        world.add(ScheduleSpec { every: text("5m"), priority: 1, ..spec("good", &["good:1"]) });
        world.pass(Duration::from_secs(300)).await;
        let begin = world.clock.now();
        while world.published("good:1").is_none() {
            world.pass(Duration::from_secs(1)).await;
            let took = world.clock.now().duration_since(begin).as_secs();
            assert!(took < most, "{count} fail: {:?}", world.now_running().limits.view());
        }
        assert_eq!(world.published("good:1"), Some(good));
        world.pass(hours(1)).await;
        let asked = broken.iter().map(|name| world.hub.asked(&format!("GET /v2/{name}/"))).max().unwrap();
        assert!(asked < 40, "{asked} requests for one that fails");
        world.hub.break_repositories(&[]);
        world.pass(hours(2)).await;
        for name in images {
            assert!(world.published(name).is_some(), "{name}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn only_a_tag_that_moved_makes_a_job() {
    let world = World::new(NOON, 2, SPEED);
    world.hub.push("app", "stable", &[layer(1, 30_000)]);
    world.add(ScheduleSpec { tag_move: true, every: text("5m"), ..spec("watch", &["app:stable"]) });
    world.pass(hours(2)).await;
    assert_eq!(world.now_running().queue.list().len(), 1);
    let looks = world.hub.asked("HEAD /v2/app/manifests/stable");
    // A token lives for five minutes, too: each look is refused once, then answered.
    assert!((40..=50).contains(&looks), "about 23 looks in two hours: {looks}");
    assert!(world.hub.asked("GET /v2/app/manifests") <= 2);
    let moved = world.hub.push("app", "stable", &[layer(3, 30_000)]);
    world.pass(hours(1)).await;
    assert_eq!((world.published("app:stable"), world.now_running().queue.list().len()), (Some(moved), 2));
}

#[tokio::test(start_paused = true)]
async fn patterns_pull_the_newest_tags_of_a_list_in_pages() {
    let world = World::new(NOON, 3, SPEED);
    for (n, tag) in ["v1.2.0", "v1.10.0", "v1.9.0", "v2.0.0", "latest", "v1.11.0-rc1"].into_iter().enumerate() {
        world.hub.push("app", tag, &[layer(n as u64, 20_000)]);
    }
    world.add(ScheduleSpec { every: text("1h"), newest: Some(2), semver: text("^1"), ..spec("new", &["app:v*"]) });
    world.pass(hours(1) + Duration::from_secs(60)).await;
    let mut images: Vec<_> = world.publisher.catalogue().images().map(|image| image.tag.clone().unwrap()).collect();
    images.sort();
    assert_eq!(images, ["v1.10.0", "v1.9.0"]);
    assert!(world.hub.asked("GET /v2/app/tags/list") >= 3, "pages");
}

#[tokio::test(start_paused = true)]
async fn a_push_pulls_what_a_schedule_means_and_nothing_else() {
    let world = World::new(NOON, 4, SPEED);
    let digest = world.hub.push("team/app", "v1.1", &[layer(1, 20_000)]);
    world.hub.push("team/secret", "v1.1", &[layer(2, 20_000)]);
    world.add(ScheduleSpec { on_push: true, ..spec("push", &["team/app:v1.*"]) });
    let push = |repository: &str, tag: &str| Push {
        host: text("registry:5000"),
        repository: repository.to_owned(),
        tag: tag.to_owned(),
    };
    let scheduler = &world.now_running().scheduler;
    let pushes =
        [push("team/app", "v1.1"), push("team/app", "v1.1"), push("team/secret", "v1.1"), push("team/app", "v2")];
    assert_eq!(scheduler.pushed(&pushes).unwrap().len(), 1);
    world.pass(Duration::from_secs(30)).await;
    assert_eq!((world.published("team/app:v1.1"), world.published("team/secret:v1.1")), (Some(digest), None));
    scheduler.set_paused("push", true).unwrap();
    assert!(scheduler.pushed(&pushes).unwrap().is_empty(), "paused");
}

#[tokio::test(start_paused = true)]
async fn a_deadline_is_started_in_time_and_its_forecast_is_scored() {
    let world = World::new(NOON, 5, SPEED);
    let layers: Vec<_> = (0..6).map(|n| layer(n, 400_000)).collect();
    world.hub.push("warm", "1", &[layer(90, 600_000)]);
    let digest = world.hub.push("app", "1", &layers);
    // Measures the speed of the registry.
    world.add(ScheduleSpec { every: text("1h"), ..spec("warm", &["warm:1"]) });
    world.add(ScheduleSpec { ready_by: text("18:00"), ..spec("evening", &["app:1"]) });
    world.pass(hours(2)).await;
    let plan = world.now_running().scheduler.plan().await;
    assert_eq!(plan.entries.len(), 1);
    let entry = &plan.entries[0];
    assert_eq!(
        (entry.state, entry.missing_bytes),
        (PlanState::Planned, Some(layers.iter().map(|l| l.len() as u64).sum()))
    );
    assert!(entry.start_at.unwrap() > time("2026-11-21T17:45:00Z") && entry.slack_seconds.unwrap() > 0, "{entry:?}");
    assert_eq!(world.published("app:1"), None, "not before its time");
    world.pass_until("2026-11-21T18:00:00Z").await;
    assert_eq!(world.published("app:1"), Some(digest));
    let view = world.now_running().scheduler.get("evening").unwrap();
    let accuracy = view.accuracy.unwrap();
    assert_eq!((accuracy.scored, accuracy.in_time), (1, 1));
    assert!(accuracy.mean_absolute_error_seconds < 30.0, "{accuracy:?}");
    assert_eq!(view.forecast.unwrap().deadline, time("2026-11-22T18:00:00Z"));
    assert!(world.said("schedule.at_risk").is_empty() && world.said("schedule.missed").is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_deadline_that_cannot_be_met_is_said_once_and_early() {
    let mut world = World::new(NOON, 6, SPEED);
    world.hub.push("app", "1", &[layer(1, 2_000_000)]);
    world.set_limits(api::Limits { bandwidth: text("1k"), ..api::Limits::default() });
    world.add(ScheduleSpec { ready_by: text("2026-11-21T12:20:00Z"), ..spec("soon", &["app:1"]) });
    world.pass(Duration::from_secs(10)).await;
    let said = world.said("schedule.at_risk");
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].message.contains("about to miss its deadline 2026-11-21T12:20:00Z"), "{}", said[0].message);
    assert_eq!(world.now_running().scheduler.at_risk(), 1);
    world.pass_until("2026-11-21T12:21:00Z").await;
    assert_eq!((world.said("schedule.at_risk").len(), world.said("schedule.missed").len()), (1, 1));
    world.set_limits(api::Limits::default());
    world.pass(hours(1)).await;
    assert!(world.published("app:1").is_some(), "late, but there");
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_is_down_costs_time_and_no_image() {
    let world = World::new(NOON, 7, SPEED);
    let digest = world.hub.push("app", "1", &[layer(1, 50_000)]);
    world.add(ScheduleSpec { every: text("1h"), ..spec("hourly", &["app:1"]) });
    world.hub.go_down(hours(1) + Duration::from_secs(600));
    world.pass(hours(1) + Duration::from_secs(300)).await;
    assert_eq!(world.published("app:1"), None);
    assert_eq!(world.now_running().scheduler.get("hourly").unwrap().runs[0].state, RunState::Running, "tried again");
    world.pass(hours(2)).await;
    assert_eq!(world.published("app:1"), Some(digest));
    assert!(!world.said("schedule.retry").is_empty());
    let before = world.hub.asked("");
    world.hub.go_down(hours(3));
    world.pass(hours(3)).await;
    let asked = world.hub.asked("") - before;
    assert!(asked < 120, "{asked} requests to a registry that is down for three hours");
    assert!(!world.said("registry.down").is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_is_wrong_again_and_again_is_given_up_and_said() {
    let world = World::new(NOON, 8, SPEED);
    world.hub.push("app", "1", &[layer(1, 50_000)]);
    world.hub.set_faults(Faults { corrupt: 1000, ..Faults::default() });
    world.add(ScheduleSpec { ready_by: text("2026-11-21T14:00:00Z"), ..spec("bad", &["app:1"]) });
    world.pass(hours(12)).await;
    let run = world.now_running().scheduler.get("bad").unwrap().runs.remove(0);
    assert_eq!(run.state, RunState::Failed);
    assert!(run.reason.unwrap().contains("damaged or forged"));
    assert_eq!((world.said("schedule.failed").len(), world.said("schedule.missed").len()), (1, 1));
    assert_eq!(world.now_running().queue.list()[0].state, JobState::Failed);
}

#[tokio::test(start_paused = true)]
async fn schedules_are_added_paused_changed_and_removed() {
    let mut world = World::new(NOON, 9, SPEED);
    world.hub.push("app", "1", &[layer(1, 10_000)]);
    world.add(ScheduleSpec { every: text("1h"), ..spec("s", &["app:1"]) });
    let again = ScheduleSpec { every: text("1h"), ..spec("s", &["app:1"]) };
    assert!(matches!(world.now_running().scheduler.add(again), Err(ScheduleError::Exists(_))));
    world.now_running().scheduler.set_paused("s", true).unwrap();
    world.pass(hours(5)).await;
    assert!(world.now_running().queue.list().is_empty());
    world.kill().await;
    world.start();
    let scheduler = &world.now_running().scheduler;
    assert!(scheduler.get("s").unwrap().spec.paused, "pauses survive");
    scheduler.set_paused("s", false).unwrap();
    world.pass(hours(1) + Duration::from_secs(60)).await;
    let runs = scheduler.get("s").unwrap().runs;
    assert_eq!(runs.iter().map(|run| run.made_up).collect::<Vec<_>>(), [0], "a pause is not made up");
    scheduler.remove("s").unwrap();
    assert!(matches!(scheduler.get("s"), Err(ScheduleError::Unknown(_))));
    world.pass(hours(3)).await;
    assert_eq!(world.now_running().queue.list().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_was_ahead_silences_no_schedule() {
    let mut world = World::new(NOON, 21, SPEED);
    world.hub.push("app", "1", &[layer(1, 20_000)]);
    world.hub.push("app", "2", &[layer(2, 20_000)]);
    world.add(ScheduleSpec { every: text("6h"), ..spec("early", &["app:1"]) });
    // The clock is a year ahead: schedules are added, and run, for times that have not come.
    world.clock.put(jiff::SignedDuration::from_hours(365 * 24));
    world.pass(hours(1)).await;
    world.add(ScheduleSpec { every: text("6h"), ..spec("late", &["app:2"]) });
    world.pass(hours(7)).await;
    assert!(world.published("app:1").is_some() && world.published("app:2").is_some());
    // It is put right, with the coordinator running or not.
    world.kill().await;
    world.clock.put(jiff::SignedDuration::ZERO);
    world.start();
    world.pass(hours(1)).await;
    for name in ["early", "late"] {
        let now = crate::state::clock::Clock::now(&world.clock);
        let view = world.now_running().scheduler.get(name).unwrap();
        assert!(view.next_at.is_some_and(|at| at > now && at <= now + hours(6)), "{name}: {:?}", view.next_at);
        let runs = view.runs.len();
        world.pass(hours(7)).await;
        let view = world.now_running().scheduler.get(name).unwrap();
        assert!(view.runs.len() > runs, "{name} runs by the clock that is");
    }
    let said = world.said("schedule.clock");
    assert!(said.iter().any(|event| event.message.contains("schedule early")), "{said:?}");
    assert!(said.iter().any(|event| event.message.contains("schedule late")), "{said:?}");
    assert_eq!(said.len(), 2, "once for each");
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_was_put_right_by_a_little_makes_nothing_run_twice() {
    let world = World::new(NOON, 22, SPEED);
    world.hub.push("app", "1", &[layer(1, 20_000)]);
    world.clock.put(jiff::SignedDuration::from_secs(200));
    world.add(ScheduleSpec { cron: text("0 * * * *"), ..spec("hourly", &["app:1"]) });
    world.pass_until("2026-11-21T13:00:30Z").await;
    let runs = || world.now_running().scheduler.get("hourly").unwrap().runs.len();
    assert_eq!(runs(), 1);
    // 200 s back, before the slot that was run.
    world.clock.put(jiff::SignedDuration::from_secs(-60));
    world.pass(hours(1) - Duration::from_secs(120)).await;
    assert_eq!((runs(), world.said("schedule.clock").len()), (1, 0));
    world.pass(hours(1)).await;
    assert_eq!(runs(), 2);
}
