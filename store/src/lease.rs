//! The lease: which coordinator may write, without flock and without trusting clocks.
//!
//! Leading means owning the highest **epoch**. An epoch is taken by creating `lease/<epoch>` exclusively (`link(2)` of a
//! complete file), so at most one coordinator ever owns it. The leader keeps changing `lease/<epoch>.beat`; a standby
//! that has seen the same beat for the leader's whole time to live, **by its own monotonic clock**, takes the next epoch.
//! No wall clock is compared, so skew does not matter. A leader that stops cleanly writes `lease/<epoch>.released`; one that
//! died on this very machine is recognised by its process being gone, and is succeeded at once.
//!
//! A leader that was merely slow finds a higher epoch before its next commit ([`Lease::check`]) and stops
//! ([`Error::Fenced`]). What it may have renamed into place by then is named by digest and verified, so it is harmless;
//! the catalogue's exclusive generations settle the rest.
//!
//! If a leader's lease file is lost, the leader writes it again with its next beat; until then the beat shows that the
//! epoch is taken. If a lease file cannot be read, nothing is known of its leader but the beat.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::durable::{create_exclusive, replace, sync_dir};
use crate::error::{Error, Result};
use crate::layout::{Layout, leading_number, number};
use crate::reserve::with_reserve;

/// A leader that has not changed its beat for this long may be succeeded.
pub const TIME_TO_LIVE: Duration = Duration::from_secs(15);

/// Who took an epoch: the contents of `lease/<epoch>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// What the coordinator calls itself, for messages.
    pub name: String,
    /// The machine's boot identity: process numbers mean something only within it.
    pub boot: String,
    /// The process-number namespace.
    pub pid_namespace: String,
    /// The process.
    pub pid: u32,
    /// When that process started, in the kernel's ticks: process numbers are reused.
    pub started: String,
    /// How long its beat may stand still, seconds.
    pub time_to_live: u64,
}

fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Field 22, counted after the command name, which may itself hold spaces.
    let after_name = &stat[stat.rfind(')')? + 1..];
    let state = after_name.split_whitespace().next()?;
    let started = after_name.split_whitespace().nth(19)?;
    (state != "Z" && state != "X").then(|| started.to_owned())
}

impl Holder {
    /// This process, calling itself `name`.
    pub fn this_process(name: &str) -> Holder {
        let pid = std::process::id();
        let namespace = fs::read_link("/proc/self/ns/pid").map(|p| p.display().to_string());
        Holder {
            name: name.to_owned(),
            boot: fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned(),
            pid_namespace: namespace.unwrap_or_default(),
            pid,
            started: start_time(pid).unwrap_or_default(),
            time_to_live: TIME_TO_LIVE.as_secs(),
        }
    }

    /// Whether this holder ran on this machine and its process is gone.
    fn is_known_dead(&self) -> bool {
        let me = Holder::this_process("");
        !me.boot.is_empty()
            && self.boot == me.boot
            && self.pid_namespace == me.pid_namespace
            && start_time(self.pid).as_deref() != Some(&self.started)
    }
}

fn epoch_path(layout: &Layout, epoch: u64) -> PathBuf {
    layout.leases().join(format!("{epoch:016x}"))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The epoch that a file shows to be taken, being a lease, a beat or a release. A file that is still being written
/// shows none.
fn epoch_of(name: &str) -> Option<u64> {
    let name = name.strip_suffix(".beat").or_else(|| name.strip_suffix(".released")).unwrap_or(name);
    number(name)
}

/// The highest epoch that anyone has taken; 0 if nobody has.
pub(crate) fn highest(layout: &Layout) -> Result<u64> {
    let dir = layout.leases();
    let mut highest = 0;
    for entry in fs::read_dir(&dir).map_err(|e| Error::io("list", &dir, e))? {
        let entry = entry.map_err(|e| Error::io("list", &dir, e))?;
        let name = entry.file_name();
        let epoch = name.to_str().and_then(epoch_of);
        highest = highest.max(epoch.unwrap_or(0));
    }
    Ok(highest)
}

/// Watches another coordinator's lease until it may be taken.
#[derive(Debug, Default)]
pub struct Watch {
    seen: Option<(u64, Vec<u8>, Instant)>,
    /// Only epochs above this one are taken.
    floor: u64,
}

/// The result of one look at the lease.
#[derive(Debug)]
pub enum Attempt {
    /// This coordinator leads now.
    Taken(Lease),
    /// Another coordinator leads; look again soon.
    Held {
        /// The leader.
        holder: Holder,
        /// Its epoch.
        epoch: u64,
    },
}

impl Watch {
    /// Takes no epoch up to `floor`: it was in use before, even if the store, which may come from a backup, does not
    /// know of it.
    pub(crate) fn above(&mut self, floor: u64) {
        self.floor = self.floor.max(floor);
    }

    /// Looks at the lease once, at the monotonic time `now`, and takes it if it is free.
    pub fn attempt(&mut self, layout: &Layout, me: &Holder, now: Instant) -> Result<Attempt> {
        let epoch = highest(layout)?;
        if epoch > 0
            && let Some(holder) = self.holder_alive(layout, epoch, now)?
        {
            return Ok(Attempt::Held { holder, epoch });
        }
        let next = epoch.max(self.floor) + 1;
        match Lease::take(layout, me, next)? {
            Some(lease) => Ok(Attempt::Taken(lease)),
            // Another standby was faster: watch it from now on.
            None => Ok(Attempt::Held { holder: read_holder(layout, next)?, epoch: next }),
        }
    }

    fn holder_alive(&mut self, layout: &Layout, epoch: u64, now: Instant) -> Result<Option<Holder>> {
        let path = epoch_path(layout, epoch);
        if with_suffix(&path, ".released").exists() {
            return Ok(None);
        }
        let holder = read_holder(layout, epoch)?;
        if holder.is_known_dead() {
            return Ok(None);
        }
        let beat = fs::read(with_suffix(&path, ".beat")).unwrap_or_default();
        match &self.seen {
            Some((seen_epoch, seen_beat, since)) if *seen_epoch == epoch && *seen_beat == beat => {
                let silent = now.saturating_duration_since(*since);
                Ok((silent <= Duration::from_secs(holder.time_to_live)).then_some(holder))
            }
            _ => {
                self.seen = Some((epoch, beat, now));
                Ok(Some(holder))
            }
        }
    }
}

fn read_holder(layout: &Layout, epoch: u64) -> Result<Holder> {
    let path = epoch_path(layout, epoch);
    let bytes = match fs::read(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("read", &path, e)),
        bytes => bytes.unwrap_or_default(),
    };
    Ok(serde_json::from_slice(&bytes).unwrap_or_else(|_| Holder {
        name: format!("a coordinator whose lease {} cannot be read", path.display()),
        boot: String::new(),
        pid_namespace: String::new(),
        pid: 0,
        started: String::new(),
        time_to_live: TIME_TO_LIVE.as_secs(),
    }))
}

/// The right to write, until somebody takes a higher epoch.
#[derive(Debug)]
pub struct Lease {
    layout: Layout,
    epoch: u64,
    /// The contents of the lease file.
    holder: Vec<u8>,
    beats: u64,
}

impl Lease {
    fn take(layout: &Layout, me: &Holder, epoch: u64) -> Result<Option<Lease>> {
        let json = serde_json::to_vec(me).map_err(|e| Error::corrupt("the lease", e.to_string()))?;
        if !with_reserve(layout, || create_exclusive(&epoch_path(layout, epoch), &json))? {
            return Ok(None);
        }
        let mut lease = Lease { layout: layout.clone(), epoch, holder: json, beats: 0 };
        lease.renew()?;
        lease.forget_old()?;
        Ok(Some(lease))
    }

    /// Removes the files of epochs long past.
    fn forget_old(&self) -> Result<()> {
        let dir = self.layout.leases();
        for entry in fs::read_dir(&dir).map_err(|e| Error::io("list", &dir, e))?.flatten() {
            let name = entry.file_name();
            let epoch = name.to_str().and_then(leading_number);
            if epoch.is_some_and(|epoch| epoch + 8 < self.epoch) {
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(())
    }

    /// The fencing epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Changes the beat, and restores the lease file if it is lost. To be called several times within [`TIME_TO_LIVE`].
    pub fn renew(&mut self) -> Result<()> {
        self.check()?;
        self.beats += 1;
        let path = epoch_path(&self.layout, self.epoch);
        if !path.exists() {
            with_reserve(&self.layout, || create_exclusive(&path, &self.holder))?;
        }
        let path = with_suffix(&path, ".beat");
        with_reserve(&self.layout, || replace(&path, self.beats.to_string().as_bytes()))
    }

    /// Fails with [`Error::Fenced`] if somebody has taken a higher epoch.
    pub fn check(&self) -> Result<()> {
        check(&self.layout, self.epoch)
    }

    /// Gives the lease up, so that the next coordinator need not wait.
    pub fn release(self) -> Result<()> {
        let path = with_suffix(&epoch_path(&self.layout, self.epoch), ".released");
        with_reserve(&self.layout, || fs::write(&path, b"").map_err(|e| Error::io("write", &path, e)))?;
        sync_dir(&self.layout.leases())
    }
}

/// Fails with [`Error::Fenced`] if an epoch above `mine` has been taken.
pub(crate) fn check(layout: &Layout, mine: u64) -> Result<()> {
    match highest(layout)? {
        current if current > mine => Err(Error::Fenced { mine, current }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Layout) {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        fs::create_dir(layout.leases()).unwrap();
        (dir, layout)
    }

    /// A holder on another machine, whose process cannot be looked at.
    fn elsewhere(name: &str) -> Holder {
        Holder { boot: "another".into(), ..Holder::this_process(name) }
    }

    fn take(layout: &Layout, me: &Holder) -> Lease {
        match Watch::default().attempt(layout, me, Instant::now()).unwrap() {
            Attempt::Taken(lease) => lease,
            Attempt::Held { holder, .. } => panic!("held by {holder:?}"),
        }
    }

    #[test]
    fn a_silent_leader_is_succeeded_and_then_refused() {
        let (_dir, layout) = store();
        let mut first = take(&layout, &elsewhere("a"));
        let mut watch = Watch::default();
        let start = Instant::now();
        let held = |watch: &mut Watch, seconds| {
            matches!(
                watch.attempt(&layout, &elsewhere("b"), start + Duration::from_secs(seconds)).unwrap(),
                Attempt::Held { epoch: 1, .. }
            )
        };
        assert!(held(&mut watch, 0) && held(&mut watch, 14));
        first.renew().unwrap();
        assert!(held(&mut watch, 20) && held(&mut watch, 35), "a beat starts the time anew");
        let Attempt::Taken(second) = watch.attempt(&layout, &elsewhere("b"), start + Duration::from_secs(36)).unwrap()
        else {
            panic!("a leader silent for 16 seconds is succeeded");
        };
        assert_eq!(second.epoch(), 2);
        second.check().unwrap();
        assert!(matches!(first.check(), Err(Error::Fenced { mine: 1, current: 2 })));
        assert!(matches!(first.renew(), Err(Error::Fenced { .. })));
    }

    #[test]
    fn a_released_or_dead_leader_is_succeeded_at_once() {
        let (_dir, layout) = store();
        take(&layout, &elsewhere("a")).release().unwrap();
        let dead = Holder { pid: u32::MAX - 1, ..Holder::this_process("dead") };
        assert_eq!(take(&layout, &dead).epoch(), 2);
        let alive = take(&layout, &Holder::this_process("c"));
        assert_eq!(alive.epoch(), 3);
        let answer = Watch::default().attempt(&layout, &Holder::this_process("d"), Instant::now()).unwrap();
        assert!(matches!(answer, Attempt::Held { epoch: 3, .. }));
    }

    #[test]
    fn a_lease_that_is_lost_or_damaged_makes_no_second_leader() {
        let (_dir, layout) = store();
        take(&layout, &elsewhere("a")).release().unwrap();
        let mut leader = take(&layout, &elsewhere("b"));
        let path = epoch_path(&layout, 2);
        let start = Instant::now();
        for damage in [None, Some(&b""[..]), Some(b"rubbish")] {
            match damage {
                None => fs::remove_file(&path).unwrap(),
                Some(bytes) => fs::write(&path, bytes).unwrap(),
            }
            let mut watch = Watch::default();
            let mut look =
                |seconds| watch.attempt(&layout, &elsewhere("c"), start + Duration::from_secs(seconds)).unwrap();
            assert!(matches!(look(0), Attempt::Held { epoch: 2, .. }), "{damage:?}");
            leader.renew().unwrap();
            assert!(matches!(look(20), Attempt::Held { epoch: 2, .. }), "{damage:?}");
            assert!(path.exists());
        }
        fs::write(&path, b"").unwrap();
        let mut watch = Watch::default();
        let mut look = |seconds| watch.attempt(&layout, &elsewhere("c"), start + Duration::from_secs(seconds)).unwrap();
        look(0);
        let Attempt::Taken(next) = look(16) else { panic!("a silent leader is succeeded, known or not") };
        assert_eq!(next.epoch(), 3);
    }

    #[test]
    fn one_epoch_has_one_owner() {
        let (_dir, layout) = store();
        let wins = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|n| {
                    scope.spawn({
                        let layout = &layout;
                        move || Lease::take(layout, &elsewhere(&n.to_string()), 1).unwrap().is_some()
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).filter(|won| *won).count()
        });
        assert_eq!(wins, 1);
    }
}
