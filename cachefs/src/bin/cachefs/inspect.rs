//! `cachefs status` and `cachefs cache`: looking at daemons and their caches from outside.
//!
//! The root of a mount names its daemon's cache directory in an extended attribute. So nothing needs to be recorded
//! elsewhere, and daemons are found in any mount namespace.

use std::ffi::OsString;
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use cachefs::content::cache::cache_file::Form;
use cachefs::content::cache::disk::{each_file, parse_name};
use cachefs::mount::control_socket::{self, Request, Status, TreeKind};
use cachefs::mount::mountpoint::{self, TYPE};
use clap::{Args, Subcommand};
use coordinator_api::printable::{printable, printable_json, printable_lines};
use coordinator_api::quantity::format_size;
use serde::Serialize;

use crate::{Ending, leftover};

/// Arguments of `cachefs status`.
#[derive(Args)]
pub(crate) struct StatusArgs {
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    /// Only the daemon of this mount
    #[arg(long, value_name = "MOUNTPOINT")]
    mount: Option<PathBuf>,
}

/// Arguments of `cachefs cache`.
#[derive(Args)]
pub(crate) struct CacheArgs {
    #[command(subcommand)]
    action: CacheAction,
    /// The cache directory [default: that of the one mount on this host]
    #[arg(long, value_name = "DIR", global = true)]
    cache: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long, global = true)]
    json: bool,
}

impl CacheArgs {
    /// Whether the command asks about the condition of the cache: then exit code 1 is an answer.
    pub(crate) fn asks(&self) -> bool {
        matches!(self.action, CacheAction::Verify)
    }
}

#[derive(Subcommand)]
enum CacheAction {
    /// Show what it holds
    Stats,
    /// Read everything and remove what does not match its digest; exit code 1 if anything did not
    Verify,
    /// Remove everything; running containers go on
    Clear,
}

/// The cache directory behind a mount.
pub(crate) fn cache_of(mountpoint: &Path) -> Option<PathBuf> {
    let value = xattr::get(mountpoint, "user.cachefs.cache").ok()??;
    Some(OsString::from_vec(value).into())
}

pub(crate) fn mounts() -> Vec<PathBuf> {
    mountpoint::mounted().into_iter().filter(|mounted| mounted.kind == TYPE).map(|mounted| mounted.path).collect()
}

fn ask(mountpoint: &Path) -> Result<Status, Ending> {
    let dead = format!("the daemon of {} does not answer: mount again to recover it", mountpoint.display());
    if !nix::unistd::geteuid().is_root() {
        let path = mountpoint.display();
        return Err(Ending::Failure(format!("only root may ask the daemon of {path}: run cachefs as root")));
    }
    let cache = cache_of(mountpoint).ok_or_else(|| Ending::Answer(dead.clone()))?;
    control_socket::ask(&cache, &Request::Status).map_err(|_| Ending::Answer(dead))
}

/// Shows each daemon's state.
pub(crate) fn status(args: &StatusArgs) -> Result<(), Ending> {
    let paths = match &args.mount {
        Some(path) => vec![mountpoint::ours(path).map_err(|error| Ending::Answer(error.to_string()))?],
        None => mounts(),
    };
    let (mut daemons, mut silent) = (Vec::new(), Vec::new());
    for path in &paths {
        match ask(path) {
            Ok(status) => daemons.push(status),
            Err(ending) => silent.push(ending),
        }
    }
    let unmounted = if args.mount.is_some() { Vec::new() } else { leftover::daemons() };
    if args.json {
        print_json(&serde_json::json!({ "mounts": daemons, "unmounted": unmounted }))?
    } else {
        print(&daemons.iter().chain(&unmounted).map(describe).collect::<String>())?
    }
    match (silent.into_iter().next(), &unmounted[..]) {
        (Some(ending), _) => Err(ending),
        (None, _) if !daemons.is_empty() => Ok(()),
        (None, [first, ..]) => Err(Ending::Answer(format!(
            "nothing is mounted; daemon {} goes on until what uses {} ends",
            first.pid,
            first.mountpoint.display()
        ))),
        (None, []) => Err(Ending::Answer(
            "nothing is mounted: start with cachefs mount MOUNTPOINT --store DIR --cache DIR".into(),
        )),
    }
}

/// Prints to stdout, without terminal control sequences. A reader that closes the pipe early is no error.
pub(crate) fn print(text: &str) -> Result<(), Ending> {
    write(printable_lines(text).as_bytes())
}

/// Like [`print`], for bytes that this program made itself: they are written unchanged.
pub(crate) fn write(bytes: &[u8]) -> Result<(), Ending> {
    match std::io::stdout().write_all(bytes) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn describe(status: &Status) -> String {
    let counters = &status.counters;
    let answered = match status.store_answered_seconds_ago {
        Some(seconds) => format!("answered {seconds} s ago"),
        None => "has not answered yet".to_owned(),
    };
    let damaged = counters.damaged_in_store + counters.damaged_in_cache;
    let lease = match (&status.lease_error, status.lease_renewed_seconds_ago) {
        (Some(error), _) => format!("lease not renewed: {}", printable(error)),
        (None, Some(seconds)) => format!("lease renewed {seconds} s ago"),
        (None, None) => "no lease yet".to_owned(),
    };
    let coordinator = status.coordinator.iter().map(|url| format!("  coordinator  {url}  {lease}")).collect();
    let trees = match (status.tree.kind, &status.tree.why) {
        (TreeKind::Native, _) => format!("native, {} mounted", status.tree.mounted),
        (TreeKind::Loop, _) => format!("native on loop devices, {} mounted", status.tree.mounted),
        (TreeKind::Fuse, None) => "fuse".to_owned(),
        (TreeKind::Fuse, Some(why)) => format!("fuse: {}", printable(why)),
    };
    let restarts = match status.restarts {
        0 => String::new(),
        times => format!("  worker       died {times} times and was replaced, see the log"),
    };
    let unmounted = if status.unmounted { "unmounted, still in use  " } else { "" };
    let lines = [
        format!("{}  {unmounted}(pid {}, version {})", status.mountpoint.display(), status.pid, status.version),
        restarts,
        format!("  store        {}  {answered}", status.store.display()),
        coordinator,
        format!("  images       {}  (generation {})", status.images, status.generation),
        format!("  open mode    {}", status.open),
        format!("  trees        {trees}"),
        format!("  opened       {} layers, {} chains", status.layers_opened, status.chains_opened),
        format!(
            "  cache        {}  {} of {}",
            status.cache.display(),
            format_size(status.cache_used),
            format_size(status.cache_limit)
        ),
        format!("  reads        {} from the cache, {} from the store", counters.reads_hit, counters.reads_missed),
        format!(
            "  bytes        {} from the cache, {} from the store",
            format_size(counters.bytes_from_cache),
            format_size(counters.bytes_from_store)
        ),
        format!(
            "  trouble      {} store errors, {} timeouts, {damaged} damaged",
            counters.store_errors, counters.store_timeouts
        ),
    ];
    lines.iter().filter(|line| !line.is_empty()).map(|line| format!("{line}\n")).collect()
}

pub(crate) fn print_json(value: &impl Serialize) -> Result<(), Ending> {
    print(&format!("{}\n", printable_json(&serde_json::to_string_pretty(value)?)))
}

/// What a local cache holds, and how many files were found damaged or removed.
#[derive(Default, Serialize)]
struct Inventory {
    whole_files: u64,
    whole_bytes: u64,
    partial_files: u64,
    partial_bytes: u64,
    damaged_files: u64,
    removed_files: u64,
}

/// Looks at, verifies or clears a cache. A daemon may be running on it.
pub(crate) fn cache(args: &CacheArgs) -> Result<(), Ending> {
    let directory = match (&args.cache, &mounts()[..]) {
        (Some(directory), _) => directory.clone(),
        (None, [mount]) => match ask(mount) {
            // Without an answer of the daemon the state of the cache is unknown: that is a failure, not an answer.
            Err(Ending::Answer(words)) => return Err(Ending::Failure(words)),
            status => status?.cache,
        },
        (None, _) => return Err(Ending::Usage("say which cache directory: --cache DIR".into())),
    };
    let objects = directory.join("objects");
    if !objects.is_dir() {
        return Err(Ending::Failure(format!("{} is not a cache directory: it has no objects", directory.display())));
    }
    let inventory = take_stock(&objects, &args.action);
    if args.json {
        print_json(&inventory)?;
        return verdict(&inventory);
    }
    let outcome = match args.action {
        CacheAction::Stats => String::new(),
        CacheAction::Verify => format!("damaged  {} files, removed\n", inventory.damaged_files),
        CacheAction::Clear => format!("removed  {} files\n", inventory.removed_files),
    };
    print(&format!(
        "whole    {} files, {}\npartial  {} files, {}\n{outcome}",
        inventory.whole_files,
        format_size(inventory.whole_bytes),
        inventory.partial_files,
        format_size(inventory.partial_bytes)
    ))?;
    verdict(&inventory)
}

/// Damage is reported as an error even though the damaged files were removed: the disk may be failing.
fn verdict(inventory: &Inventory) -> Result<(), Ending> {
    match inventory.damaged_files {
        0 => Ok(()),
        1 => Err(Ending::Answer("1 file was damaged; it is removed, and fetched again when it is needed".into())),
        files => Err(Ending::Answer(format!(
            "{files} files were damaged; they are removed, and fetched again when they are needed"
        ))),
    }
}

fn take_stock(objects: &Path, action: &CacheAction) -> Inventory {
    let mut inventory = Inventory::default();
    each_file(objects, |path, meta| {
        let on_disk = std::os::unix::fs::MetadataExt::blocks(meta) * 512;
        let name = parse_name(path);
        match name {
            Some((_, Form::Whole)) => {
                inventory.whole_files += 1;
                inventory.whole_bytes += on_disk;
            }
            Some((_, Form::Partial)) => {
                inventory.partial_files += 1;
                inventory.partial_bytes += on_disk;
            }
            None => {}
        }
        let remove = match action {
            CacheAction::Stats => false,
            CacheAction::Clear => true,
            // Pieces of partial files are compared when they are used: their digests are in the layers' indexes.
            CacheAction::Verify => name.is_some_and(|(digest, form)| form == Form::Whole && !matches(path, &digest)),
        };
        if remove && fs::remove_file(path).is_ok() {
            inventory.removed_files += 1;
            inventory.damaged_files += u64::from(matches!(action, CacheAction::Verify));
        }
    });
    inventory
}

/// Whether a file's content has this digest. A file that was removed meanwhile counts as matching.
fn matches(path: &Path, digest: &store::ContentDigest) -> bool {
    match cachefs::content::indexes::hash_file(path) {
        Ok(found) => found == *digest,
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}
