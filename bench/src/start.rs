//! A container start without an engine: an overlay over lower directories, and the application in a chroot of it.
//!
//! The time runs from mount(2) of the overlay to useful work. The upper directory is on the local disk and holds what
//! an engine would provide: device nodes, `/proc`, and the application's own directory.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::Pid;
use tempfile::TempDir;
use tests::mounts;
use tests::process::wait_until;

use crate::application::{Application, READY, Useful};
use crate::process;

const DEVICES: [(&str, u64); 5] = [("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)];
/// How long a server may take to end.
const ENDING: Duration = Duration::from_secs(10);

/// A container's directory and its server. Both are removed when it is dropped.
struct Container {
    server: Option<Child>,
    directory: TempDir,
}

impl Container {
    fn prepare(application: &Application) -> Result<Container> {
        let directory = tempfile::Builder::new().prefix("start-").tempdir()?;
        let upper = directory.path().join("upper");
        for name in ["upper/dev", "work", "root"] {
            fs::create_dir_all(directory.path().join(name))?;
        }
        for (name, minor) in DEVICES {
            mknod(&upper.join("dev").join(name), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, minor))?;
        }
        application.prepare(&upper.join(READY.trim_start_matches('/')))?;
        Ok(Container { server: None, directory })
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    fn mount(&self, lowers: &[PathBuf]) -> Result<()> {
        let (root, at) = (self.root(), |name: &str| self.directory.path().join(name).display().to_string());
        // overlayfs wants the topmost first.
        let lower = lowers.iter().rev().map(|lower| lower.display().to_string()).collect::<Vec<_>>().join(":");
        let options = format!("lowerdir={lower},upperdir={},workdir={}", at("upper"), at("work"));
        mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .with_context(|| format!("cannot mount an overlay over {lower}"))?;
        mount(Some("proc"), &root.join("proc"), Some("proc"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount /proc over {lower}"))
    }

    fn run(&mut self, application: &Application) -> Result<()> {
        let mut command = Command::new("chroot");
        command.arg(self.root()).args(application.command).current_dir("/").env_clear();
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", "/root");
        let log = self.directory.path().join("log");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&log)?);
        let said = || fs::read_to_string(&log).unwrap_or_default();
        let mut child = command.spawn().context("cannot start chroot")?;
        if matches!(application.useful, Useful::Exits) {
            let status = child.wait()?;
            if !status.success() {
                bail!("{} failed: {status} {}", application.image, said());
            }
            return Ok(());
        }
        let child = self.server.insert(child);
        let ready = self.directory.path().join("root").join(READY.trim_start_matches('/'));
        application.wait_for_answer(&ready, || match child.try_wait()? {
            Some(status) => bail!("{} ended: {status} {}", application.image, said()),
            None => Ok(()),
        })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            // An orderly end, so that the server ends its workers too.
            if let Ok(pid) = i32::try_from(server.id()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
            }
            if wait_until("the end of a server", ENDING, || Ok(server.try_wait()?.is_some())).is_err() {
                let _ = server.kill();
                let _ = server.wait();
            }
        }
        mounts::detach_below(self.directory.path());
    }
}

/// Starts the application on an image's lower directories, base first, and returns the seconds until it was useful.
pub(crate) fn seconds(lowers: &[PathBuf], application: &Application) -> Result<f64> {
    let mut container = Container::prepare(application)?;
    let start = Instant::now();
    container.mount(lowers)?;
    container.run(application)?;
    Ok(start.elapsed().as_secs_f64())
}

/// Drops the page cache, then loads what starts a container again, so that only the container itself is cold.
pub(crate) fn make_cold() -> Result<()> {
    process::drop_kernel_caches()?;
    let warm = Command::new("chroot").args(["/", "/bin/true"]).status().context("cannot run chroot")?;
    if !warm.success() {
        bail!("chroot failed: {warm}");
    }
    Ok(())
}
