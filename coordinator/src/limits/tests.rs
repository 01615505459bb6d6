//! Limits under a paused clock: time passes only where somebody waits.

use coordinator_api::limits as api;

use super::*;
use crate::clock::TestClock;

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

async fn seconds(clock: &TestClock, work: impl Future<Output = ()>) -> f64 {
    let began = clock.now();
    work.await;
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
            limits.admit(HOST, RequestKind::Other, Duration::from_secs(60)).await.unwrap();
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
    let first = limits.place(HOST, &whom).await;
    let brief = Duration::from_millis(10);
    assert!(tokio::time::timeout(brief, limits.place(HOST, &whom)).await.is_err());
    let _others = [limits.place("a", &whom).await, limits.place("a", &whom).await];
    assert!(tokio::time::timeout(brief, limits.place("a", &whom)).await.is_err(), "three in all");
    drop(first);
    let _again = limits.place(HOST, &whom).await;
    let (waiter, raised) = (limits.place(HOST, &whom), async {
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
        limits.admit(HOST, RequestKind::Other, Duration::ZERO).await.unwrap();
        limits.report(HOST, Outcome::Failed("connection refused".to_owned()), None);
    }
    let held = limits.held(HOST).unwrap();
    assert!(held.why.contains("8 times") && held.why.contains("connection refused"), "{}", held.why);
    assert!(limits.admit(HOST, RequestKind::Other, Duration::from_secs(1)).await.is_err(), "no patience");
    assert!(matches!(limits.take_news()[..], [RegistryNews::Opened { .. }]));
    let probe = limits.admit(HOST, RequestKind::Other, Duration::from_secs(60));
    let took = seconds(&clock, async { probe.await.unwrap() }).await;
    assert!((13.0..16.5).contains(&took), "{took}");
    assert!(limits.admit(HOST, RequestKind::Other, Duration::ZERO).await.is_err(), "one probe");
    limits.report(HOST, Outcome::Answered, None);
    assert_eq!(limits.take_news(), [RegistryNews::Closed { registry: HOST.to_owned() }]);
    assert!(limits.admit(HOST, RequestKind::Other, Duration::ZERO).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_asks_to_wait_is_obeyed_by_all() {
    let (limits, clock) = limits(api::Limits::default());
    limits.report(HOST, Outcome::AskedToWait { wait: Duration::from_secs(40), fault: None }, None);
    let wait = |kind| limits.admit(HOST, kind, Duration::from_secs(300));
    let took = seconds(&clock, async { wait(RequestKind::Other).await.unwrap() }).await;
    assert!((39.0..41.0).contains(&took), "{took}");
    let more_at = crate::clock::after(clock.now(), Duration::from_secs(20));
    limits.report(HOST, Outcome::Answered, Some(Allowance { remaining: 0, more_at }));
    assert!(seconds(&clock, async { wait(RequestKind::Other).await.unwrap() }).await < 0.1, "blobs are not counted");
    let took = seconds(&clock, async { wait(RequestKind::Manifest).await.unwrap() }).await;
    assert!((19.0..21.0).contains(&took), "{took}");
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_asks_for_years_is_asked_again_after_an_hour() {
    let (limits, clock) = limits(api::Limits::default());
    let years = Duration::from_secs(u64::MAX);
    limits.report(HOST, Outcome::AskedToWait { wait: years, fault: None }, None);
    let hour = Duration::from_secs(3601);
    let took = seconds(&clock, async { limits.admit(HOST, RequestKind::Manifest, hour).await.unwrap() }).await;
    assert!((3500.0..3602.0).contains(&took), "{took}");
    let more_at = Timestamp::MAX;
    limits.report(HOST, Outcome::Answered, Some(Allowance { remaining: 0, more_at }));
    let took = seconds(&clock, async { limits.admit(HOST, RequestKind::Manifest, hour).await.unwrap() }).await;
    assert!((3500.0..3602.0).contains(&took), "{took}");
}

#[tokio::test(start_paused = true)]
async fn any_number_of_names_takes_up_little() {
    let (limits, _) = limits(api::Limits::default());
    let whom = Arc::default();
    let _place = limits.place("fetching", &whom).await;
    for number in 0..5 * MOST_REGISTRIES {
        let name = format!("tokens-{number}.example");
        limits.report(&name, Outcome::Failed("refused".to_owned()), None);
        if number % 3 == 0 {
            (0..breaker::FAILURES).for_each(|_| limits.report(&name, Outcome::Failed("refused".to_owned()), None));
        }
    }
    assert!(limits.view().len() <= MOST_REGISTRIES, "{}", limits.view().len());
    assert!(limits.view().iter().any(|known| known.registry == "fetching"));
}
