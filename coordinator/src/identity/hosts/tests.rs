//! Hosts against a database in memory, at times that the tests choose.

use coordinator_api::access::NewToken;
use coordinator_api::host::Host;
use proptest::prelude::*;

use super::*;
use crate::identity::caller::Images;
use crate::state::state_db::memory::MemoryStateDb;

const LEASE: Duration = Duration::from_secs(900);

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn caller(token: &str) -> Caller {
    Caller { proof: Proof::Token { name: token.to_owned() }, role: Role::Host, images: Images::default() }
}

fn root() -> Caller {
    Caller { proof: Proof::Local { uid: 0 }, role: Role::Admin, images: Images::default() }
}

fn request(id: &str, layers: &[&str]) -> LeaseRequest {
    let layers = layers.iter().map(|name| Digest::of(name.as_bytes()).to_string()).collect();
    LeaseRequest { id: id.to_owned(), layers, reads_hit: 3, reads_missed: 1, ..LeaseRequest::default() }
}

fn layers(names: &[&str]) -> LayersInUse {
    LayersInUse::Layers(names.iter().map(|name| Digest::of(name.as_bytes())).collect())
}

/// A coordinator's hosts and what goes with them.
struct Bench {
    state_db: Arc<MemoryStateDb>,
    events: Arc<Events>,
    tokens: Tokens,
    hosts: Hosts,
}

impl Bench {
    /// A coordinator that began to lead at second 0.
    fn new() -> Bench {
        let state_db = Arc::new(MemoryStateDb::default());
        let events = Arc::new(Events::open(state_db.clone()).unwrap());
        let tokens = Tokens::open(state_db.clone()).unwrap();
        for name in ["one", "two"] {
            let token = NewToken { name: name.to_owned(), role: Role::Host, images: Vec::new(), expires_seconds: None };
            tokens.create(token, &root(), at(0)).unwrap();
        }
        let hosts = Hosts::open(state_db.clone(), events.clone(), LEASE, at(0)).unwrap();
        Bench { state_db, events, tokens, hosts }
    }

    fn renew(
        &self,
        name: &str,
        request: LeaseRequest,
        caller: &Caller,
        second: i64,
    ) -> Result<LeaseGranted, HostError> {
        self.hosts.renew(name, request, caller, &self.tokens, at(second))
    }

    fn kinds(&self) -> Vec<String> {
        self.events.after(0, 100).into_iter().map(|event| format!("{} {}", event.kind, event.subject)).collect()
    }

    fn state(&self, name: &str) -> HostState {
        self.hosts.list().hosts.iter().find(|host| host.name == name).unwrap().state
    }
}

#[test]
fn a_lease_holds_layers_until_its_host_has_been_silent_for_its_life() {
    let bench = Bench::new();
    assert_eq!(
        bench.renew("a", request("1", &["x", "y"]), &caller("one"), 1000),
        Ok(LeaseGranted { lease_seconds: 900 })
    );
    bench.renew("b", request("2", &["y", "z"]), &caller("two"), 1000).unwrap();
    assert_eq!(bench.hosts.layers_in_use(at(1001)), layers(&["x", "y", "z"]));
    bench.renew("a", request("1", &["x"]), &caller("one"), 1500).unwrap();
    assert_eq!(bench.hosts.layers_in_use(at(1899)), layers(&["x", "y", "z"]));
    assert_eq!(bench.hosts.layers_in_use(at(1900)), layers(&["x"]));
    for second in [1899, 1900, 1901] {
        bench.hosts.expire(at(second));
    }
    assert_eq!((bench.state("a"), bench.state("b")), (HostState::Live, HostState::Expired));
    bench.renew("b", request("2", &["z"]), &caller("two"), 2000).unwrap();
    assert_eq!(bench.hosts.layers_in_use(at(2001)), layers(&["x", "z"]));
    let expected = ["host.registered a", "host.registered b", "host.expired b", "host.registered b"];
    assert_eq!(bench.kinds(), expected, "each is told once");
}

#[test]
fn what_is_held_is_not_known_until_hosts_had_the_time_to_say_so() {
    let bench = Bench::new();
    bench.renew("a", request("1", &["x"]), &caller("one"), 10).unwrap();
    assert_eq!(bench.hosts.layers_in_use(at(899)), LayersInUse::NotYetKnown { until: at(900) });
    assert_eq!(bench.hosts.layers_in_use(at(900)), layers(&["x"]));
    // The coordinator was down for longer than a lease: nobody could renew.
    let again = Hosts::open(bench.state_db.clone(), bench.events.clone(), LEASE, at(10_000)).unwrap();
    again.expire(at(10_001));
    assert_eq!(again.list().hosts[0].state, HostState::Live);
    assert_eq!(again.layers_in_use(at(10_001)), LayersInUse::NotYetKnown { until: at(10_900) });
    again.expire(at(10_900));
    assert_eq!(again.layers_in_use(at(10_900)), layers(&[]));
    assert_eq!(bench.kinds(), ["host.registered a", "host.expired a"]);
}

#[test]
fn an_unmounted_host_holds_nothing_and_is_forgotten_in_the_end() {
    let bench = Bench::new();
    bench.renew("a", request("1", &["x"]), &caller("one"), 1000).unwrap();
    let release = |id: &str, who: &Caller| bench.hosts.release("a", id, who, &bench.tokens, at(1001));
    assert!(matches!(release("1", &caller("two")), Err(HostError::Taken { .. })));
    release("1", &caller("one")).unwrap();
    assert_eq!(release("9", &caller("one")), Err(HostError::Unknown("a".to_owned())));
    assert_eq!(bench.hosts.layers_in_use(at(1002)), layers(&[]));
    assert_eq!(bench.state("a"), HostState::Unmounted);
    let month = REMEMBERED.as_secs();
    bench.hosts.expire(at(1000 + month));
    assert_eq!(bench.hosts.list().hosts.len(), 1);
    bench.hosts.expire(at(1001 + month));
    assert!(bench.hosts.list().hosts.is_empty());
    assert!(bench.state_db.records(Table::Hosts).unwrap().is_empty());
    assert_eq!(bench.kinds(), ["host.registered a", "host.unmounted a"]);
}

#[test]
fn a_host_belongs_to_the_token_that_it_came_with() {
    let bench = Bench::new();
    bench.renew("a", request("1", &["x"]), &caller("one"), 0).unwrap();
    let error = bench.renew("a", request("1", &[]), &caller("two"), 1).unwrap_err();
    assert_eq!(error.to_string(), "host a belongs to token one: use that token, or revoke it first");
    bench.renew("a", request("1", &["x"]), &root(), 2).unwrap();
    // An admin's renewal sets it free; otherwise only the end of its token does.
    bench.renew("a", request("1", &["x"]), &caller("one"), 3).unwrap();
    bench.tokens.revoke("one").unwrap();
    bench.renew("a", request("1", &["x"]), &caller("two"), 4).unwrap();
    assert_eq!(bench.hosts.list().hosts[0].caller, "token two");
}

#[test]
fn renewals_that_make_no_sense_are_refused_by_name() {
    let bench = Bench::new();
    let good = request("1", &["x"]);
    let long = "x".repeat(TEXT_MAX + 1);
    for (name, request, words) in [
        ("a b", good.clone(), "--host-name"),
        ("a", LeaseRequest { id: String::new(), ..good.clone() }, "its id"),
        ("a", LeaseRequest { layers: vec!["x".to_owned()], ..good.clone() }, "not a digest"),
        ("a", LeaseRequest { images: vec!["a\u{1b}[2J".to_owned()], ..good.clone() }, "control characters"),
        ("a", LeaseRequest { mountpoint: long, ..good.clone() }, "too long"),
        ("a", LeaseRequest { images: vec![String::new(); LAYERS_MAX + 1], ..good }, "more than 100000"),
    ] {
        let error = bench.renew(name, request, &caller("one"), 0).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(name), "{error}");
    }
    assert!(bench.hosts.list().hosts.is_empty());
}

/// A renewal with this many layers of its own.
fn many(id: &str, count: usize) -> LeaseRequest {
    let layers = (0..count).map(|n| Digest::of(format!("{id} {n}").as_bytes()).to_string()).collect();
    LeaseRequest { id: id.to_owned(), layers, ..LeaseRequest::default() }
}

#[test]
fn the_hosts_of_one_token_hold_no_more_than_its_share_and_admins_are_not_limited_by_it() {
    let bench = Bench::new();
    let renew = |id: usize, who: &Caller| bench.renew("a", many(&id.to_string(), LAYERS_MAX), who, 1000);
    (0..5).for_each(|id| _ = renew(id, &caller("one")).unwrap());
    let error = renew(5, &caller("one")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the hosts of token one hold too many layers together: give some of them a token of their own"
    );
    renew(0, &caller("one")).unwrap();
    bench.renew("a", many("1", 10), &caller("one"), 1000).unwrap();
    bench.renew("b", many("x", 10), &caller("two"), 1000).unwrap();
    (6..11).for_each(|id| _ = renew(id, &root()).unwrap());
    assert!(matches!(renew(11, &root()), Err(HostError::Full)), "all together are bounded, too");
    bench.hosts.expire(at(2000));
    renew(11, &root()).unwrap();
    assert!(matches!(bench.hosts.layers_in_use(at(2000)), LayersInUse::Layers(layers) if layers.is_empty()));
}

#[test]
fn what_hosts_say_of_images_is_kept_in_part() {
    let bench = Bench::new();
    let images: Vec<String> = (0..50_000).map(|n| format!("registry/{}/{n}", "x".repeat(100))).collect();
    for id in 0..300 {
        let request = LeaseRequest { images: images.clone(), ..request(&id.to_string(), &["x"]) };
        bench.renew("a", request, &caller("one"), 1000).unwrap();
    }
    let hosts = bench.hosts.list().hosts;
    let bytes: usize = hosts.iter().flat_map(|host| &host.report.images).map(String::len).sum();
    assert!((1 << 20..9 << 20).contains(&bytes), "{bytes}");
    assert!(hosts.iter().all(|host| host.report.images.len() <= 1000 && host.layers_held == 1));
}

#[test]
fn the_records_of_a_revoked_token_go_when_their_leases_are_over() {
    let bench = Bench::new();
    let named = LeaseRequest { images: vec!["app:1".to_owned()], ..request("1", &["x"]) };
    bench.renew("a", named, &caller("one"), 1000).unwrap();
    bench.renew("b", request("2", &["y"]), &caller("two"), 1000).unwrap();
    bench.tokens.revoke("one").unwrap();
    bench.hosts.forget_revoked(&bench.tokens, at(1001));
    let hosts = bench.hosts.list().hosts;
    assert_eq!((hosts.len(), hosts[0].report.images.len()), (2, 0), "what is for people goes at once");
    assert_eq!(bench.hosts.layers_in_use(at(1001)), layers(&["x", "y"]), "a container may run from it");
    bench.hosts.expire(at(1900));
    bench.hosts.forget_revoked(&bench.tokens, at(1900));
    let names: Vec<String> = bench.hosts.list().hosts.into_iter().map(|host| host.name).collect();
    assert_eq!(names, ["b"]);
    let again = Hosts::open(bench.state_db.clone(), bench.events.clone(), LEASE, at(1901)).unwrap();
    assert_eq!(again.list().hosts.len(), 1, "nor is it back after a restart");
}

#[test]
fn hosts_show_how_often_their_cache_answered() {
    let bench = Bench::new();
    bench.renew("a", request("1", &[]), &root(), 5).unwrap();
    bench.renew("b", LeaseRequest { reads_hit: 0, reads_missed: 0, ..request("2", &[]) }, &root(), 6).unwrap();
    let hosts = bench.hosts.list().hosts;
    assert_eq!((hosts[0].hit_ratio, hosts[1].hit_ratio), (Some(0.75), None));
    assert_eq!((hosts[0].last_seen_at, hosts[0].expires_at, hosts[0].caller.as_str()), (at(5), at(905), "uid 0"));
}

/// Something that happens to a few hosts that share a few layers.
#[derive(Debug, Clone)]
enum Step {
    /// A host renews with these layers; a layer may come twice.
    Renew(u8, Vec<u8>),
    Release(u8),
    Expire,
    /// The coordinator dies, and another process opens the database.
    Restart,
    /// Time passes, or the clock is set.
    Pass(i64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..4u8, prop::collection::vec(0..6u8, 0..5)).prop_map(|(host, layers)| Step::Renew(host, layers)),
        1 => (0..4u8).prop_map(Step::Release),
        1 => Just(Step::Expire),
        1 => Just(Step::Restart),
        3 => (-300i64..1500).prop_map(Step::Pass),
    ]
}

/// Whether a live host's record lists the layer, which is what [`Hosts::holds`] means.
fn lists(hosts: &HostList, layer: &Digest, now: Timestamp) -> bool {
    let live = |host: &&Host| host.state == HostState::Live && now < host.expires_at;
    hosts.hosts.iter().filter(live).any(|host| host.report.layers.contains(&layer.to_string()))
}

proptest! {
    #[test]
    fn a_layer_is_held_exactly_as_long_as_a_live_hosts_record_lists_it(steps in prop::collection::vec(step(), 0..60)) {
        let mut bench = Bench::new();
        let mut second = 2000;
        let name = |layer: u8| format!("layer {layer}");
        for step in steps {
            match step {
                Step::Renew(host, layers) => {
                    let layers: Vec<String> = layers.into_iter().map(name).collect();
                    let layers: Vec<&str> = layers.iter().map(String::as_str).collect();
                    bench.renew("a", request(&host.to_string(), &layers), &root(), second).unwrap();
                }
                Step::Release(host) => {
                    let _ = bench.hosts.release("a", &host.to_string(), &root(), &bench.tokens, at(second));
                }
                Step::Expire => bench.hosts.expire(at(second)),
                Step::Restart => {
                    bench.hosts = Hosts::open(bench.state_db.clone(), bench.events.clone(), LEASE, at(0)).unwrap();
                }
                Step::Pass(seconds) => second = (second + seconds).max(1000),
            }
            let list = bench.hosts.list();
            // Also at other times than that of the last step: the caller has a clock of its own.
            for now in [second - 600, second, second + 1, second + 600].map(|second| at(second.max(900))) {
                let layers = (0..6).map(|layer| Digest::of(name(layer).as_bytes()));
                let expected: BTreeSet<Digest> = layers.clone().filter(|layer| lists(&list, layer, now)).collect();
                let found: BTreeSet<Digest> = layers.filter(|layer| bench.hosts.holds(layer, now)).collect();
                prop_assert_eq!(&found, &expected);
                prop_assert_eq!(bench.hosts.layers_in_use(now), LayersInUse::Layers(expected));
            }
        }
        // Nothing is counted for what is gone.
        let ids: Vec<String> = bench.hosts.list().hosts.into_iter().map(|host| host.report.id).collect();
        for id in ids {
            bench.hosts.release("a", &id, &root(), &bench.tokens, at(second)).unwrap();
        }
        prop_assert_eq!(bench.hosts.kept.lock().held.len(), 0);
        let kept = bench.hosts.kept.lock().records.len();
        prop_assert_eq!(bench.hosts.kept.lock().tally.hosts(), kept);
    }
}

#[test]
fn a_lease_from_a_clock_that_was_ahead_ends_with_those_that_are_not_renewed() {
    let bench = Bench::new();
    let year = 365 * 86_400;
    bench.renew("a", request("one", &["x"]), &caller("one"), year).unwrap();
    let hosts = Hosts::open(bench.state_db.clone(), bench.events.clone(), LEASE, at(10)).unwrap();
    let life = i64::try_from(LEASE.as_secs()).unwrap();
    assert!(hosts.holds(&Digest::of(b"x"), at(10)));
    assert_eq!(hosts.layers_in_use(at(10 + life)), layers(&[]), "not for a year");
}
