//! Memory quotas: how much all requests may hold at a time, and how much those of one caller.
//!
//! A slow stream or body holds memory for as long as its client likes. So each first takes its weight out of a [`Quota`], of
//! which one caller can have only a part. A caller who finds it used up waits for a while and is then told to try again. Users of
//! this machine have a pool of their own, which callers over the network cannot exhaust.
//!
//! `callers` guards the callers' semaphores and is never held across an await.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::identity::caller::{Caller, Proof};

/// The unit of a quota, in bytes: one kibibyte.
const UNIT: u64 = 1 << 10;

/// No memory became free in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "this coordinator serves as many such requests as it can, or as it does for one caller: try again in some seconds"
)]
pub struct UsedUp;

/// The caller that a share belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Holder {
    /// A user of this machine.
    Local(String),
    /// A caller over the network, or on the loopback without a token.
    Remote(String),
}

impl From<&Caller> for Holder {
    fn from(caller: &Caller) -> Holder {
        match caller.proof {
            Proof::Local { .. } => Holder::Local(caller.actor()),
            Proof::Token { .. } | Proof::Nothing => Holder::Remote(caller.actor()),
        }
    }
}

/// An amount of memory that callers share.
#[derive(Debug)]
pub struct Quota {
    /// Units of one caller, and of all callers of a kind.
    share: u32,
    whole: u32,
    patience: Duration,
    local: Arc<Semaphore>,
    remote: Arc<Semaphore>,
    callers: Mutex<HashMap<Holder, Arc<Semaphore>>>,
}

/// A part of a quota, held until it is dropped.
#[derive(Debug)]
pub struct Share {
    own: OwnedSemaphorePermit,
    of_all: OwnedSemaphorePermit,
}

impl Share {
    /// Gives back everything beyond `bytes`.
    pub fn shrink(&mut self, bytes: u64) {
        let kept = units(bytes, u32::MAX) as usize;
        for permit in [&mut self.own, &mut self.of_all] {
            drop(permit.split(permit.num_permits().saturating_sub(kept)));
        }
    }
}

fn units(bytes: u64, most: u32) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).clamp(1, most)
}

impl Quota {
    /// A quota of `whole` bytes, of which one caller gets at most `share`. A caller waits for up to `patience`.
    pub fn new(whole: u64, share: u64, patience: Duration) -> Quota {
        let whole = units(whole, Semaphore::MAX_PERMITS.min(u32::MAX as usize) as u32);
        let room = || Arc::new(Semaphore::new(whole as usize));
        Quota { share: units(share, whole), whole, patience, local: room(), remote: room(), callers: Mutex::default() }
    }

    /// The semaphore of one caller. Semaphores that are no longer used are dropped.
    fn of(&self, holder: &Holder) -> Arc<Semaphore> {
        let mut callers = self.callers.lock();
        if let Some(own) = callers.get(holder) {
            return Arc::clone(own);
        }
        callers.retain(|_, own| Arc::strong_count(own) > 1);
        let own = Arc::new(Semaphore::new(self.share as usize));
        callers.insert(holder.clone(), Arc::clone(&own));
        own
    }

    /// The semaphore of all callers of a kind.
    fn room(&self, holder: &Holder) -> Arc<Semaphore> {
        match holder {
            Holder::Local(_) => Arc::clone(&self.local),
            Holder::Remote(_) => Arc::clone(&self.remote),
        }
    }

    /// Takes `bytes` for a caller. A request heavier than the caller's whole share counts as that share: it is served alone.
    pub async fn take(&self, holder: &Holder, bytes: u64) -> Result<Share, UsedUp> {
        let weight = units(bytes, self.share.min(self.whole));
        let own = self.of(holder);
        let all = self.room(holder);
        let taking = async {
            let own = own.acquire_many_owned(weight).await.map_err(|_| UsedUp)?;
            let of_all = all.acquire_many_owned(weight).await.map_err(|_| UsedUp)?;
            Ok(Share { own, of_all })
        };
        tokio::time::timeout(self.patience, taking).await.unwrap_or(Err(UsedUp))
    }

    /// Takes `bytes` for a caller who already holds the share `had`, without waiting: a caller that waits while it holds a share
    /// could wait for itself.
    pub fn take_beside(&self, holder: &Holder, had: &Share, bytes: u64) -> Result<Share, UsedUp> {
        let had = u32::try_from(had.own.num_permits()).unwrap_or(self.share);
        let weight = units(bytes, u32::MAX).min(self.share.saturating_sub(had));
        let own = self.of(holder).try_acquire_many_owned(weight).map_err(|_| UsedUp)?;
        let of_all = self.room(holder).try_acquire_many_owned(weight).map_err(|_| UsedUp)?;
        Ok(Share { own, of_all })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(5);

    fn remote(name: &str) -> Holder {
        Holder::Remote(name.to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn one_caller_has_a_part_and_all_have_the_whole() {
        let quota = Quota::new(10 * UNIT, 4 * UNIT, TIMEOUT);
        let (a, b, c) = (remote("a"), remote("b"), remote("c"));
        let mut held = Vec::new();
        for _ in 0..4 {
            held.push(quota.take(&a, UNIT).await.unwrap());
        }
        let start = tokio::time::Instant::now();
        assert_eq!(quota.take(&a, UNIT).await.unwrap_err(), UsedUp);
        assert_eq!(start.elapsed(), TIMEOUT);
        held.push(quota.take(&b, 4 * UNIT).await.unwrap());
        held.push(quota.take(&c, 2 * UNIT).await.unwrap());
        assert_eq!(quota.take(&c, UNIT).await.unwrap_err(), UsedUp, "all is taken");
        let local = quota.take(&Holder::Local("uid 0".to_owned()), UNIT).await;
        assert!(local.is_ok(), "but not that of this machine's users");
        held.remove(0);
        quota.take(&c, 1).await.unwrap();
        drop(held);
        quota.take(&a, 4 * UNIT).await.unwrap();
        assert!(quota.callers.lock().len() <= 4);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_heavier_than_a_share_is_served_alone() {
        let quota = Quota::new(10 * UNIT, 4 * UNIT, TIMEOUT);
        let a = remote("a");
        let share = quota.take(&a, u64::MAX).await.unwrap();
        assert_eq!(quota.take(&a, 1).await.unwrap_err(), UsedUp);
        drop(share);
        let mut share = quota.take(&a, UNIT).await.unwrap();
        let beside = quota.take_beside(&a, &share, u64::MAX).unwrap();
        assert_eq!(quota.take(&a, 1).await.unwrap_err(), UsedUp);
        drop(beside);
        let _two = quota.take(&a, 2 * UNIT).await.unwrap();
        assert!(quota.take_beside(&a, &share, 2 * UNIT).is_err());
        assert!(quota.take_beside(&a, &share, UNIT).is_ok());
        drop(share);
        share = quota.take(&a, 2 * UNIT).await.unwrap();
        assert_eq!(quota.take(&a, 1).await.unwrap_err(), UsedUp);
        share.shrink(1);
        quota.take(&a, 1).await.unwrap();
    }
}
