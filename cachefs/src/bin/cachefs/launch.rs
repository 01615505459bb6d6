//! Starting the daemon in the background, and ending it from outside.
//!
//! `cachefs mount` starts itself again with `--foreground --detached` and with stderr redirected to
//! `CACHE/cachefs.log`. The new process leaves the session and reports on its stdout, a pipe, whether the mount
//! succeeded. The old process passes the report on and exits.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cachefs::mount::cache_dir::CacheDir;
use cachefs::mount::config::{Config, MountArgs};
use cachefs::mount::control_socket::{self, Request, Status};
use cachefs::mount::daemon;
use cachefs::mount::mountpoint;
use coordinator_api::credentials::TokenSource;
use tracing_subscriber::EnvFilter;

use crate::Ending;

/// What the daemon writes to its stdout when the mount is ready.
const READY: &str = "ready";
/// A log larger than this is renamed to `cachefs.log.1` at the next start, bytes.
const LOG_MAX: u64 = 16 << 20;
/// How long `cachefs unmount` waits for the daemon to end.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

/// Starts the daemon and waits until its mount can be used.
pub(crate) fn in_background(config: &Config, args: &MountArgs) -> Result<(), Ending> {
    let mountpoint = mountpoint::prepare(&config.mountpoint)?;
    // The daemon claims the directory itself. Claiming it here first lets this process report the errors, before there
    // is a log.
    drop(CacheDir::claim(&config.cache)?);
    let log_path = config.cache.join("cachefs.log");
    let log = open_log(&log_path)
        .map_err(|error| Ending::Failure(format!("cannot write {}: {error}", log_path.display())))?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(daemon_args(config, args, &mountpoint))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()?;
    let mut said = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut said)?;
    }
    match said.trim_end() {
        READY => Ok(()),
        "" => Err(Ending::Failure(format!("the daemon ended while it was starting: see {}", log_path.display()))),
        error => Err(Ending::Failure(error.to_owned())),
    }
}

fn open_log(path: &Path) -> std::io::Result<File> {
    if fs::metadata(path).is_ok_and(|meta| meta.len() > LOG_MAX) {
        fs::rename(path, path.with_extension("log.1"))?;
    }
    File::options().create(true).append(true).mode(0o600).open(path)
}

/// The same command line with absolute paths: the daemon changes its working directory.
fn daemon_args(config: &Config, args: &MountArgs, mountpoint: &Path) -> Vec<OsString> {
    let mut line: Vec<OsString> = vec!["mount".into(), mountpoint.into(), "--foreground".into(), "--detached".into()];
    let mut flag = |name: &str, value: OsString| line.extend([name.into(), value]);
    flag("--store", config.store.clone().into());
    flag("--cache", config.cache.clone().into());
    flag("--read-timeout", format!("{}ms", config.read_timeout.as_millis()).into());
    flag("--prefetch", config.prefetch.name().into());
    if let Some(size) = args.cache_size {
        flag("--cache-size", size.0.to_string().into());
    }
    if let Some(coordinator) = &config.coordinator {
        flag("--coordinator", coordinator.to_string().into());
    }
    if let Some(TokenSource::File(path)) = &config.credentials.token {
        flag("--token-file", path.into());
    }
    if let Some(path) = &config.credentials.ca_certificate {
        flag("--ca-certificate", path.into());
    }
    flag("--host-name", config.host_name.clone().into());
    flag("--open", config.open.to_string().into());
    flag("--tree", config.tree.name().into());
    if let Some(file) = args.config.as_deref().and_then(|file| std::path::absolute(file).ok()) {
        flag("--config", file.into());
    }
    line
}

/// Runs the daemon in the detached process.
pub(crate) fn detached(config: &Config, filter: EnvFilter) -> Result<(), Ending> {
    crate::start_log(filter);
    let _ = nix::unistd::setsid();
    let _ = std::env::set_current_dir("/");
    let served = daemon::run(config, || say(READY));
    if let Err(error) = &served {
        say(&error.to_string());
    }
    Ok(served?)
}

/// Writes one line to the process that started this one. Errors are ignored, because that process may have ended.
fn say(line: &str) {
    let mut stdout = std::io::stdout();
    let _ = writeln!(stdout, "{}", line.replace('\n', " ")).and_then(|()| stdout.flush());
}

/// Unmounts, and waits until the daemon has released its cache directory. Whatever still uses the mount, such as the
/// overlay of a running container, keeps the daemon alive. That is a failure, because the cache cannot be mounted again
/// before the daemon has ended.
pub(crate) fn unmount(path: &Path) -> Result<(), Ending> {
    let path = mountpoint::ours(path)?;
    let cache = crate::inspect::cache_of(&path);
    mountpoint::unmount(&path)?;
    let Some((cache, lock)) = cache.and_then(|cache| File::open(cache.join("lock")).ok().map(|lock| (cache, lock)))
    else {
        return Ok(());
    };
    let until = Instant::now() + EXIT_TIMEOUT;
    while lock.try_lock().is_err() {
        if Instant::now() >= until {
            return still_there(&path, &cache);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// The outcome when the daemon still holds its cache directory after the unmount.
fn still_there(path: &Path, cache: &Path) -> Result<(), Ending> {
    let shown = path.display();
    match control_socket::ask::<Status>(cache, &Request::Status) {
        // Somebody has mounted again in the meantime.
        Ok(_) if mountpoint::mounted_on(path).is_some() => Ok(()),
        Ok(status) => Err(Ending::Failure(format!(
            "{shown} is unmounted, but containers or programs still use it: daemon {} goes on until they end, and cachefs status shows it",
            status.pid
        ))),
        Err(_) => Err(Ending::Failure(format!(
            "{shown} is unmounted, but its daemon has not ended within {} s: see its log",
            EXIT_TIMEOUT.as_secs()
        ))),
    }
}
