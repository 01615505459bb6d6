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

use super::error::{Error, Result};
use super::root::Root;

/// How long dockerd may take to stop: it gives containers without live-restore 15 seconds.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// The process id of the dockerd that runs on a data-root, if one does; 0 if it cannot be seen from here (another pid
/// namespace).
pub(super) fn running(root: &Root) -> Result<Option<u32>> {
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

/// Fails if a dockerd runs on a data-root.
pub(super) fn stopped(root: &Root) -> Result<()> {
    match running(root)? {
        Some(pid) => Err(Error::Running { path: root.path().into(), pid }),
        None => Ok(()),
    }
}

/// Who holds a lock on `file`.
fn holder(file: &File) -> Option<u32> {
    let meta = file.metadata().ok()?;
    let (major, minor) = (nix::sys::stat::major(meta.dev()), nix::sys::stat::minor(meta.dev()));
    let key = format!("{major:02x}:{minor:02x}:{}", meta.ino());
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| lock_owner(line, &key))
}

/// `1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF`: the process, if the line is about the inode `key`.
fn lock_owner(line: &str, key: &str) -> Option<u32> {
    let fields: Vec<_> = line.split_whitespace().collect();
    let [_, "FLOCK", _, _, pid, inode, ..] = fields[..] else { return None };
    (inode == key).then(|| pid.parse().ok()).flatten().filter(|pid| *pid != 0)
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
    pub(super) fn systemd(root: &Root, running: u32) -> Result<Control> {
        let mut show = Command::new("systemctl");
        show.args(["show", "docker.service", "--property=MainPID", "--value"]);
        let pid =
            show.output().ok().and_then(|output| String::from_utf8_lossy(&output.stdout).trim().parse::<u32>().ok());
        match pid {
            Some(pid) if pid != 0 && pid == running => Ok(Control::Systemd),
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
        assert_eq!(running(&root).unwrap(), Some(std::process::id()));
        drop(held);
        assert_eq!(running(&root).unwrap(), None);
    }

    #[test]
    fn a_command_that_fails_is_quoted() {
        let error = Control::Command("false".into()).start().unwrap_err().to_string();
        assert!(error.starts_with("`false start` failed"), "{error}");
    }
}
