//! Starting the daemon in the background, and ending it from outside.
//!
//! `cachefs mount` starts itself again with `--foreground --detached` and with stderr redirected to
//! `CACHE/cachefs.log`. The new process leaves the session and reports on its stdout, a pipe, whether the mount
//! succeeded. The old process passes the report on and exits.
//!
//! In the foreground and in the background it is a keeper, which starts the daemon with `--foreground --worker`.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cachefs::content::cache::disk::Limit;
use cachefs::mount::cache_dir::CacheDir;
use cachefs::mount::config::Config;
use cachefs::mount::control_socket::{self, Request, Status};
use cachefs::mount::keeper::{self, Program};
use cachefs::mount::mountpoint;
use cachefs::mount::worker;
use coordinator_api::credentials::TokenSource;
use coordinator_api::report;
use tracing_subscriber::EnvFilter;

use crate::Ending;

/// What the daemon writes to its stdout when the mount is ready.
const READY: &str = "ready";
/// A log larger than this is renamed to `cachefs.log.1` at the next start, bytes.
const LOG_MAX: u64 = 16 << 20;
/// How long `cachefs unmount` waits for the daemon to end.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

/// Starts the daemon and waits until its mount can be used.
pub(crate) fn in_background(config: &Config) -> Result<(), Ending> {
    let mountpoint = mountpoint::prepare(&config.mountpoint)?;
    // The daemon claims the directory itself. Claiming it here first lets this process report the errors, before there
    // is a log.
    drop(CacheDir::claim(&config.cache)?);
    let log_path = config.cache.join("cachefs.log");
    let log = open_log(&log_path)
        .map_err(|error| Ending::Failure(format!("cannot write {}: {error}", log_path.display())))?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(mount_args(config, (&mountpoint, &config.cache), "--detached"))
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

/// The whole configuration as flags, with absolute paths, because the daemon changes its working directory, and with the part that the process
/// has. The configuration file is not read again: it may be another one when the next worker starts.
fn mount_args(config: &Config, (mountpoint, cache): (&Path, &Path), part: &'static str) -> Vec<OsString> {
    let mut line: Vec<OsString> = vec!["mount".into(), mountpoint.into(), "--foreground".into(), part.into()];
    let mut flag = |name: &str, value: OsString| line.extend([name.into(), value]);
    flag("--store", config.store.clone().into());
    flag("--cache", cache.into());
    flag("--read-timeout", format!("{}ms", config.read_timeout.as_millis()).into());
    flag("--prefetch", config.prefetch.name().into());
    if let Limit::Bytes(size) = config.limit {
        flag("--cache-size", size.to_string().into());
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
    line
}

/// Keeps the mount in the detached process.
pub(crate) fn detached(config: &Config, filter: EnvFilter) -> Result<(), Ending> {
    let _ = nix::unistd::setsid();
    let _ = std::env::set_current_dir("/");
    let kept = in_foreground(config, filter, || say(READY));
    if let Err(Ending::Failure(error) | Ending::Usage(error) | Ending::Answer(error)) = &kept {
        say(error);
    }
    kept
}

/// Keeps the mount in this process. Calls `ready` when it can be used.
pub(crate) fn in_foreground(config: &Config, filter: EnvFilter, ready: impl FnOnce()) -> Result<(), Ending> {
    crate::start_log(filter);
    let path = std::env::current_exe()?;
    let program = |mountpoint: &Path, cache: &Path| Program {
        path,
        arguments: mount_args(config, (mountpoint, cache), "--worker"),
    };
    Ok(keeper::run(config, program, ready)?)
}

/// Serves the mount of the keeper that has started this process.
pub(crate) fn worker(config: &Config, filter: EnvFilter) -> Result<(), Ending> {
    crate::start_log(filter);
    match worker::run(config) {
        // The keeper says what went wrong.
        Err(error) if !matches!(error, worker::Error::Begin(_)) => std::process::exit(report::EXIT_FAILED.into()),
        served => Ok(served?),
    }
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
