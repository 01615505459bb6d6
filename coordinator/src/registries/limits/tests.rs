//! Tests of the limits under a paused clock: time passes only while something waits.

use coordinator_api::limits as api;
use jiff::SignedDuration;
use proptest::prelude::*;

use super::*;
use crate::registries::limits::health::MOST_REPOSITORIES;
use crate::state::clock::TestClock;

const HOST: &str = "r.io";

fn limits(rules: api::Limits) -> (Arc<Limits>, Arc<TestClock>) {
    let clock = Arc::new(TestClock::at("2026-11-21T12:00:00Z"));
    let limits = Limits::new(clock.clone(), 3);
    limits.set(Rules::parse(&rules).unwrap());
    (Arc::new(limits), clock)
}

fn bandwidth(text: &str) -> api::Limits {
    api::Limits { bandwidth: Some(text.to_owned()), ..api::Limits::default() }
}

async fn seconds<T>(clock: &TestClock, work: impl Future<Output = T>) -> f64 {
    let began = clock.now();
    drop(work.await);
    until(began, clock.now()).as_secs_f64()
}

#[tokio::test(start_paused = true)]
async fn bandwidth_is_kept_in_all_and_changes_while_somebody_waits() {
    let (limits, clock) = limits(bandwidth("1M"));
    let took = seconds(&clock, async {
        let one = async {
            for _ in 0..50 {
                limits.spend("a", 100_000).await
            }
        };
        let two = async {
            for _ in 0..50 {
                limits.spend("b", 100_000).await
            }
        };
        tokio::join!(one, two);
    });
    let took = took.await;
    assert!((9.0..11.0).contains(&took), "10 MB at 1 MB/s took {took} s");
    let took = seconds(&clock, async {
        let spender = limits.spend("a", 100_000_000);
        let faster = async {
            tokio::time::sleep(Duration::from_secs(5)).await;
            limits.set(Rules::default());
        };
        tokio::join!(spender, faster);
    });
    let took = took.await;
    assert!((5.0..7.0).contains(&took), "the limit was lifted after 5 s, and it took {took} s");
}

#[tokio::test(start_paused = true)]
async fn one_registrys_bandwidth_and_requests_are_its_own() {
    let own = api::RegistryLimits {
        bandwidth: Some("1M".to_owned()),
        requests_per_minute: Some(60),
        ..api::RegistryLimits::default()
    };
    let registries = [(HOST.to_owned(), own)].into_iter().collect();
    let (limits, clock) = limits(api::Limits { registries, ..api::Limits::default() });
    assert!(seconds(&clock, limits.spend("other", 50_000_000)).await < 0.1);
    let took = seconds(&clock, limits.spend(HOST, 5_000_000)).await;
    assert!((4.0..6.0).contains(&took), "{took}");
    let requests = async {
        for _ in 0..30 {
            limits.admit(Target::registry(HOST), RequestKind::Other, Duration::from_secs(60)).await.unwrap();
        }
    };
    let took = seconds(&clock, requests).await;
    assert!((26.0..32.0).contains(&took), "30 requests at one a second took {took} s");
}

#[tokio::test(start_paused = true)]
async fn places_are_limited_in_all_and_by_registry_and_may_become_more() {
    let own = api::RegistryLimits { parallel_layers: Some(1), ..api::RegistryLimits::default() };
    let registries = [(HOST.to_owned(), own)].into_iter().collect();
    let (limits, _) = limits(api::Limits { registries, ..api::Limits::default() });
    let whom = Arc::default();
    let first = limits.permit(HOST, &whom).await;
    let brief = Duration::from_millis(10);
    assert!(tokio::time::timeout(brief, limits.permit(HOST, &whom)).await.is_err());
    let _others = [limits.permit("a", &whom).await, limits.permit("a", &whom).await];
    assert!(tokio::time::timeout(brief, limits.permit("a", &whom)).await.is_err(), "three in all");
    drop(first);
    let _again = limits.permit(HOST, &whom).await;
    let (waiter, raised) = (limits.permit(HOST, &whom), async {
        tokio::task::yield_now().await;
        limits.set(Rules::parse(&api::Limits { parallel_layers: Some(9), ..api::Limits::default() }).unwrap());
    });
    let waited = tokio::time::timeout(brief, async { tokio::join!(waiter, raised) }).await;
    assert!(waited.is_ok(), "a raised limit reaches those who wait");
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_is_down_is_left_alone_and_then_probed_once() {
    let (limits, clock) = limits(api::Limits::default());
    for _ in 0..breaker::FAILURES {
        limits.admit(Target::registry(HOST), RequestKind::Other, Duration::ZERO).await.unwrap();
        limits.report(Target::registry(HOST), Outcome::Unanswered("connection refused".to_owned()), None);
    }
    let held = limits.held(HOST).unwrap();
    assert!(held.why.contains("8 times") && held.why.contains("connection refused"), "{}", held.why);
    assert!(
        limits.admit(Target::registry(HOST), RequestKind::Other, Duration::from_secs(1)).await.is_err(),
        "no patience"
    );
    assert!(matches!(limits.take_events()[..], [RegistryEvent::Opened { .. }]));
    let probe = limits.admit(Target::registry(HOST), RequestKind::Other, Duration::from_secs(60));
    let took = seconds(&clock, async { probe.await.unwrap() }).await;
    assert!((13.0..16.5).contains(&took), "{took}");
    assert!(limits.admit(Target::registry(HOST), RequestKind::Other, Duration::ZERO).await.is_err(), "one probe");
    limits.report(Target::registry(HOST), Outcome::Answered, None);
    assert_eq!(limits.take_events(), [RegistryEvent::Closed { registry: HOST.to_owned() }]);
    assert!(limits.admit(Target::registry(HOST), RequestKind::Other, Duration::ZERO).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_asks_to_wait_is_obeyed_by_all() {
    let (limits, clock) = limits(api::Limits::default());
    limits.report(Target::registry(HOST), Outcome::AskedToWait { wait: Duration::from_secs(40), fault: None }, None);
    let wait = |kind| limits.admit(Target::registry(HOST), kind, Duration::from_secs(300));
    let took = seconds(&clock, async { wait(RequestKind::Other).await.unwrap() }).await;
    assert!((39.0..41.0).contains(&took), "{took}");
    limits.report(Target::registry(HOST), Outcome::Answered, None);
    assert!(seconds(&clock, async { wait(RequestKind::Manifest).await.unwrap() }).await < 0.1);
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_says_that_no_requests_are_left_is_asked_slowly_and_asked() {
    let (limits, clock) = limits(api::Limits::default());
    let spent = || Some(RateLimit { remaining: 0, more_at: after(clock.now(), Duration::from_secs(3000)) });
    let wait = |kind| limits.admit(Target::registry(HOST), kind, Duration::from_secs(300));
    limits.report(Target::registry(HOST), Outcome::Answered, spent());
    assert!(seconds(&clock, async { wait(RequestKind::Other).await.unwrap() }).await < 0.1, "blobs are not counted");
    let took = seconds(&clock, async { tokio::join!(wait(RequestKind::Manifest), wait(RequestKind::Manifest)) }).await;
    assert!((9.0..12.0).contains(&took), "one after the other: {took}");
    limits.report(Target::registry(HOST), Outcome::Answered, spent());
    assert!(limits.held(HOST).is_none(), "its jobs are started");
    let soon = Some(RateLimit { remaining: 0, more_at: after(clock.now(), Duration::from_secs(1)) });
    limits.report(Target::registry(HOST), Outcome::Answered, soon);
    let took = seconds(&clock, async { wait(RequestKind::Manifest).await.unwrap() }).await;
    assert!((0.9..2.1).contains(&took), "its share is less: {took}");
    limits.report(Target::registry(HOST), Outcome::Answered, spent());
    clock.put(SignedDuration::from_hours(-2));
    let took = seconds(&clock, async { wait(RequestKind::Manifest).await.unwrap() }).await;
    assert!(took < 1.0, "the clock was put right: {took}");
}

#[tokio::test(start_paused = true)]
async fn one_answer_holds_those_that_it_tells_of_for_a_while_and_a_row_of_them_for_longer() {
    let (limits, clock) = limits(api::Limits::default());
    let (bad, good) = (of("bad"), of("good"));
    let years = Duration::from_secs(u64::MAX);
    let hour = Duration::from_secs(3601);
    let fault = Outcome::AskedToWait { wait: years, fault: Some("503".to_owned()) };
    let limit = Outcome::AskedToWait { wait: years, fault: None };
    for (outcome, target, times) in [
        (&fault, bad, [60.0, 120.0, 240.0]),
        (&limit, good, [300.0, 600.0, 1200.0]),
        (&fault, Target::registry("other"), [60.0, 120.0, 240.0]),
    ] {
        for expected in times {
            limits.report(target, outcome.clone(), None);
            let took = seconds(&clock, async { limits.admit(target, RequestKind::Other, hour).await.unwrap() }).await;
            assert!((expected - 1.0..expected + 2.0).contains(&took), "{target:?}: {took} for {expected}");
        }
    }
    limits.report(good, Outcome::Answered, None);
    limits.report(bad, fault, None);
    assert!(limits.held(HOST).is_none() && limits.held_from(&"r.io/good:1".parse().unwrap()).is_none());
    let held = limits.held_from(&"r.io/bad:1".parse().unwrap()).unwrap();
    assert_eq!(held.why, "its repository bad asked us to wait");
    assert!(limits.admit(good, RequestKind::Manifest, Duration::ZERO).await.is_ok());
    limits.report(good, limit, None);
    assert!(limits.admit(bad, RequestKind::Other, Duration::ZERO).await.is_err(), "429 is for all of a registry");
    assert!(limits.held(HOST).is_some());
}

#[tokio::test(start_paused = true)]
async fn a_repository_whose_probe_is_asked_for_a_token_is_probed_with_it_at_once() {
    let (limits, clock) = limits(api::Limits::default());
    let ask = |patience| limits.admit(of("bad"), RequestKind::Manifest, Duration::from_secs(patience));
    (0..breaker::FAILURES).for_each(|_| limits.report(of("bad"), Outcome::Failed("500".to_owned()), None));
    let reason = limits.trouble(&"r.io/bad:1".parse().unwrap()).unwrap();
    assert_eq!(reason, "registry r.io fails: its repository bad failed 8 times in a row, last with: 500");
    assert_eq!(limits.trouble(&"r.io/good:1".parse().unwrap()), None);
    let took = seconds(&clock, async { ask(60).await.unwrap() }).await;
    assert!((14.0..17.0).contains(&took), "{took}");
    assert!(ask(0).await.is_err(), "one at a time");
    for outcome in [Outcome::Refused, Outcome::Unanswered("reset".to_owned())] {
        limits.report(of("bad"), outcome, None);
        assert_eq!(ask(0).await, Ok(Pass::Go));
    }
    limits.report(of("bad"), Outcome::Failed("500".to_owned()), None);
    let begin = clock.now();
    let held = ask(300).await.unwrap_err();
    assert_eq!(
        (held.by, clock.now()),
        (HoldReason::Repository, begin),
        "who waits for half a minute gives its place up"
    );
    tokio::time::sleep(Duration::from_secs(31)).await;
    ask(0).await.unwrap();
    limits.report(of("bad"), Outcome::Answered, None);
    assert_eq!(limits.trouble(&"r.io/bad:1".parse().unwrap()), None);
}

/// One repository of the registry as a target.
fn of(repository: &str) -> Target<'_> {
    Target { registry: HOST, repository: Some(repository) }
}

/// Sends requests to one registry, and counts them.
struct World {
    limits: Arc<Limits>,
    clock: Arc<TestClock>,
    passed: i64,
    /// How often each repository was asked.
    asked: HashMap<String, u64>,
}

impl World {
    fn new() -> World {
        let (limits, clock) = limits(api::Limits::default());
        World { limits, clock, passed: 0, asked: HashMap::new() }
    }

    fn pass(&mut self, seconds: i64) {
        self.passed += seconds;
        self.clock.put(SignedDuration::from_secs(self.passed));
    }

    /// Sends one request, and the probe before it, if they may be sent now. Otherwise returns the seconds for which the request is held
    /// back.
    fn ask(&mut self, repository: &str, root: &Outcome, document: &Outcome) -> Result<(), i64> {
        let target = of(repository);
        loop {
            match self.limits.try_admit(target, RequestKind::Other) {
                Ok(Pass::Probe) => {
                    *self.asked.entry("/v2/".to_owned()).or_default() += 1;
                    self.limits.report(Target::registry(HOST), root.clone(), None);
                }
                Ok(Pass::Go) => {
                    *self.asked.entry(repository.to_owned()).or_default() += 1;
                    self.limits.report(target, document.clone(), None);
                    return Ok(());
                }
                Err(held) => return Err(held.until.duration_since(self.clock.now()).as_secs()),
            }
        }
    }

    /// The most requests to a registry or repository that is down all the time.
    fn most(&self) -> u64 {
        u64::from(breaker::FAILURES) + 7 + u64::try_from(self.passed).unwrap() / breaker::LONGEST.as_secs()
    }
}

proptest! {
    /// A working repository is never held back while fewer than `SEVERAL` others fail, and for `FIRST` at most whatever fails beside it. A
    /// failing one is rarely asked.
    #[test]
    fn repositories_that_fail_hold_nobody_else_up(
        bad in 1usize..20,
        root in prop::sample::select(vec![Outcome::Answered, Outcome::Refused]),
        steps in prop::collection::vec((0i64..40, 0usize..25), 1..300),
    ) {
        let mut world = World::new();
        let (fails, works) = (Outcome::Failed("500".to_owned()), Outcome::Answered);
        for (pause, repository) in steps {
            world.pass(pause);
            if repository < 20 {
                let _ = world.ask(&format!("bad-{}", repository % bad), &root, &fails);
            } else if let Err(held) = world.ask("good", &root, &works) {
                prop_assert!(bad >= breaker::SEVERAL, "held for {held} s");
                prop_assert!(held <= breaker::FIRST.as_secs() as i64, "held for {held} s");
            }
        }
        let most = world.most();
        for (repository, asked) in world.asked.iter().filter(|(name, _)| name.starts_with("bad")) {
            prop_assert!(*asked <= most, "{repository} was asked {asked} times in {} s", world.passed);
        }
    }

    /// A registry that is down is rarely asked, however many of its repositories are wanted, and serves all of them soon after it is back.
    #[test]
    fn a_registry_that_is_down_is_asked_seldom_and_is_back_for_all(
        dead in any::<bool>(),
        steps in prop::collection::vec((0i64..40, 0usize..300), 1..400),
    ) {
        let mut world = World::new();
        let (root, document) = if dead { (Outcome::Unanswered("refused".to_owned()), Outcome::Unanswered("refused".to_owned())) } else { (Outcome::Failed("502".to_owned()), Outcome::Failed("502".to_owned())) };
        for (pause, repository) in steps {
            world.pass(pause);
            let _ = world.ask(&format!("any-{repository}"), &root, &document);
        }
        // With 5xx answers, each repository fails by itself before the registry is known to be down.
        let asked: u64 = world.asked.values().sum();
        let most = world.most() + if dead { 0 } else { (breaker::FAILURES as u64) * (breaker::SEVERAL as u64) };
        prop_assert!(asked <= most, "{asked} requests in {} s: {:?}", world.passed, world.asked);
        world.pass((breaker::LONGEST + Duration::from_secs(121)).as_secs() as i64);
        for repository in 0..300 {
            prop_assert_eq!(world.ask(&format!("any-{repository}"), &Outcome::Answered, &Outcome::Answered), Ok(()));
        }
        prop_assert!(world.limits.state.lock().registries[HOST].repositories.is_empty(), "nothing is left of it");
    }
}

#[tokio::test(start_paused = true)]
async fn any_number_of_names_takes_up_little() {
    let (limits, _) = limits(api::Limits::default());
    let whom = Arc::default();
    let _permit = limits.permit("fetching", &whom).await;
    for number in 0..5 * MOST_REGISTRIES {
        let name = format!("tokens-{number}.example");
        limits.report(Target::registry(&name), Outcome::Unanswered("refused".to_owned()), None);
        if number % 3 == 0 {
            (0..breaker::FAILURES)
                .for_each(|_| limits.report(Target::registry(&name), Outcome::Unanswered("refused".to_owned()), None));
        }
    }
    assert!(limits.view().len() <= MOST_REGISTRIES, "{}", limits.view().len());
    for number in 0..5 * MOST_REPOSITORIES {
        limits.report(of(&format!("repository-{number}")), Outcome::Failed("500".to_owned()), None);
    }
    assert!(limits.state.lock().registries[HOST].repositories.len() <= MOST_REPOSITORIES);
    assert!(limits.view().iter().any(|known| known.registry == "fetching"));
}
