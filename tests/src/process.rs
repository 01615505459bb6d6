//! One process: its log, its readiness and its end.
//!
//! Nothing here sleeps to let something happen. [`wait_until`] polls a condition, and the error names the condition if
//! it does not come true in time. Processes are ended by process id only.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long an operation that should be quick may take on a loaded machine.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// How much of a log is shown when a test fails.
const LOG_TAIL: usize = 8000;

/// Polls `ready` every few milliseconds until it is true. After `limit` it fails with an error that names `what`.
pub fn wait_until(what: &str, limit: Duration, mut ready: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(2);
    while !ready()? {
        if Instant::now() >= deadline {
            bail!("{what} did not happen within {limit:?}");
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    Ok(())
}

/// The value of a line of `/proc/PID/status`, in bytes.
fn memory(pid: u32, line: &str) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let value = text.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(':'));
    let kilobytes = value.and_then(|value| value.trim().strip_suffix(" kB"));
    Ok(kilobytes.with_context(|| format!("process {pid} has no {line}"))?.parse::<u64>()? << 10)
}

/// The resident memory of a process, bytes.
pub fn resident(pid: u32) -> Result<u64> {
    memory(pid, "VmRSS")
}

/// The peak of the resident memory, ever or since [`forget_peak`], bytes.
pub fn peak(pid: u32) -> Result<u64> {
    memory(pid, "VmHWM")
}

/// Resets the value that [`peak`] returns.
pub fn forget_peak(pid: u32) -> Result<()> {
    Ok(std::fs::write(format!("/proc/{pid}/clear_refs"), "5")?)
}

/// The result of a command that ran to its end.
#[derive(Debug, Clone)]
pub struct Output {
    /// The exit code, or 128 + n if signal n ended the command.
    pub code: i32,
    /// Standard output; bytes that are not UTF-8 are replaced.
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
    /// The command line, for messages.
    pub command: String,
}

impl Output {
    /// Standard output without its last line feed. If the command failed, an error that quotes standard error.
    pub fn ok(self) -> Result<String> {
        if self.code != 0 {
            bail!("`{}` exited with {}: {}{}", self.command, self.code, self.stderr, self.stdout);
        }
        Ok(self.stdout.trim_end_matches('\n').to_owned())
    }

    /// Whether the command succeeded.
    pub fn succeeded(&self) -> bool {
        self.code == 0
    }
}

/// Runs a command to its end, with empty standard input and both outputs captured.
pub fn run(command: &mut Command) -> Result<Output> {
    let line = describe(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{line}`"))?;
    Ok(Output {
        code: exit_code(output.status),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        command: line,
    })
}

/// The exit status as one number, as the shell writes it.
pub fn exit_code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn describe(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    words.join(" ")
}

/// A process that runs in parallel to the test; killed and reaped when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    log: PathBuf,
    child: Child,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` with both outputs appended to the file `log`.
    pub fn spawn(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let open = || File::options().create(true).append(true).open(log);
        let output = open().with_context(|| format!("cannot write the log {}", log.display()))?;
        let line = describe(command);
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("cannot start `{line}`"))?;
        Ok(Self { name: name.to_owned(), log: log.to_owned(), child, ended: None })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything that the process, and earlier ones with the same log, wrote.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default()
    }

    /// The file behind [`Process::log`].
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// The exit status, if the process has ended.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().with_context(|| format!("cannot watch {}", self.name))?;
        }
        Ok(self.ended)
    }

    /// Polls `ready` until it is true. Fails at once if the process ends before that; the error quotes the log.
    pub fn wait_ready(&mut self, limit: Duration, mut ready: impl FnMut() -> Result<bool>) -> Result<()> {
        let what = format!("readiness of {}", self.name);
        let result = wait_until(&what, limit, || match self.exited()? {
            Some(status) => bail!("{} ended too early with {}", self.name, exit_code(status)),
            None => ready(),
        });
        result.with_context(|| format!("log of {}:\n{}", self.name, self.log_tail()))
    }

    /// Sends a signal. Does nothing if the process has ended.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.exited()?.is_some() {
            return Ok(());
        }
        let pid = Pid::from_raw(i32::try_from(self.pid())?);
        kill(pid, signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Waits for the process to end. Fails if it does not end within `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("end of {}", self.name);
        wait_until(&what, limit, || Ok(self.exited()?.is_some()))?;
        self.ended.context("the process has no status")
    }

    /// Sends SIGTERM and returns the exit status. If the process does not end within `limit`, it is killed and an error is returned.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        let ended = self.wait(limit);
        if ended.is_err() {
            self.kill()?;
        }
        ended
    }

    /// Sends SIGKILL and waits until the process is gone.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.wait(TIMEOUT).map(drop)
    }

    /// The end of the log, for messages.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let mut start = log.len().saturating_sub(LOG_TAIL);
        while !log.is_char_boundary(start) {
            start += 1;
        }
        log[start..].to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of {} (pid {}):\n{}---", self.name, self.pid(), self.log_tail());
        }
        let _ = self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_status_and_signals_are_seen() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let mut shell = Command::new("sh");
        shell.args(["-c", "trap 'exit 7' TERM; echo up; while :; do sleep 0.01; done"]);
        let mut process = Process::spawn("shell", &mut shell, &log).unwrap();
        process.wait_ready(TIMEOUT, || Ok(std::fs::read_to_string(&log)?.contains("up"))).unwrap();
        assert_eq!(process.terminate(TIMEOUT).unwrap().code(), Some(7));
        assert_eq!(process.log(), "up\n");
    }

    #[test]
    fn an_early_end_is_reported_with_the_log() {
        let directory = tempfile::tempdir().unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo no luck; exit 3"]);
        let mut process = Process::spawn("shell", &mut shell, &directory.path().join("log")).unwrap();
        let error = process.wait_ready(TIMEOUT, || Ok(false)).unwrap_err();
        assert!(format!("{error:#}").contains("no luck"), "{error:#}");
    }
}
