//! The keeper: what lets a mount outlive the worker that serves it.
//!
//! It mounts, starts the worker and waits. It has open what must not be closed, which is the connection to the kernel, and what the next
//! worker must know ([`kernel_state`]). If the worker dies, whatever it was doing, the keeper starts another one, which takes the
//! connection over; whoever uses the mount waits meanwhile.
//!
//! ```text
//!   cachefs mount            keeper: mounts, /dev/fuse, records, references, lock of the cache, signals
//!     cachefs mount          worker: everything else; may die at any instruction
//! ```
//!
//! The keeper is to run for years, and nothing that anybody sends reaches it: it reads no requests of the kernel, no store, no network and no
//! files; it hears of nothing but signals, the end of its worker and the few words of [`link`]. It has one thread and no locks, never touches what
//! is mounted, which could hang, and allocates little more than a process takes to be started. The worker is killed when the keeper dies: then
//! the mount is dead, as any FUSE mount is whose server died.
//!
//! A worker that dies young is started again after a while, and not for ever: after [`GIVE_UP`] without one that serves, the mount is taken
//! away, so that whoever waits gets errors. Kernels before 6.9 do not send unanswered requests again, and those would hang: there the worker's
//! death is the mount's end.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::pipe2;

use crate::filesystem::kernel_state;
use crate::mount::cache_dir::{self, CacheDir};
use crate::mount::config::Config;
use crate::mount::data_files::{self, DataMount};
use crate::mount::link::{self, Begin, End, Notice};
use crate::mount::mountpoint::{self, Mounted};
use crate::os::oom_score;

/// A worker that has lived for this long has not died young.
const YOUNG: Duration = Duration::from_secs(10);
/// How long the keeper waits before it starts the second, third, ... worker after one that died young: this, twice this, ...
const PAUSE: Duration = Duration::from_millis(100);
/// The longest pause after one that has served, and after one that has not.
const PAUSE_MAX: (Duration, Duration) = (Duration::from_millis(400), Duration::from_secs(5));
/// How long users of the mount wait for a worker.
const GIVE_UP: Duration = Duration::from_secs(60);
/// How long a killed worker may take to be gone before the next one begins.
const BURIAL: Duration = Duration::from_millis(100);
/// How often the keeper looks whether dead workers are quite gone.
const REAP: Duration = Duration::from_millis(500);
/// How long a worker that was told to end may take.
const END: Duration = Duration::from_secs(5);
/// Signals upon which other workers reload or tell their state. They are no reason to take the mount away from running
/// containers.
const IGNORED: [Signal; 3] = [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2];

/// Why a mount cannot begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The mount point cannot be used.
    #[error(transparent)]
    Mountpoint(#[from] mountpoint::Error),
    /// The cache directory cannot be used.
    #[error(transparent)]
    Cache(#[from] cache_dir::Error),
    /// The operating system refuses something that the keeper needs.
    #[error("cannot keep a mount: {0}")]
    System(#[from] io::Error),
    /// The worker says why it cannot serve.
    #[error("{0}")]
    Worker(String),
    /// The worker has died, and no other one can take its place.
    #[error("the worker died, and {why}: {} was unmounted, restart the containers that use it", path.display())]
    Died {
        /// Why not.
        why: &'static str,
        /// The mount point.
        path: PathBuf,
    },
}

/// How to start a worker.
#[derive(Debug)]
pub struct Program {
    /// The program, by a path that leads to its successor after an upgrade.
    pub path: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

/// What outlives workers.
struct Keeper {
    program: Program,
    mounted: Mounted,
    cache_dir: CacheDir,
    signals: SignalFd,
    device: OwnedFd,
    state: (File, File),
    data: Result<Data, String>,
    /// Those that were not quite gone when last looked at.
    dead: Vec<Child>,
}

/// The connection of the data files, and their mount until it is not needed any more.
struct Data {
    device: OwnedFd,
    mount: Option<OwnedFd>,
}

/// A worker that was started.
struct Worker {
    child: Child,
    socket: OwnedFd,
    life: OwnedFd,
    born: Instant,
}

/// What happens next.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    /// The worker tells something.
    Told(Notice),
    /// The worker is dead.
    Died,
    /// The keeper is to end.
    Signal,
    /// Nothing, until the time was up.
    Nothing,
}

/// How a worker's life ended.
#[derive(Debug, PartialEq, Eq)]
enum Death {
    /// With its mount.
    Ended,
    /// Because it could not serve.
    Failed(String),
    /// By itself.
    Died,
    /// It lives, and is to end.
    Signal,
}

/// Mounts, and has the mount served until it is unmounted or a signal ends it. `program` tells how to start a worker, which is to serve this
/// mount point with this cache directory. Calls `ready` once the mount can be used.
pub fn run(config: &Config, program: impl FnOnce(&Path, &Path) -> Program, ready: impl FnOnce()) -> Result<(), Error> {
    oom_score::lower();
    let mountpoint = mountpoint::prepare(&config.mountpoint)?;
    let cache_dir = CacheDir::claim(&config.cache)?;
    let program = program(&mountpoint, cache_dir.path());
    let mut mask: SigSet = IGNORED.into_iter().collect();
    mask.add(Signal::SIGTERM);
    mask.add(Signal::SIGINT);
    mask.thread_block().map_err(io::Error::from)?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC).map_err(io::Error::from)?;
    let state = kernel_state::files()?;
    let data = if config.tree.ways().is_empty() {
        Err("the configuration says so".to_owned())
    } else {
        let made = data_files::mount().map_err(|error| error.to_string());
        made.map(|DataMount { device, mount }| Data { device, mount: Some(mount) })
    };
    let device = mountpoint::mount(&mountpoint)?;
    let mounted = mountpoint::mounted_on(&mountpoint).unwrap_or_else(|| Mounted::ended(&mountpoint));
    let mut keeper = Keeper { program, mounted, cache_dir, signals, device, state, data, dead: Vec::new() };
    let kept = keeper.keep(ready);
    if kept.is_err() {
        keeper.take_away();
    }
    kept
}

impl Keeper {
    /// Starts workers, one after the other.
    fn keep(&mut self, ready: impl FnOnce()) -> Result<(), Error> {
        let (mut ready, mut can_resume, mut pause) = (Some(ready), false, Duration::ZERO);
        // How many have served.
        let mut earlier = 0;
        // When the last worker that served was gone.
        let mut alone = Instant::now();
        loop {
            let resumes = earlier > 0;
            let worker = match self.start(earlier) {
                Ok(worker) => worker,
                Err(error) if !resumes => return Err(error.into()),
                Err(error) => {
                    tracing::error!("the worker cannot be started: {error}");
                    if self.has_ended(None, pause, alone)? {
                        return Ok(());
                    }
                    pause = longer(pause, false);
                    continue;
                }
            };
            let mut is_served = false;
            let death = self.watch(&worker, alone, |may| {
                (is_served, can_resume) = (true, may);
                if let Some(ready) = ready.take() {
                    ready();
                }
            });
            let lived = worker.born.elapsed();
            if is_served {
                (alone, earlier) = (Instant::now(), earlier + 1);
            }
            match death {
                Death::Ended => return Ok(()),
                Death::Signal => {
                    self.end(Some(worker));
                    return Ok(());
                }
                Death::Failed(why) if earlier == 0 => return Err(Error::Worker(why)),
                Death::Failed(why) => tracing::error!("the worker could not go on: {why}"),
                Death::Died if earlier == 0 => {
                    return Err(Error::Worker("the worker died while it was starting: see its log".to_owned()));
                }
                Death::Died => tracing::error!("the worker died after {} s", lived.as_secs()),
            }
            if !can_resume {
                return Err(self.died("none can take its place on this kernel or in this open mode"));
            }
            pause = if lived < YOUNG { pause } else { Duration::ZERO };
            if self.has_ended(Some(worker), pause, alone)? {
                return Ok(());
            }
            pause = longer(pause, is_served);
        }
    }

    /// Waits a while before the next worker; says whether the keeper was told to end meanwhile.
    fn has_ended(&mut self, dead: Option<Worker>, pause: Duration, alone: Instant) -> Result<bool, Error> {
        if alone.elapsed() > GIVE_UP {
            return Err(self.died("no other one could take its place"));
        }
        dead.into_iter().for_each(|dead| self.bury(dead.child));
        let until = Instant::now() + pause;
        while Instant::now() < until {
            if self.next(None, until) == Event::Signal {
                self.end(None);
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Waits until all threads of a worker that was killed are gone, so that none of them still takes requests or writes records; but not for
    /// long, because one of them may wait for the mount.
    fn bury(&mut self, mut dead: Child) {
        let _ = dead.kill();
        let until = Instant::now() + BURIAL;
        while Instant::now() < until {
            if !matches!(dead.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(BURIAL / 100);
        }
        self.dead.push(dead);
    }

    fn died(&self, why: &'static str) -> Error {
        Error::Died { why, path: self.mounted.path.clone() }
    }

    fn start(&mut self, earlier: u32) -> io::Result<Worker> {
        let (socket, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(io::Error::from)?;
        let (life, held) = pipe2(OFlag::O_CLOEXEC)?;
        let mut command = Command::new(&self.program.path);
        command.args(&self.program.arguments).stdin(theirs).stdout(held).stderr(Stdio::inherit());
        let child = command.spawn()?;
        // With it goes the keeper's own hold on what only the worker must have.
        drop(command);
        let worker = Worker { child, socket, life, born: Instant::now() };
        let (records, references) = &self.state;
        let mut handed = vec![self.cache_dir.lock(), self.device.as_fd(), records.as_fd(), references.as_fd()];
        let no_data = match &self.data {
            Ok(Data { device, mount }) => {
                // A worker that finds no mount takes the device's place for it: nobody opens a file any more.
                handed.extend([device.as_fd(), mount.as_ref().map_or(device.as_fd(), AsFd::as_fd)]);
                None
            }
            Err(why) => Some(why.clone()),
        };
        match link::hand_over(
            worker.socket.as_fd(),
            &Begin { earlier, device: self.mounted.device.clone(), no_data },
            &handed,
        ) {
            Ok(()) => Ok(worker),
            Err(error) => {
                self.bury(worker.child);
                Err(error)
            }
        }
    }

    /// Waits until a worker's life ends. Calls `serves` when it serves, with whether another one can take its place.
    fn watch(&mut self, worker: &Worker, alone: Instant, mut serves: impl FnMut(bool)) -> Death {
        let (mut failed, mut has_ended, mut is_served) = (None, false, false);
        loop {
            let until = if is_served { Instant::now() + GIVE_UP } else { alone.max(worker.born) + GIVE_UP };
            match self.next(Some(worker), until) {
                Event::Told(Notice::Ready { can_resume }) => {
                    is_served = true;
                    serves(can_resume);
                }
                Event::Told(Notice::Failed(why)) => failed = Some(why),
                Event::Told(Notice::LetGo) => self.let_go(),
                Event::Told(Notice::Ended) => has_ended = true,
                Event::Died if has_ended => return Death::Ended,
                Event::Died => return failed.map_or(Death::Died, Death::Failed),
                Event::Signal => return Death::Signal,
                Event::Nothing if is_served => {}
                Event::Nothing => return Death::Failed("it does not begin to serve".to_owned()),
            }
        }
    }

    /// Lets go of the mount of the data files, which then ends with its last user.
    fn let_go(&mut self) {
        if let Ok(data) = &mut self.data {
            data.mount = None;
        }
    }

    /// Has the worker unmount and end, or does it without.
    fn end(&mut self, worker: Option<Worker>) {
        if let Some(mut worker) = worker {
            let until = Instant::now() + END;
            if link::say(worker.socket.as_fd(), &End).is_ok() {
                loop {
                    match self.next(Some(&worker), until) {
                        Event::Died | Event::Nothing => break,
                        Event::Told(Notice::LetGo) => self.let_go(),
                        Event::Told(_) | Event::Signal => {}
                    }
                }
            }
            let _ = worker.child.kill();
        }
        if self.take_away() {
            let path = self.mounted.path.display();
            tracing::warn!("told to end, so {path} was taken away, and its users will find it disconnected");
        }
    }

    /// Takes the mount away, if it is still where it was mounted: another one may have its place. Says whether it was.
    fn take_away(&self) -> bool {
        let is_there = mountpoint::mounted_on(&self.mounted.path).as_ref() == Some(&self.mounted);
        is_there && mountpoint::abort(&self.mounted.path).is_ok()
    }

    /// Waits for what happens next, at most until then.
    fn next(&mut self, worker: Option<&Worker>, until: Instant) -> Event {
        loop {
            let mut left = until.saturating_duration_since(Instant::now());
            let is_last = left.is_zero();
            self.dead.retain_mut(|dead| matches!(dead.try_wait(), Ok(None)));
            if !self.dead.is_empty() {
                left = left.min(REAP);
            }
            let of = |descriptor| PollFd::new(descriptor, PollFlags::POLLIN);
            let mut polled = vec![of(self.signals.as_fd())];
            polled.extend(worker.into_iter().flat_map(|worker| [of(worker.socket.as_fd()), of(worker.life.as_fd())]));
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut polled, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                // Nothing that could be done is safer than to go on slowly.
                Err(_) => std::thread::sleep(PAUSE),
            }
            let is_set = |at: usize| polled.get(at).and_then(PollFd::any).unwrap_or(false);
            let (signal, told, died) = (is_set(0), is_set(1), is_set(2));
            if signal && self.is_told_to_end() {
                return Event::Signal;
            }
            // What it has said is heard before its death.
            if told && let Some(Ok(Some(notice))) = worker.map(|worker| link::hear(worker.socket.as_fd())) {
                return Event::Told(notice);
            }
            if died {
                return Event::Died;
            }
            if told {
                // It has closed its end, and is about to die.
                std::thread::sleep(PAUSE);
            }
            if is_last {
                return Event::Nothing;
            }
        }
    }

    /// Reads a signal; those that are ignored are only logged.
    fn is_told_to_end(&mut self) -> bool {
        let Ok(Some(info)) = self.signals.read_signal() else { return false };
        match Signal::try_from(info.ssi_signo as i32) {
            Ok(signal) if IGNORED.contains(&signal) => {
                tracing::info!("{signal} is ignored: a changed configuration is read at the next start");
                false
            }
            _ => true,
        }
    }
}

/// The next pause between workers.
fn longer(pause: Duration, has_served: bool) -> Duration {
    (pause * 2).clamp(PAUSE, if has_served { PAUSE_MAX.0 } else { PAUSE_MAX.1 })
}
