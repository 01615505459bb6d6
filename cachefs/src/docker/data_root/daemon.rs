//! The dockerd of a data-root: whether it runs, and stopping and starting it.
//!
//! A running dockerd (20.10 and later) holds an exclusive `flock` on `volumes/metadata.db` of its data-root from start
//! to end; no other program does. So that lock tells whether dockerd runs, not a pid file or the name of a process. The
//! process id of the lock's holder comes from `/proc/locks`.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::error::{Error, Result};
use super::root::Root;

/// How long dockerd may take to stop: it gives containers without live-restore 15 seconds.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// One run of dockerd. Two runs differ, even if process ids repeat.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    /// Its process id; 0 if it cannot be seen from here (another pid namespace).
    pub(super) pid: u32,
    /// When it started, in the kernel's ticks since boot.
    started: u64,
    /// Which boot that was.
    boot: String,
}

/// The dockerd that runs on a data-root, if one does.
pub(super) fn running(root: &Root) -> Result<Option<Identity>> {
    let path = root.volume_database();
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("open", &path, e)),
    };
    match file.try_lock_shared() {
        // The lock is dropped at once: a dockerd that is starting tries for a second before it gives up.
        Ok(()) => Ok(None),
        Err(TryLockError::WouldBlock) => Ok(Some(holder(&file).unwrap_or_default())),
        Err(TryLockError::Error(e)) => Err(Error::io("examine", &path, e)),
    }
}

/// Who holds a lock on `file`.
fn holder(file: &File) -> Option<Identity> {
    let meta = file.metadata().ok()?;
    let (major, minor) = (nix::sys::stat::major(meta.dev()), nix::sys::stat::minor(meta.dev()));
    let key = format!("{major:02x}:{minor:02x}:{}", meta.ino());
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let pid = locks.lines().find_map(|line| lock_owner(line, &key))?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(Identity { pid, started: start_time(&stat)?, boot: boot.trim().to_owned() })
}

/// `1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF`: the process, if the line is about the inode `key`.
fn lock_owner(line: &str, key: &str) -> Option<u32> {
    let fields: Vec<_> = line.split_whitespace().collect();
    let [_, "FLOCK", _, _, pid, inode, ..] = fields[..] else { return None };
    (inode == key).then(|| pid.parse().ok()).flatten().filter(|pid| *pid != 0)
}

/// Field 22 of `/proc/PID/stat`; the name in field 2 may hold anything, but ends with the last bracket.
fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// What stops and starts dockerd.
#[derive(Debug, Clone)]
pub(super) enum Control {
    /// systemd's `docker.service`, with its socket, which would start it again too early.
    Systemd,
    /// A command that takes the word `stop` or `start`.
    Command(String),
}

impl Control {
    /// systemd, if it runs this very dockerd.
    pub(super) fn systemd(root: &Root, running: &Identity) -> Result<Control> {
        let mut show = Command::new("systemctl");
        show.args(["show", "docker.service", "--property=MainPID", "--value"]);
        let pid =
            show.output().ok().and_then(|output| String::from_utf8_lossy(&output.stdout).trim().parse::<u32>().ok());
        match pid {
            Some(pid) if pid != 0 && pid == running.pid => Ok(Control::Systemd),
            _ => Err(Error::Unmanaged { path: root.path().into() }),
        }
    }

    fn line(&self, word: &str) -> String {
        match self {
            Control::Systemd => format!("systemctl {word} docker.socket docker.service"),
            Control::Command(command) => format!("{command} {word}"),
        }
    }

    fn run(&self, word: &str) -> Result<()> {
        let line = self.line(word);
        let failed = |why: String| Error::Control { command: line.clone(), why };
        let status = Command::new("sh").args(["-c", &line]).status().map_err(|e| failed(e.to_string()))?;
        if status.success() { Ok(()) } else { Err(failed(status.to_string())) }
    }

    /// Stops dockerd and waits until it is gone.
    pub(super) fn stop(&self, root: &Root) -> Result<()> {
        self.run("stop")?;
        let deadline = Instant::now() + STOP_LIMIT;
        while running(root)?.is_some() {
            if Instant::now() > deadline {
                let (command, seconds) = (self.line("stop"), STOP_LIMIT.as_secs());
                return Err(Error::StillRunning { path: root.path().into(), command, seconds });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Starts dockerd.
    pub(super) fn start(&self) -> Result<()> {
        self.run("start")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel() {
        let line = "1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF";
        assert_eq!(lock_owner(line, "fe:00:5678"), Some(1234));
        assert_eq!(lock_owner(line, "fe:00:567"), None);
        assert_eq!(lock_owner("1: POSIX  ADVISORY  WRITE 1234 fe:00:5678 0 EOF", "fe:00:5678"), None);
        assert_eq!(lock_owner("1: -> FLOCK", "x"), None);
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 1 1";
        assert_eq!(start_time(stat), Some(4242));
    }

    #[test]
    fn a_held_database_is_a_running_dockerd() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        assert_eq!(running(&root).unwrap(), None);
        std::fs::create_dir(dir.path().join("volumes")).unwrap();
        let held = File::create(root.volume_database()).unwrap();
        assert_eq!(running(&root).unwrap(), None);
        held.lock().unwrap();
        assert_eq!(running(&root).unwrap().map(|identity| identity.pid), Some(std::process::id()));
        drop(held);
        assert_eq!(running(&root).unwrap(), None);
    }

    #[test]
    fn a_command_that_fails_is_quoted() {
        let error = Control::Command("false".into()).start().unwrap_err().to_string();
        assert!(error.starts_with("`false start` failed"), "{error}");
    }
}
