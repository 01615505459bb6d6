//! One fetch per layer and registry, however many jobs want it.
//!
//! A flight is known by what is fetched and from where: registry, blob, and the layer that the blob is said to be. Somebody else's
//! registry that claims to have a layer, and sends it slowly or never, so holds up nobody but those who asked it.
//!
//! A flight is a task of its own, not a part of the job that asked first: a job that is cancelled leaves, and the
//! flight goes on as long as one seat is taken. When the last seat is left, the flight is told to stop and the next
//! one who asks starts anew.
//!
//! `flights` guards who is in the air, and boarding and leaving; it is never held across an await.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use store::Digest;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::jobs::pull::error::PullError;
use crate::jobs::pull::progress::LayerMeter;
use crate::registries::RemoteLayer;
use crate::registries::limits::priority::{LivePriority, Waiters};

/// How a flight ended.
pub type Landing = Result<(), PullError>;

struct Flight {
    number: u64,
    /// Those who have a seat.
    waiters: Arc<Waiters>,
    stop: CancellationToken,
    meter: Arc<LayerMeter>,
    landing: watch::Receiver<Option<Landing>>,
}

/// What is fetched, and from where.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FlightKey {
    host: String,
    blob: Digest,
    diff_id: Digest,
}

impl FlightKey {
    /// `layer` of the registry `host`.
    pub fn new(host: &str, layer: &RemoteLayer) -> FlightKey {
        FlightKey { host: host.to_owned(), blob: layer.blob, diff_id: layer.diff_id }
    }
}

#[derive(Default)]
struct InTheAir {
    flights: HashMap<FlightKey, Flight>,
    last: u64,
}

/// All layers being fetched.
#[derive(Default)]
pub struct Flights {
    flights: Mutex<InTheAir>,
}

/// Whether a seat was taken on a flight of one's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boarding {
    /// The flight was started for this seat.
    Started,
    /// It was in the air already, started by another job.
    Joined,
}

/// One job's interest in a flight; dropped, the interest ends.
pub struct Seat {
    flights: Arc<Flights>,
    key: FlightKey,
    number: u64,
    waiters: Arc<Waiters>,
    priority: LivePriority,
    /// How this seat was taken.
    pub boarding: Boarding,
    /// The flight's progress.
    pub meter: Arc<LayerMeter>,
    landing: watch::Receiver<Option<Landing>>,
}

impl Flights {
    /// Takes a seat on the flight that fetches `key`, which is as urgent as the most urgent seat; `start` makes the flight if
    /// there is none.
    pub fn queue<F>(
        self: &Arc<Self>,
        key: FlightKey,
        meter: Arc<LayerMeter>,
        priority: LivePriority,
        start: impl FnOnce(CancellationToken, Arc<LayerMeter>, Arc<Waiters>) -> F,
    ) -> Seat
    where
        F: Future<Output = Landing> + Send + 'static,
    {
        let mut air = self.flights.lock();
        if let Some(flight) = air.flights.get_mut(&key) {
            flight.waiters.join(priority.clone());
            return Seat {
                waiters: Arc::clone(&flight.waiters),
                priority,
                flights: Arc::clone(self),
                key,
                number: flight.number,
                boarding: Boarding::Joined,
                meter: Arc::clone(&flight.meter),
                landing: flight.landing.clone(),
            };
        }
        air.last += 1;
        let number = air.last;
        let (land, landing) = watch::channel(None);
        let stop = CancellationToken::new();
        let waiters = Arc::new(Waiters::default());
        waiters.join(priority.clone());
        let task = start(stop.clone(), Arc::clone(&meter), Arc::clone(&waiters));
        let (seats_for, shown) = (Arc::clone(&waiters), Arc::clone(&meter));
        let flight = Flight { number, waiters: seats_for, stop, meter: shown, landing: landing.clone() };
        air.flights.insert(key.clone(), flight);
        drop(air);
        let (flights, ended) = (Arc::clone(self), key.clone());
        tokio::spawn(async move {
            let result = task.await;
            flights.forget(&ended, number);
            let _ = land.send(Some(result));
        });
        let flights = Arc::clone(self);
        Seat { flights, key, number, waiters, priority, boarding: Boarding::Started, meter, landing }
    }

    fn forget(&self, key: &FlightKey, number: u64) {
        let mut air = self.flights.lock();
        if air.flights.get(key).is_some_and(|flight| flight.number == number) {
            air.flights.remove(key);
        }
    }
}

impl Seat {
    /// Waits for the flight's end.
    pub async fn landed(&mut self) -> Landing {
        match self.landing.wait_for(Option::is_some).await {
            Ok(result) => result.clone().unwrap_or(Err(PullError::Cancelled)),
            Err(_) => Err(PullError::Cancelled),
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        // Under the lock that whoever boards takes: a flight that nobody is on any more is not joined.
        let mut air = self.flights.flights.lock();
        let is_empty = self.waiters.leave(&self.priority);
        if let Some(flight) = air.flights.get(&self.key).filter(|flight| is_empty && flight.number == self.number) {
            flight.stop.cancel();
            air.flights.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Notify;

    use super::*;
    use crate::registries::encoding::Encoding;

    fn layer() -> RemoteLayer {
        let digest = Digest::of(b"x");
        RemoteLayer { diff_id: digest, blob: digest, claimed: 1, media_type: String::new(), encoding: Encoding::Plain }
    }

    struct Airport {
        flights: Arc<Flights>,
        started: AtomicUsize,
        go: Arc<Notify>,
    }

    impl Airport {
        fn new() -> Airport {
            Airport { flights: Arc::default(), started: AtomicUsize::new(0), go: Arc::new(Notify::new()) }
        }

        fn queue(&self) -> Seat {
            self.board_at("q.io")
        }

        fn board_at(&self, host: &str) -> Seat {
            let go = Arc::clone(&self.go);
            let (key, meter) = (FlightKey::new(host, &layer()), Arc::new(LayerMeter::new(&layer())));
            self.flights.queue(key, meter, LivePriority::new(0), |stop, _, _| {
                self.started.fetch_add(1, Ordering::Relaxed);
                async move {
                    tokio::select! {
                        biased;
                        () = stop.cancelled() => Err(PullError::Cancelled),
                        () = go.notified() => Ok(()),
                    }
                }
            })
        }
    }

    #[tokio::test]
    async fn many_seats_share_one_flight_and_it_survives_its_starter() {
        let airport = Airport::new();
        let first = airport.queue();
        let mut second = airport.queue();
        let mut third = airport.queue();
        assert_eq!(second.boarding, Boarding::Joined);
        drop(first);
        airport.go.notify_one();
        assert!(second.landed().await.is_ok());
        assert!(third.landed().await.is_ok());
        assert_eq!(airport.started.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn the_last_one_to_leave_stops_it_and_the_next_starts_anew() {
        let airport = Airport::new();
        let (first, second) = (airport.queue(), airport.queue());
        drop(first);
        drop(second);
        let mut fresh = airport.queue();
        assert_eq!(fresh.boarding, Boarding::Started);
        airport.go.notify_one();
        airport.go.notify_waiters();
        assert!(fresh.landed().await.is_ok());
        assert_eq!(airport.started.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn another_registry_that_claims_the_same_layer_holds_nobody_up() {
        let airport = Airport::new();
        let claimed = airport.board_at("evil.io");
        let mut own = airport.board_at("q.io");
        assert_eq!((claimed.boarding, own.boarding), (Boarding::Started, Boarding::Started));
        drop(claimed);
        airport.go.notify_one();
        airport.go.notify_waiters();
        assert!(own.landed().await.is_ok());
    }
}
