//! What a leader checks periodically and at startup: damage to the store that only the leader can repair.
//!
//! Every few seconds it completes a handover log that has fallen behind, remembers the store's newest epoch and generation, and
//! keeps some room for small writes. Every few minutes it reads what a new host would read (the superblock, the catalogue) and
//! what the next coordinator would read (the handover log), and rewrites what is damaged from memory and database. Each repair is
//! recorded as an event: whatever caused the damage may have damaged more, which `cachefsctl fsck --deep` finds.

use std::sync::Arc;
use std::time::Duration;

use coordinator_api::event::Severity;
use store::publisher::{Moved, Publisher};
use tokio_util::sync::CancellationToken;

use crate::state::events::{Events, NewEvent};
use crate::state::replicated::{Newest, ReplicatedState};
use crate::state::state_db::StateDb;

/// How often the small checks run.
const EVERY: Duration = Duration::from_secs(10);
/// Every how many of those rounds the leader also reads what others would read.
const READ_EVERY: u32 = 30;
/// How many generations hosts may have seen since the database last recorded the newest one.
const UNHEARD: u64 = 1024;

/// The components that [`tend`] works with.
pub(crate) type Tended = (Arc<ReplicatedState>, Arc<Publisher>, Arc<Events>);

/// Runs the checks until `stop`, and once more after that.
pub(crate) async fn tend(tended: Tended, stop: CancellationToken) {
    let mut round = 0_u32;
    while !stop.is_cancelled() {
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(EVERY) => {}
        }
        let (shared, publisher, events) = tended.clone();
        let deep = round.is_multiple_of(READ_EVERY) && !stop.is_cancelled();
        round = round.wrapping_add(1);
        let looked = tokio::task::spawn_blocking(move || {
            look_after(&shared, &publisher);
            if deep {
                read_as_others_do(&shared, &publisher, &events);
            }
        });
        let _ = looked.await;
    }
}

/// The frequent, small checks. Blocks on the shared disk.
fn look_after(shared: &ReplicatedState, publisher: &Publisher) {
    if let Err(error) = shared.catch_up() {
        tracing::warn!("{error}");
    }
    let newest = Newest { epoch: publisher.epoch(), generation: publisher.catalogue().generation() };
    if let Err(error) = shared.note_newest(newest) {
        tracing::warn!("how far the store has gone is not remembered: {error}");
    }
    if let Err(error) = publisher.keep_reserve() {
        tracing::warn!("no room can be kept for when the disk is full: {error}");
    }
}

/// Reads what hosts and the next coordinator would read, and repairs it. Blocks on the shared disk.
fn read_as_others_do(shared: &ReplicatedState, publisher: &Publisher, events: &Events) {
    let superblock = publisher
        .restore_superblock()
        .map(|moved| (moved == Moved::Away).then(|| "the file cachefs-store in the store was damaged".to_owned()));
    let catalogue = publisher.heal_catalogue();
    let catalogue = catalogue.map(|why| why.map(|why| format!("no new host could have read the catalogue ({why})")));
    for healed in [superblock, catalogue] {
        match healed {
            Ok(None) => {}
            Ok(Some(what)) => say(events, "store.healed", &what),
            Err(error) => tracing::warn!("the store cannot be looked after: {error}"),
        }
    }
    match shared.check_handover() {
        Ok(None) => {}
        Ok(Some(why)) => match shared.renew_handover() {
            Ok(()) => say(events, "handover.healed", &format!("no other coordinator could have gone on ({why})")),
            Err(error) => tracing::warn!("{error}"),
        },
        Err(error) => tracing::warn!("{error}"),
    }
}

fn say(events: &Events, kind: &'static str, what: &str) {
    let message = format!("{what}: it was written anew; run cachefsctl fsck --deep, for more may be damaged");
    events.record(NewEvent::new(Severity::Warning, kind, "store", message));
}

/// Lets a store that was restored from a backup continue with generations above those that hosts may have seen before. Blocks on
/// the shared disk.
pub(crate) fn go_on_above(newest: Newest, publisher: &Publisher, events: &Events) -> store::error::Result<()> {
    let found = publisher.catalogue().generation();
    if found > newest.generation {
        return Ok(());
    }
    let generation = publisher.go_on_above(newest.generation + UNHEARD)?;
    let message = format!(
        "the store is older than this coordinator knows it (generation {found}, it had {}): it was put back from a backup, and goes on as generation {generation}; images published since are gone, and cachefsctl fsck --deep tells whether all others are whole",
        newest.generation
    );
    tracing::warn!("{message}");
    events.record(NewEvent::new(Severity::Warning, "store.restored", "store", message));
    Ok(())
}
