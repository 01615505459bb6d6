//! Limits how often hosts may have images pulled, and remembers names that they asked for in vain.
//!
//! An image that a host lacks may become a pull job, and each job sends requests to a registry. Whoever makes a host look up
//! names, or holds its token, could thus have thousands of requests sent in the coordinator's name. So each host (an address with
//! a token) has a rate, and each token, which many hosts may share, has [`HOSTS_OF_A_TOKEN`] times that rate. Requests above it
//! are answered with a time after which to ask again.
//!
//! A name that was pulled on demand but is still missing when it is asked for again is not pulled for a while. The pause grows
//! each time that this happens.
//!
//! Pulls that people and schedules order are not counted. `state` guards both tables and is never held during I/O.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::Mutex;
use store::image::ImageRef;

use crate::identity::caller::{Caller, Peer};
use crate::registries::limits::bucket::Bucket;
use crate::state::clock::{after, until};

/// Pulls that a host may ask for per minute by default.
pub const DEFAULT_PER_MINUTE: u32 = 30;

/// Minutes' worth of pulls that may be requested at once: a host that starts asks for everything that it runs.
const AT_ONCE: f64 = 4.0;

/// The rate of a token, in rates of one host.
const HOSTS_OF_A_TOKEN: f64 = 10.0;

/// The first pause before a name that was not found is pulled again;
const PAUSE: Duration = Duration::from_secs(60);
/// the longest one.
const LONGEST_PAUSE: Duration = Duration::from_secs(15 * 60);

/// The most askers, and the most names, that are remembered.
const MOST: usize = 10_000;

/// Whose rate is counted: a token, and each host that presents it.
type Asker = (String, Option<IpAddr>);

/// A name that was pulled on demand, and when it may be pulled again.
#[derive(Debug, Clone, Copy)]
struct Pulled {
    pause: Duration,
    again: Timestamp,
}

#[derive(Debug, Default)]
struct State {
    askers: HashMap<Asker, Bucket>,
    pulled: HashMap<ImageRef, Pulled>,
}

/// The rates of hosts, and the names that they had pulled.
#[derive(Debug, Default)]
pub struct OnDemandLimiter {
    state: Mutex<State>,
}

fn address(peer: Peer) -> Option<IpAddr> {
    match peer {
        Peer::Local(_) => None,
        Peer::Loopback(address) | Peer::Remote(address) => Some(address.ip()),
    }
}

impl OnDemandLimiter {
    /// Counts `count` pulls that `caller` asks for, or returns how long to wait before asking again. A request for more than may
    /// be asked for at once is granted if the caller has no debt.
    pub fn admit(
        &self,
        (caller, peer): (&Caller, Peer),
        count: usize,
        per_minute: u32,
        now: Timestamp,
    ) -> Result<(), Duration> {
        let rate = f64::from(per_minute) / 60.0;
        let both = [((caller.actor(), None), HOSTS_OF_A_TOKEN), ((caller.actor(), address(peer)), 1.0)];
        // A user of this machine has no address and counts as one host.
        let askers = if both[1].0.1.is_none() { &both[1..] } else { &both[..] };
        let count = count as f64;
        let mut state = self.state.lock();
        if state.askers.len() >= MOST {
            state.askers.retain(|_, bucket| !bucket.wait_over(now, rate, 0.0).is_zero());
        }
        let is_full = state.askers.len() >= MOST;
        for (asker, share) in askers {
            let (rate, free) = (rate * share, f64::from(per_minute) * AT_ONCE * share);
            let Some(bucket) = state.askers.get_mut(asker) else { continue };
            let wait = bucket.wait_over(now, rate, (free - count).max(0.0));
            if !wait.is_zero() {
                return Err(wait);
            }
        }
        for (asker, share) in askers {
            // Once the table is full, new hosts count for their token alone.
            if !is_full || state.askers.contains_key(asker) || asker.1.is_none() {
                let bucket = state.askers.entry(asker.clone()).or_insert_with(|| Bucket::new(now));
                bucket.take(now, count, rate * share);
            }
        }
        Ok(())
    }

    /// How long `image`, which the store lacks, must not be pulled on demand.
    pub fn pause(&self, image: &ImageRef, now: Timestamp) -> Option<Duration> {
        let state = self.state.lock();
        state.pulled.get(image).map(|pulled| until(now, pulled.again)).filter(|pause| !pause.is_zero())
    }

    /// Records that `image` is being pulled on demand.
    pub fn pulled(&self, image: &ImageRef, now: Timestamp) {
        let mut state = self.state.lock();
        let pause = match state.pulled.get(image) {
            Some(before) => (before.pause * 2).min(LONGEST_PAUSE),
            None => PAUSE,
        };
        if state.pulled.len() >= MOST {
            // Drops names whose next pause would be the first one again.
            state.pulled.retain(|_, pulled| now < after(pulled.again, LONGEST_PAUSE));
        }
        if state.pulled.len() < MOST || state.pulled.contains_key(image) {
            state.pulled.insert(image.clone(), Pulled { pause, again: after(now, pause) });
        }
    }

    /// Records that the store has `image`.
    pub fn found(&self, image: &ImageRef) {
        self.state.lock().pulled.remove(image);
    }
}

#[cfg(test)]
mod tests {
    use coordinator_api::access::Role;

    use super::*;
    use crate::identity::caller::{Images, Proof};

    fn token(name: &str) -> Caller {
        Caller { proof: Proof::Token { name: name.to_owned() }, role: Role::Host, images: Images::default() }
    }

    fn host(last: u8) -> Peer {
        Peer::Remote(([10, 0, 0, last], 1).into())
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn a_host_has_a_rate_and_other_hosts_of_its_token_have_theirs() {
        let (demand, fleet) = (OnDemandLimiter::default(), token("fleet"));
        let ask = |last: u8, now: i64| demand.admit((&fleet, host(last)), 1, 30, at(now));
        let at_once = (0..1000).take_while(|_| ask(1, 0).is_ok()).count();
        assert_eq!(at_once, 120);
        assert_eq!(ask(1, 0), Err(Duration::from_secs(2)));
        assert_eq!(ask(2, 0), Ok(()), "another host is not held up");
        assert_eq!(ask(1, 2), Ok(()));
        assert!(ask(1, 3).is_err());
        // All hosts of a token together have the rate of ten hosts.
        let all = (3..200).flat_map(|last| [last; 200]).filter(|last| ask(*last, 3).is_ok()).count();
        assert!((1050..1100).contains(&all), "{all}");
        assert!(demand.admit((&token("other"), host(1)), 1, 30, at(3)).is_ok(), "nor is another token");
    }

    #[test]
    fn an_order_that_is_larger_than_what_goes_at_once_goes_when_nothing_is_owed() {
        let (demand, ci) = (OnDemandLimiter::default(), token("ci"));
        let ask = |count: usize, now: i64| demand.admit((&ci, host(1)), count, 60, at(now));
        assert!(ask(1000, 0).is_ok());
        assert_eq!(ask(1, 0), Err(Duration::from_secs(1000 - 239)));
        assert!(ask(1000, 999).is_err());
        assert!(ask(1000, 1000).is_ok());
    }

    #[test]
    fn a_name_that_is_not_there_is_pulled_ever_more_rarely_until_it_is() {
        let (demand, image) = (OnDemandLimiter::default(), "r.io/a:1".parse().unwrap());
        assert_eq!(demand.pause(&image, at(0)), None);
        demand.pulled(&image, at(0));
        assert_eq!(demand.pause(&image, at(20)), Some(Duration::from_secs(40)));
        assert_eq!(demand.pause(&image, at(60)), None);
        demand.pulled(&image, at(60));
        assert_eq!(demand.pause(&image, at(60)), Some(Duration::from_secs(120)));
        (0..20).for_each(|_| demand.pulled(&image, at(200)));
        assert_eq!(demand.pause(&image, at(200)), Some(LONGEST_PAUSE));
        demand.found(&image);
        assert_eq!(demand.pause(&image, at(200)), None);
        for number in 0..MOST + 100 {
            demand.pulled(&format!("r.io/b:{number}").parse().unwrap(), at(300));
        }
        assert_eq!(demand.state.lock().pulled.len(), MOST);
    }

    #[test]
    fn many_addresses_do_not_make_the_table_grow() {
        let (demand, fleet) = (OnDemandLimiter::default(), token("fleet"));
        for number in 0..MOST as u32 + 1000 {
            let peer = Peer::Remote((number.to_be_bytes(), 1).into());
            let _ = demand.admit((&fleet, peer), 1, 100_000, at(0));
        }
        assert!(demand.state.lock().askers.len() <= MOST + 1);
    }
}
