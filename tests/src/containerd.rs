//! A real containerd in a directory of its own, this machine's 1.6 or one of an [`EngineTree`], and the snapshotter that it
//! asks.
//!
//! Pods share containerd's network, so that they need no network plugin: this machine's, or a namespace's. Dropping it stops
//! everything by process id and unmounts what is below the directory.

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
use crate::engine_tree::{EngineTree, EnteredTree};
use crate::namespace::{Forward, Namespace};
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
    engine: Option<Engine>,
    directory: TempDir,
}

/// A containerd that is not this machine's, with a network of its own.
#[derive(Debug)]
struct Engine {
    tree: EnteredTree,
    namespace: Namespace,
    forwards: Vec<Forward>,
}

impl Containerd {
    /// Starts a containerd that asks `snapshotter` and whose pods are held by the image `pause`.
    pub fn start(snapshotter: &Snapshotter, pause: &str) -> Result<Containerd> {
        Self::start_of(None, snapshotter, pause)
    }

    /// Starts this machine's containerd, or that of a tree.
    pub fn start_of(tree: Option<&EngineTree>, snapshotter: &Snapshotter, pause: &str) -> Result<Containerd> {
        let directory = tempfile::Builder::new().prefix("containerd-").tempdir()?;
        let is_2 = tree.is_some_and(|tree| tree.suite() == "sid");
        let cri = if is_2 { CRI_OF_2 } else { CRI_OF_1 };
        let config = config(directory.path(), snapshotter) + &cri.replace("PAUSE", pause);
        let config = config.replace("VERSION", if is_2 { "3" } else { "2" });
        let config = config.replace("DIRECTORY", &directory.path().to_string_lossy());
        std::fs::write(directory.path().join("config.toml"), config)?;
        std::fs::create_dir(directory.path().join("cni"))?;
        std::fs::write(directory.path().join("cni/pods.conflist"), NETWORK)?;
        let engine = match tree {
            Some(tree) => {
                let namespace = Namespace::new()?;
                let tree = tree.enter(&namespace, directory.path())?;
                Some(Engine { tree, namespace, forwards: Vec::new() })
            }
            None => None,
        };
        let process = spawn(engine.as_ref(), directory.path());
        if process.is_err() {
            clean(directory.path());
        }
        Ok(Containerd { process: process?, engine, directory })
    }

    /// Makes `127.0.0.1:PORT` lead to this machine's, where containerd has a network of its own.
    pub fn forward(&mut self, address: &str) -> Result<()> {
        if let Some(engine) = &mut self.engine {
            engine.forwards.push(engine.namespace.forward(address)?);
        }
        Ok(())
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
        self.process = spawn(self.engine.as_ref(), self.directory.path())?;
        Ok(())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        clean(self.directory.path());
    }
}

/// The network of pods that have their own: only loopback, and an address that nobody uses.
const NETWORK: &str = r#"{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "pods0", "ipam": {"type": "host-local", "subnet": "10.88.0.0/16", "dataDir": "/run/pods"}}
]}"#;

/// The part of a configuration that is for pods, from version 2 on. It is no longer understood if it says `version = 2`.
const CRI_OF_2: &str = r#"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "cachefs"
  disable_snapshot_annotations = false
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "PAUSE"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    conf_dir = "DIRECTORY/cni"
    bin_dirs = ["/usr/lib/cni"]
[plugins."io.containerd.grpc.v1.cri"]
  stream_server_port = "0"
"#;

/// The same of versions 1.6 and 1.7.
const CRI_OF_1: &str = r#"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "PAUSE"
  restrict_oom_score_adj = true
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    conf_dir = "DIRECTORY/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "cachefs"
    disable_snapshot_annotations = false
"#;

fn config(directory: &Path, snapshotter: &Snapshotter) -> String {
    let (directory, socket, root) = (directory.display(), snapshotter.socket().display(), snapshotter.root().display());
    format!(
        r#"version = VERSION
root = "{directory}/root"
state = "{directory}/state"
[grpc]
  address = "{directory}/containerd.sock"
[ttrpc]
  address = "{directory}/containerd.sock.ttrpc"
[proxy_plugins.cachefs]
  type = "snapshot"
  address = "{socket}"
  [proxy_plugins.cachefs.exports]
    root = "{root}"
[plugins."io.containerd.gc.v1.scheduler"]
  schedule_delay = "0s"
  startup_delay = "10ms"
  mutation_threshold = 1
[plugins."io.containerd.internal.v1.opt"]
  path = "{directory}/opt"
"#
    )
}

fn spawn(engine: Option<&Engine>, directory: &Path) -> Result<Process> {
    let mut command = match engine {
        Some(engine) => engine.tree.command("containerd"),
        None => Command::new(DAEMON),
    };
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

/// Waits until containerd has collected everything that nothing needs, down to this many snapshots. `ctr` runs its client.
///
/// containerd collects after a deletion, but forgets one that is made while an earlier collection still removes snapshots: it drops
/// what is older than the end of the last collection. So it is asked for collections, as whatever happens next on a machine does.
pub fn wait_for_snapshots(
    snapshotter: &Snapshotter,
    count: usize,
    ctr: impl Fn(&[&str]) -> Result<String>,
) -> Result<()> {
    let mut last = 0;
    let waited = wait_until(&format!("{count} snapshots"), TIMEOUT, || {
        last = snapshotter.directories()?;
        if last != count {
            let lease = ctr(&["leases", "create"])?;
            ctr(&["leases", "delete", "--sync", lease.trim()])?;
        }
        Ok(last == count)
    });
    waited.with_context(|| format!("there are {last}"))
}
