//! The project's own processes: coordinator, `cachefsctl`, mounts.
//!
//! The binaries are those in Cargo's target directory, beside the running test, unless `CACHEFS_BIN_DIR` names another
//! directory. The tests use only command lines that the README promises.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::MsFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::mounts;
use crate::process::{Output, Process, TIMEOUT, run, wait_until};

/// The path of one of the project's binaries: `cachefs`, `cachefsctl`, `cachefs-coordinator` or `bench`.
pub fn binary(name: &str) -> Result<PathBuf> {
    let directory = match std::env::var_os("CACHEFS_BIN_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => {
            let test = std::env::current_exe().context("cannot find the running test")?;
            // target/debug/deps/test-hash -> target/debug
            test.parent().and_then(Path::parent).context("the test has no target directory")?.to_owned()
        }
    };
    let path = directory.join(name);
    if !path.is_file() {
        bail!("the binary {} is missing: build the workspace or set CACHEFS_BIN_DIR", path.display());
    }
    Ok(path)
}

/// What a coordinator is started with.
#[derive(Debug, Clone)]
pub struct CoordinatorSpec {
    /// The shared store.
    pub store: PathBuf,
    /// The coordinator's own directory; socket and log lie beside it.
    pub state: PathBuf,
    /// A TCP address to listen on besides the socket.
    pub listen: Option<String>,
    /// More arguments of `serve`.
    pub arguments: Vec<String>,
    /// Environment, such as `DOCKER_CONFIG` or `SSL_CERT_FILE`.
    pub environment: Vec<(String, String)>,
}

impl CoordinatorSpec {
    /// A coordinator with this store and state directory, and nothing else.
    pub fn new(store: &Path, state: &Path) -> Self {
        Self {
            store: store.to_owned(),
            state: state.to_owned(),
            listen: None,
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// Adds one variable to the coordinator's environment.
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The command that starts it, for tests of start-up failures.
    pub fn command(&self) -> Result<Command> {
        let mut command = Command::new(binary("cachefs-coordinator")?);
        command.arg("serve").arg("--store").arg(&self.store).arg("--state").arg(&self.state);
        command.arg("--socket").arg(self.socket());
        if let Some(address) = &self.listen {
            command.args(["--listen", address]);
        }
        command.args(&self.arguments).envs(self.environment.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }

    /// The path of its socket.
    pub fn socket(&self) -> PathBuf {
        self.state.with_extension("sock")
    }
}

/// A running `cachefs-coordinator serve`.
#[derive(Debug)]
pub struct Coordinator {
    spec: CoordinatorSpec,
    process: Process,
}

impl Coordinator {
    /// Starts it and waits until its socket answers.
    pub fn start(spec: CoordinatorSpec) -> Result<Self> {
        let process = Self::spawn(&spec)?;
        Ok(Self { spec, process })
    }

    fn spawn(spec: &CoordinatorSpec) -> Result<Process> {
        let log = spec.state.with_extension("log");
        let mut process = Process::spawn("cachefs-coordinator", &mut spec.command()?, &log)?;
        let socket = spec.socket();
        process.wait_ready(TIMEOUT, || Ok(UnixStream::connect(&socket).is_ok()))?;
        Ok(process)
    }

    /// What the coordinator was started with.
    pub fn spec(&self) -> &CoordinatorSpec {
        &self.spec
    }

    /// A `cachefsctl` that connects to this coordinator.
    pub fn ctl(&self) -> Ctl {
        Ctl { server: self.url(), environment: Vec::new() }
    }

    /// The socket's address as `--server` and `--coordinator` take it: `unix:PATH`.
    pub fn url(&self) -> String {
        format!("unix:{}", self.spec.socket().display())
    }

    /// The path of its socket.
    pub fn socket(&self) -> PathBuf {
        self.spec.socket()
    }

    /// Its process: log, pid, signals.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Sends SIGTERM and returns the exit status.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.process.terminate(TIMEOUT)
    }

    /// Ends it with SIGKILL.
    pub fn kill9(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Starts it again with the same arguments. Ends it with SIGKILL first if it still runs.
    pub fn restart(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process = Self::spawn(&self.spec)?;
        Ok(())
    }
}

/// Runs `cachefsctl` against one coordinator.
#[derive(Debug, Clone)]
pub struct Ctl {
    /// The value of `--server`.
    pub server: String,
    /// Environment of every run.
    pub environment: Vec<(String, String)>,
}

impl Ctl {
    /// Runs it to its end and returns the output, also if it failed.
    pub fn run(&self, arguments: &[&str]) -> Result<Output> {
        run(&mut self.command(arguments)?)
    }

    /// Runs it and returns its standard output. If it fails, the error quotes its standard error.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        self.run(arguments)?.ok()
    }

    /// Runs it with `--json` and returns the parsed document.
    pub fn json(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        let text = self.ok(&[&["--json"], arguments].concat())?;
        serde_json::from_str(&text).with_context(|| format!("cachefsctl --json {arguments:?} printed no JSON: {text}"))
    }

    /// The command, to run it in parallel to the test.
    pub fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(binary("cachefsctl")?);
        command.args(["--server", &self.server]).args(arguments);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }
}

/// What a mount is started with.
#[derive(Debug, Clone)]
pub struct MountSpec {
    /// Another build's `cachefs`; the workspace's own without it.
    pub program: Option<PathBuf>,
    /// The mount point; created if missing.
    pub mountpoint: PathBuf,
    /// The shared store.
    pub store: PathBuf,
    /// The host's local cache; created if missing.
    pub cache: PathBuf,
    /// `--cache-size`, such as `64M`.
    pub cache_size: Option<String>,
    /// `--coordinator`.
    pub coordinator: Option<String>,
    /// More arguments of `mount`.
    pub arguments: Vec<String>,
    /// Environment of the daemon.
    pub environment: Vec<(String, String)>,
    /// A shell command to run before the daemon replaces the shell, such as `umask 0077`.
    pub first: Option<String>,
}

impl MountSpec {
    /// A host: mount point `mnt` and cache `cache` below `directory`.
    pub fn new(directory: &Path, store: &Path) -> Self {
        Self {
            program: None,
            mountpoint: directory.join("mnt"),
            store: store.to_owned(),
            cache: directory.join("cache"),
            cache_size: None,
            coordinator: None,
            arguments: Vec::new(),
            environment: Vec::new(),
            first: None,
        }
    }

    /// The command that starts the daemon, for tests of start-up failures.
    pub fn command(&self) -> Result<Command> {
        let program = self.program.clone().map_or_else(|| binary("cachefs"), Ok)?;
        let mut command = match &self.first {
            None => Command::new(program),
            Some(first) => {
                // A shell runs it, because in the test's own process it would affect every other test too.
                let mut shell = Command::new("sh");
                shell.arg("-c").arg(format!("{first} && exec \"$0\" \"$@\"")).arg(program);
                shell
            }
        };
        command.arg("mount").arg(&self.mountpoint).arg("--store").arg(&self.store).arg("--cache").arg(&self.cache);
        if let Some(size) = &self.cache_size {
            command.args(["--cache-size", size]);
        }
        if let Some(url) = &self.coordinator {
            command.args(["--coordinator", url]);
        }
        command.arg("--foreground").args(&self.arguments);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }
}

/// A running `cachefs mount`; unmounted when dropped.
#[derive(Debug)]
pub struct Mount {
    spec: MountSpec,
    process: Process,
}

impl Mount {
    /// Starts the daemon and waits until `layers/` is visible through FUSE.
    pub fn start(spec: MountSpec) -> Result<Self> {
        std::fs::create_dir_all(&spec.cache).with_context(|| format!("cannot make {}", spec.cache.display()))?;
        // This returns ENOTCONN for a mount point whose daemon died. Recovering such a mount point is the daemon's job.
        if mounts::at(&spec.mountpoint)?.is_none() {
            std::fs::create_dir_all(&spec.mountpoint)?;
        }
        let process = Self::spawn(&spec)?;
        Ok(Self { spec, process })
    }

    fn spawn(spec: &MountSpec) -> Result<Process> {
        let log = spec.cache.with_extension("log");
        let mut process = Process::spawn("cachefs mount", &mut spec.command()?, &log)?;
        let ready = process.wait_ready(TIMEOUT, || {
            let mounted = mounts::at(&spec.mountpoint)?.is_some_and(|mount| mount.kind.starts_with("fuse"));
            Ok(mounted && spec.mountpoint.join("layers").is_dir())
        });
        if ready.is_err() {
            mounts::detach_below(&spec.mountpoint);
        }
        ready.map(|()| process)
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        &self.spec.mountpoint
    }

    /// The path of `layers/<hex>` for a diffID, given with or without `sha256:`.
    pub fn layer(&self, diff_id: &str) -> PathBuf {
        self.path().join("layers").join(diff_id.trim_start_matches("sha256:"))
    }

    /// The path of `chains/<hex>` for a chainID, given with or without `sha256:`.
    pub fn chain(&self, chain_id: &str) -> PathBuf {
        self.path().join("chains").join(chain_id.trim_start_matches("sha256:"))
    }

    /// The path of `trees/<hex>` for a chainID, given with or without `sha256:`: what engines are given.
    pub fn tree(&self, chain_id: &str) -> PathBuf {
        self.path().join("trees").join(chain_id.trim_start_matches("sha256:"))
    }

    /// Its process: log, pid, signals.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The id of the process that serves the mount now. Its parent, [`Mount::process`], keeps the mount.
    pub fn worker(&self) -> Result<u32> {
        let keeper = self.process.pid();
        let children = std::fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children"))?;
        let worker = children.split_whitespace().last().context("the mount has no worker")?;
        Ok(worker.parse()?)
    }

    /// Sends a signal to the worker.
    pub fn signal_worker(&self, signal: Signal) -> Result<()> {
        let worker = Pid::from_raw(i32::try_from(self.worker()?)?);
        kill(worker, signal).with_context(|| format!("cannot send {signal} to the worker"))
    }

    /// Makes the kernel drop unused inodes of this mount, as every remount does.
    pub fn forget(&self) -> Result<()> {
        let (none, flags) = (None::<&str>, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY);
        nix::mount::mount(none, self.path(), none, flags, none).context("cannot remount")
    }

    /// Sends SIGTERM and returns the exit status.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.process.terminate(TIMEOUT)
    }

    /// Ends the keeper with SIGKILL, and with it the worker. The dead mount point stays.
    pub fn kill9(&mut self) -> Result<()> {
        let worker = self.worker();
        self.process.kill()?;
        let Ok(worker) = worker else { return Ok(()) };
        // It is nobody's child now, so nobody learns when it is gone.
        let gone = format!("/proc/{worker}");
        wait_until("the end of the worker", TIMEOUT, || Ok(!Path::new(&gone).exists()))
    }

    /// Starts it again with the same arguments. Ends it with SIGKILL first if it still runs.
    pub fn restart(&mut self) -> Result<()> {
        self.kill9()?;
        self.process = Self::spawn(&self.spec)?;
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let asked = self.process.signal(Signal::SIGTERM).is_ok();
        if asked && self.process.wait(Duration::from_secs(10)).is_err() {
            let _ = self.process.kill();
        }
        mounts::detach_below(&self.spec.mountpoint);
    }
}
