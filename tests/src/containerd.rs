//! A real containerd (Debian's 1.6) in a directory of its own, and the snapshotter that it asks.
//!
//! Pods share this machine's network, so that they need no network plugin. Dropping it stops everything by process id and
//! unmounts what is below the directory.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tempfile::TempDir;

use crate::cluster::binary;
use crate::cri::Cri;
use crate::process::{Output, Process, TIMEOUT, run, wait_until};
use crate::{leftovers, mounts};

/// Debian's daemon.
const DAEMON: &str = "/usr/bin/containerd";
/// Debian's client.
const CLIENT: &str = "/usr/bin/ctr";

/// A running `cachefs snapshotter`.
#[derive(Debug)]
pub struct Snapshotter {
    root: PathBuf,
    socket: PathBuf,
    mount: PathBuf,
    /// The socket, if it outlives the process, as systemd holds it for a service.
    held: Option<UnixListener>,
    process: Process,
}

impl Snapshotter {
    /// Starts it on the mount, with root and socket below `directory`.
    pub fn start(directory: &Path, mount: &Path) -> Result<Snapshotter> {
        Self::start_on(directory, mount, None)
    }

    /// Starts it on a socket that is held for it while it is restarted.
    pub fn start_held(directory: &Path, mount: &Path) -> Result<Snapshotter> {
        let listener = UnixListener::bind(directory.join("snapshotter.sock"))?;
        // The process is to inherit it.
        fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty()))?;
        Self::start_on(directory, mount, Some(listener))
    }

    fn start_on(directory: &Path, mount: &Path, held: Option<UnixListener>) -> Result<Snapshotter> {
        let (root, socket) = (directory.join("snapshots-root"), directory.join("snapshotter.sock"));
        let process = Self::spawn(&root, &socket, mount, held.as_ref())?;
        Ok(Snapshotter { root, socket, mount: mount.to_owned(), held, process })
    }

    /// The command that starts it, for tests of failures at the start.
    pub fn command(root: &Path, socket: &Path, mount: &Path) -> Result<Command> {
        let mut command = Command::new(binary("cachefs")?);
        command.arg("snapshotter").arg("--root").arg(root).arg("--socket").arg(socket).arg("--mount").arg(mount);
        Ok(command)
    }

    fn spawn(root: &Path, socket: &Path, mount: &Path, held: Option<&UnixListener>) -> Result<Process> {
        let log = root.with_extension("log");
        let mut command = Self::command(root, socket, mount)?;
        if let Some(listener) = held {
            // As systemd hands a socket over: the third descriptor, and two variables.
            let line = format!("exec 3<&{}; export LISTEN_FDS=1 LISTEN_PID=$$; exec \"$@\"", listener.as_raw_fd());
            let mut shell = Command::new("bash");
            shell.args(["-c", &line, "bash"]).arg(command.get_program()).args(command.get_args());
            command = shell;
        }
        let mut process = Process::spawn("cachefs snapshotter", &mut command, &log)?;
        process.wait_ready(TIMEOUT, || Ok(std::fs::read_to_string(&log)?.contains("are served")))?;
        Ok(process)
    }

    /// Where it keeps its snapshots.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process: log, pid, signals.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Whether somebody has connected to the held socket and is not served yet.
    pub fn is_asked(&self) -> Result<bool> {
        let listener = self.held.as_ref().context("no socket is held")?;
        let mut asked = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        Ok(poll(&mut asked, PollTimeout::ZERO)? > 0)
    }

    /// Ends it with SIGKILL, if it still runs, and starts it again.
    pub fn restart(&mut self) -> Result<()> {
        self.process.kill()?;
        // Readiness is read from the log.
        std::fs::remove_file(self.root.with_extension("log"))?;
        self.process = Self::spawn(&self.root, &self.socket, &self.mount, self.held.as_ref())?;
        Ok(())
    }

    /// The number of snapshots that have a directory.
    pub fn directories(&self) -> Result<usize> {
        Ok(std::fs::read_dir(self.root.join("snapshots"))?.count())
    }
}

/// A running containerd whose default snapshotter is the one it was started with.
#[derive(Debug)]
pub struct Containerd {
    process: Process,
    directory: TempDir,
}

impl Containerd {
    /// Starts a containerd that asks `snapshotter` and whose pods are held by the image `pause`.
    pub fn start(snapshotter: &Snapshotter, pause: &str) -> Result<Containerd> {
        let directory = tempfile::Builder::new().prefix("containerd-").tempdir()?;
        std::fs::write(directory.path().join("config.toml"), config(directory.path(), snapshotter.socket(), pause))?;
        let process = spawn(directory.path());
        if process.is_err() {
            clean(directory.path());
        }
        Ok(Containerd { process: process?, directory })
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("containerd.sock")
    }

    /// A connection as a kubelet has one.
    pub fn cri(&self) -> Result<Cri> {
        Cri::connect(&self.socket())
    }

    /// Runs `ctr` in the namespace of pods and returns the output, also if it failed.
    pub fn run(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(CLIENT);
        command.arg("--address").arg(self.socket()).args(["--namespace", "k8s.io"]).args(arguments);
        run(&mut command)
    }

    /// Runs `ctr` and returns its standard output. If it fails, the error quotes its standard error.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        self.run(arguments)?.ok()
    }

    /// Its process: log, pid.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Ends it with SIGKILL, if it still runs, and starts it again. Containers go on meanwhile.
    pub fn restart(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process = spawn(self.directory.path())?;
        Ok(())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        clean(self.directory.path());
    }
}

fn config(directory: &Path, snapshotter: &Path, pause: &str) -> String {
    let (directory, snapshotter) = (directory.display(), snapshotter.display());
    format!(
        r#"version = 2
root = "{directory}/root"
state = "{directory}/state"
[grpc]
  address = "{directory}/containerd.sock"
[ttrpc]
  address = "{directory}/containerd.sock.ttrpc"
[proxy_plugins.cachefs]
  type = "snapshot"
  address = "{snapshotter}"
[plugins."io.containerd.gc.v1.scheduler"]
  schedule_delay = "0s"
  startup_delay = "10ms"
  mutation_threshold = 1
[plugins."io.containerd.internal.v1.opt"]
  path = "{directory}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    conf_dir = "{directory}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "cachefs"
    disable_snapshot_annotations = false
"#
    )
}

fn spawn(directory: &Path) -> Result<Process> {
    let mut command = Command::new(DAEMON);
    command.arg("--config").arg(directory.join("config.toml"));
    let mut process = Process::spawn("containerd", &mut command, &directory.join("containerd.log"))?;
    let socket = directory.join("containerd.sock");
    process.wait_ready(TIMEOUT, || {
        let mut version = Command::new(CLIENT);
        version.arg("--address").arg(&socket).arg("version");
        Ok(run(&mut version)?.succeeded())
    })?;
    Ok(process)
}

fn clean(directory: &Path) {
    leftovers::end_processes(directory);
    mounts::detach_below(directory);
}

/// Waits until containerd has collected everything that nothing needs, down to this many snapshots.
pub fn wait_for_snapshots(snapshotter: &Snapshotter, count: usize) -> Result<()> {
    let mut last = 0;
    let waited = wait_until(&format!("{count} snapshots"), TIMEOUT, || {
        last = snapshotter.directories()?;
        Ok(last == count)
    });
    waited.with_context(|| format!("there are {last}"))
}
