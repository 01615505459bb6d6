//! A month of work under every fault, simulated within seconds: all triggers, restarts, and a registry that is never quite well.
//!
//! At its end, every image must be what its registry says, no layer may have been fetched twice except after faults, and every forecast
//! must have been compared with what happened.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use coordinator_api::limits as api;
use coordinator_api::schedule::{Accuracy, ScheduleSpec};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use store::Digest;
use store::image::ImageRef;

use super::world::{World, image};
use crate::plan::versions::TagVersion;
use crate::registries::oci::simulated::{Fate, Faults, layer};
use crate::registries::webhook::Push;
use crate::state::clock::Clock;

const DAYS: u64 = 30;
const SPEED: f64 = 60_000.0;
/// In the last days nothing new is pushed and nothing fails, so that all can come to rest.
const REST: u64 = 2;

/// The faults of a troubled hour: everything that can go wrong does, a few times in a hundred requests.
const TROUBLED: Faults =
    Faults { limited: 25, failing: 40, expired: 20, truncated: 30, corrupt: 0, slow: 0, silent: 0, turns: 4 };

struct Images {
    random: StdRng,
    /// Layers that many images share.
    bases: Vec<Bytes>,
    made: u64,
    versions: u32,
}

impl Images {
    fn new() -> Images {
        let bases = (0..4).map(|n| layer(1000 + n, 150_000)).collect();
        Images { random: StdRng::seed_from_u64(42), bases, made: 0, versions: 0 }
    }

    /// A new image: one shared base and up to two layers of its own.
    fn layers(&mut self) -> Vec<Bytes> {
        let base = self.random.random_range(0..self.bases.len());
        let mut layers = vec![self.bases[base].clone()];
        for _ in 0..self.random.random_range(1..=2) {
            self.made += 1;
            layers.push(layer(self.made, self.random.random_range(20_000..200_000)));
        }
        layers
    }
}

/// Repositories by the trigger that pulls them. All have the tag `live`, except the last, which has versions.
const NIGHTLY: [&str; 6] = ["night/a", "night/b", "night/c", "night/d", "night/e", "night/f"];
const HOURLY: [&str; 4] = ["hour/a", "hour/b", "hour/c", "hour/d"];
const PUSHED: [&str; 5] = ["push/a", "push/b", "push/c", "push/d", "push/e"];
const WATCHED: [&str; 4] = ["watch/a", "watch/b", "watch/c", "watch/d"];
const MORNING: [&str; 5] = ["morning/a", "morning/b", "morning/c", "morning/d", "morning/e"];
const VERSIONED: &str = "versions";

fn text(text: &str) -> Option<String> {
    Some(text.to_owned())
}

fn spec(name: &str, repositories: &[&str]) -> ScheduleSpec {
    let images = repositories.iter().map(|repository| image(&format!("{repository}:live"))).collect();
    ScheduleSpec { name: name.to_owned(), images, ..ScheduleSpec::default() }
}

fn schedules() -> Vec<ScheduleSpec> {
    let berlin = || text("Europe/Berlin");
    let versions = ScheduleSpec { images: vec![image("versions:v*")], ..spec("versions", &[]) };
    vec![
        ScheduleSpec { cron: text("30 2 * * *"), time_zone: berlin(), ..spec("nightly", &NIGHTLY) },
        ScheduleSpec { every: text("6h"), ..spec("hourly", &HOURLY) },
        ScheduleSpec { on_push: true, priority: 10, ..spec("pushed", &PUSHED) },
        ScheduleSpec { tag_move: true, every: text("1h"), ..spec("watched", &WATCHED) },
        ScheduleSpec { ready_by: text("08:00"), time_zone: berlin(), priority: 20, ..spec("morning", &MORNING[..3]) },
        ScheduleSpec { ready_by: text("0 7 * * MON-FRI"), priority: 20, ..spec("workday", &MORNING[3..]) },
        ScheduleSpec { every: text("12h"), newest: Some(3), semver: text(">=1, <2"), ..versions },
    ]
}

/// The month, and what happens in it besides the schedules' work.
struct Month {
    world: World,
    images: Images,
    random: StdRng,
    /// Notifications that nobody received: the registry sends them again.
    unsent: Vec<Push>,
    accuracy: BTreeMap<String, Accuracy>,
    restarts: u32,
}

impl Month {
    fn push(&mut self, repository: &str, tag: &str) {
        let layers = self.images.layers();
        self.world.hub.push(repository, tag, &layers);
        if PUSHED.contains(&repository) {
            self.unsent.push(Push { host: None, repository: repository.to_owned(), tag: tag.to_owned() });
        }
    }

    fn all(&self) -> Vec<&'static str> {
        [&NIGHTLY[..], &HOURLY, &PUSHED, &WATCHED, &MORNING].concat()
    }

    /// One hour: now and then a push, an outage, a crash.
    async fn hour(&mut self, hour: u64) {
        let quiet = hour >= (DAYS - REST) * 24;
        let troubled = !quiet && self.random.random_bool(0.5);
        self.world.hub.set_faults(if troubled { TROUBLED } else { Faults::default() });
        if !quiet {
            let all = self.all();
            if self.random.random_bool(0.15) {
                let repository = all[self.random.random_range(0..all.len())];
                self.push(repository, "live");
            }
            if hour % 24 == 20 {
                for repository in MORNING {
                    if self.random.random_bool(0.6) {
                        self.push(repository, "live");
                    }
                }
            }
            if hour % 168 == 50 {
                self.images.versions += 1;
                let tag = format!("v1.{}.0", self.images.versions);
                self.push(VERSIONED, &tag);
            }
            if self.random.random_bool(0.02) {
                let minutes = self.random.random_range(5..100);
                self.world.hub.go_down(Duration::from_secs(minutes * 60));
            }
            if self.random.random_bool(0.03) {
                self.die().await;
            }
        }
        self.notify();
        self.world.pass(Duration::from_secs(3600)).await;
    }

    /// The coordinator dies in the middle of whatever it does, and is back after a while.
    async fn die(&mut self) {
        let moment = Duration::from_millis(self.random.random_range(0..600_000));
        self.world.pass(moment).await;
        self.keep_score();
        self.world.kill().await;
        self.restarts += 1;
        let away = Duration::from_secs(self.random.random_range(10..4 * 3600));
        self.world.pass(away).await;
        self.world.start();
    }

    fn notify(&mut self) {
        let pushes = std::mem::take(&mut self.unsent);
        self.world.now_running().scheduler.pushed(&pushes).unwrap();
    }

    fn keep_score(&mut self) {
        for schedule in self.world.now_running().scheduler.list() {
            if let Some(accuracy) = schedule.accuracy {
                self.accuracy.insert(schedule.spec.name, accuracy);
            }
        }
    }

    /// What is known of an image that is not as it should be.
    fn explain(&self, name: &str) -> String {
        let running = self.world.now_running();
        let job = running.queue.last_for(&image(name).parse().unwrap());
        let job = job.map(|job| (job.id, job.state, job.reason, job.updated_at));
        let schedules = running.scheduler.list().into_iter().filter(|schedule| schedule.spec.name == "watched");
        let views: Vec<_> = schedules.map(|view| (view.next_at, view.trouble, view.runs)).collect();
        format!("{job:?} at {}; {views:?}; {:?}", self.world.clock.now(), running.limits.view())
    }

    /// Every image that a schedule means, and what the registry says it is.
    fn wanted(&self) -> Vec<(String, Digest)> {
        let live = self.all().into_iter().map(|repository| (repository, "live".to_owned()));
        let mut versions: Vec<String> = (0..=self.images.versions).map(|n| format!("v1.{n}.0")).collect();
        versions.sort_by(|one, other| TagVersion::of(other).cmp(&TagVersion::of(one)));
        let versions = versions.into_iter().take(3).map(|tag| (VERSIONED, tag));
        let target = |(repository, tag): (&str, String)| {
            (format!("{repository}:{tag}"), self.world.hub.target(repository, &tag).unwrap())
        };
        live.chain(versions).map(target).collect()
    }
}

fn new_month() -> Month {
    let mut world = World::new("2026-10-12T00:00:00Z", 7, SPEED);
    let window = api::Window { from: "09:00".into(), to: "17:00".into(), time_zone: None, bandwidth: text("80k") };
    world.set_limits(api::Limits { windows: vec![window], ..api::Limits::default() });
    let mut month = Month {
        world,
        images: Images::new(),
        random: StdRng::seed_from_u64(20_261_012),
        unsent: Vec::new(),
        accuracy: BTreeMap::new(),
        restarts: 0,
    };
    month.all().into_iter().for_each(|repository| month.push(repository, "live"));
    (0..1).for_each(|n| month.push(VERSIONED, &format!("v1.{n}.0")));
    month.push(VERSIONED, "v2.0.0");
    schedules().into_iter().for_each(|spec| month.world.add(spec));
    month
}

/// Checks that every layer of the catalogue was delivered once. Returns how many there are, and the most deliveries of any layer in the
/// store, replaced ones included.
fn check_fetches(month: &Month) -> (usize, u64) {
    let delivered = month.world.hub.delivered();
    let published: HashSet<Digest> = month
        .world
        .publisher
        .catalogue()
        .images()
        .flat_map(|image| image.layers.iter().map(|layer| layer.blob).collect::<Vec<_>>())
        .collect();
    for blob in &published {
        assert_eq!(delivered.get(blob), Some(&1), "layer {blob} was fetched once");
    }
    let layers = delivered.iter().filter(|(blob, _)| month.world.publisher.store().has_layer(blob).unwrap());
    let most = layers.map(|(_, count)| *count).max().unwrap_or(0);
    (published.len(), most)
}

fn print(month: &Month, layers: usize) {
    let fates = month.world.hub.fates();
    let faults: u64 = fates.iter().filter(|(fate, _)| **fate != Fate::Good).map(|(_, count)| count).sum();
    println!("requests: {fates:?}; {faults} faults; {} restarts; {layers} layers", month.restarts);
    println!("{:<10} {:>6} {:>8} {:>12} {:>12}", "schedule", "scored", "in time", "mean error", "either way");
    for (name, accuracy) in &month.accuracy {
        println!(
            "{name:<10} {:>6} {:>8} {:>10.1} s {:>10.1} s",
            accuracy.scored, accuracy.in_time, accuracy.mean_error_seconds, accuracy.mean_absolute_error_seconds
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_month_under_every_fault_ends_with_every_image_published_and_each_layer_fetched_once() {
    let mut month = new_month();
    for hour in 0..DAYS * 24 {
        month.hour(hour).await;
    }
    month.keep_score();
    assert!(month.world.is_running() && month.restarts > 5, "{} restarts", month.restarts);
    for (name, target) in month.wanted() {
        assert_eq!(month.world.published(&name), Some(target), "{name}: {}", month.explain(&name));
    }
    assert_eq!(month.world.published("versions:v2.0.0"), None, "out of range");
    let (layers, most) = check_fetches(&month);
    print(&month, layers);
    assert_eq!(most, 1, "no layer was fetched twice without a fault");
    let fates = month.world.hub.fates();
    for fate in [Fate::Limited, Fate::Failing, Fate::Expired, Fate::Down] {
        assert!(fates.get(&fate).is_some_and(|count| *count > 3), "{fate:?} happened: {fates:?}");
    }
    for fate in [Fate::Truncated, Fate::Corrupt, Fate::Slow, Fate::Silent] {
        assert!(fates.contains_key(&fate), "{fate:?} happened: {fates:?}");
    }
    check_scores(&month);
    let repository: ImageRef = image("versions:v2.0.0").parse().unwrap();
    assert!(month.world.publisher.catalogue().find(&repository).is_none());
}

/// Every run with a deadline that ended well was forecast and scored, and most were in time.
fn check_scores(month: &Month) {
    let (mut scored, mut in_time) = (0, 0);
    for schedule in month.world.now_running().scheduler.list() {
        let forecast = schedule.runs.iter().filter(|run| run.predicted_at.is_some() && run.ended_at.is_some());
        let scores = schedule.accuracy.map_or(0, |accuracy| accuracy.scored);
        assert!(scores >= forecast.count() as u64, "{} has runs that were not scored", schedule.spec.name);
        scored += scores;
        in_time += schedule.accuracy.map_or(0, |accuracy| accuracy.in_time);
    }
    // 30 mornings and 22 workdays; outages and crashes may cost some of them their forecast.
    assert!(scored >= 40, "{scored} forecasts");
    assert!(in_time * 10 >= scored * 9, "{in_time} of {scored} in time");
}
