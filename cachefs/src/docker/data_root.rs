//! `cachefs data-root`: dockerd's own directory, filled with the store's images without copying a layer.
//!
//! dockerd with the overlay2 driver reads its image database from files when it starts. This module writes those files for
//! every image of the store; a layer's `diff` directory becomes a symbolic link into the mount's `trees/`. Everything
//! else in the data-root stays dockerd's: containers, volumes, images pulled or built locally.
//!
//! Invariants: what dockerd or a user made is never changed or removed (`plan`, `owned_entries`); a running dockerd meets
//! nothing that it does not know (`plan`); dockerd starts after a crash at any point (`apply`); running a command twice does
//! the same as running it once.
//!
//! Module order (imports point up this list only):
//!
//! - `error`: errors.
//! - `root`: the directory, its paths, and whether overlay2 can share layers there. `dockerd_config`: whether dockerd uses it.
//! - `daemon`: the dockerd that runs on it.
//! - `owned_entries`: what we put there. `desired`: what should be there. `layer`: one layer's files. `references`,
//!   `actual`: what is there.
//! - `plan`: what to do, as a pure function. `layers`, `apply`: doing it. `removal`: undoing it. `status`: reporting it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use coordinator_api::printable::{printable, printable_json, printable_lines};
use coordinator_api::report::{self, Form};
use store::reader::Store;

mod actual;
mod apply;
mod daemon;
mod desired;
mod dockerd_config;
mod error;
mod layer;
mod layers;
mod owned_entries;
mod plan;
mod references;
mod removal;
mod root;
mod status;

pub use error::{Error, Result};

use crate::docker::mount;
use crate::uplink::lease::roots;

use actual::ActualState;
use apply::{Outcome, Work};
use daemon::Control;
use desired::DesiredState;
use owned_entries::OwnedEntries;
use plan::Plan;
use root::Root;
pub use status::Health;
use status::Report;

/// Arguments of `cachefs data-root`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

impl Args {
    /// Whether the command asks about the health of the data-root: then exit code 1 is an answer.
    pub fn asks(&self) -> bool {
        matches!(self.command, Command::Status(_))
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prepare a data-root: add the store's images and remember mount and store
    #[command(after_help = "\
Example (dockerd is stopped):
  cachefs data-root init /var/lib/docker --mount /run/cachefs/mnt")]
    Init(InitArgs),
    /// Bring a prepared data-root up to date with the store
    #[command(long_about = SYNC_ABOUT)]
    Sync(SyncArgs),
    /// Tell what is there, what is missing and what is stale; exit code 1 if there is something to do
    Status(StatusArgs),
    /// Take everything of the store out of a data-root again
    #[command(long_about = REMOVE_ABOUT)]
    Remove(RemoveArgs),
}

const REMOVE_ABOUT: &str = "Take everything of the store out of a data-root again, and leave dockerd what it had.

dockerd must be stopped. As long as a container, an image built on the store's, a name given here or the build cache needs \
something of the store, nothing is removed, and the command says what it is.";

const SYNC_ABOUT: &str = "Bring a prepared data-root up to date with the store.

Adds new images and names, moves names, brings back what docker rmi removed, and removes what has vanished from the store \
and nothing uses. Images that were pulled or built here, and names given here, stay as they are.

dockerd reads its image database when it starts only, and fails over layers that appear in it later. So with dockerd running \
sync repairs links, says how much waits, and changes nothing else: stop dockerd first, or add --restart. The best place for \
it is before every start of dockerd:

    # /etc/systemd/system/docker.service.d/cachefs.conf
    [Service]
    ExecStartPre=-/usr/bin/cachefs data-root sync /var/lib/docker

With \"live-restore\": true in daemon.json containers keep running while dockerd restarts.";

#[derive(Debug, clap::Args)]
struct CommonArgs {
    /// dockerd's data-root, such as /var/lib/docker
    dir: PathBuf,
    /// The shared store; the mount's own unless it is given, and remembered
    #[arg(long)]
    store: Option<PathBuf>,
    /// dockerd's configuration, which says where and how it keeps images
    #[arg(long, value_name = "FILE", default_value = dockerd_config::CONFIG_FILE)]
    config_file: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct InitArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Where the store is mounted with cachefs mount
    #[arg(long)]
    mount: PathBuf,
}

#[derive(Debug, clap::Args)]
struct SyncArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Where the store is mounted now, if that has changed
    #[arg(long)]
    mount: Option<PathBuf>,
    /// Stop dockerd, bring everything up to date and start dockerd again, if there is anything to do
    #[arg(long)]
    restart: bool,
    /// What stops and starts dockerd where systemd does not: run as `CMD stop` and `CMD start`; implies --restart
    #[arg(long, value_name = "CMD")]
    restart_command: Option<String>,
}

#[derive(Debug, clap::Args)]
struct StatusArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Where the store is mounted now, if that has changed
    #[arg(long)]
    mount: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct RemoveArgs {
    /// dockerd's data-root, such as /var/lib/docker
    dir: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Runs `cachefs data-root`.
pub fn run(args: Args) -> Result<Health> {
    match args.command {
        Command::Init(args) => init(&args).map(|()| Health::Good),
        Command::Sync(args) => sync(&args).map(|()| Health::Good),
        Command::Status(args) => status(&args),
        Command::Remove(args) => remove(&args).map(|()| Health::Good),
    }
}

fn open_store(path: &Path) -> Result<(PathBuf, Store, String)> {
    let path = mount::canonical(path)?;
    let store = Store::open(&path)?;
    let identity = store.identity().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((path, store, identity))
}

/// A data-root with its store and its owned entries, locked.
struct Session {
    root: Root,
    store: Store,
    owned: OwnedEntries,
    lock: File,
}

impl Session {
    /// Opens a prepared data-root. The flags may change its store's path and its mount.
    fn open(common: &CommonArgs, mount: Option<&Path>) -> Result<Session> {
        let root = Root::open(&common.dir)?;
        dockerd_config::check(&root, &common.config_file, daemon::running(&root)?)?;
        let lock = root.lock()?;
        let owned = OwnedEntries::read(&root)?;
        let mut owned = owned.ok_or_else(|| Error::NotPrepared { path: root.path().into() })?;
        let (path, store, identity) = open_store(common.store.as_deref().unwrap_or(&owned.store))?;
        if identity != owned.identity {
            return Err(Error::OtherStore { path: root.path().into(), store: path });
        }
        owned.store = path;
        if let Some(mount) = mount {
            owned.mount = mount::serving(mount)?;
        }
        Ok(Session { root, store, owned, lock })
    }

    /// Brings the data-root up to date, dockerd running or not.
    fn apply(&mut self) -> Result<Outcome> {
        let running = daemon::running(&self.root)?.is_some();
        let wanted = DesiredState::read(&self.store)?;
        let present = ActualState::read(&self.root)?;
        self.register();
        let work = Work { root: &self.root, store: &self.store, wanted: &wanted, present: &present, running };
        work.apply(&mut self.owned)
    }

    /// Registers the data-root with the mount's daemon, before any layer is linked here. The daemon then tells the
    /// coordinator which layers the data-root links to, so that they stay in the store.
    fn register(&self) {
        let Some(cache) = mount::cache(&self.owned.mount) else { return };
        if let Err(error) = roots::register(&cache, self.root.path()) {
            let (root, cache) = (self.root.path().display(), cache.display());
            say(&format!(
                "{cache} cannot note that {root} uses the mount, so the coordinator may remove its layers: {error}"
            ));
        }
    }

    /// How to restart dockerd, if that was asked for and would change what dockerd shows.
    fn control(&self, args: &SyncArgs) -> Result<Option<Control>> {
        let Some(running) = daemon::running(&self.root)? else { return Ok(None) };
        let plan = Plan::new(&DesiredState::read(&self.store)?, &ActualState::read(&self.root)?, &self.owned);
        if !plan.adds() && !plan.removes() {
            return Ok(None);
        }
        match &args.restart_command {
            Some(command) => Ok(Some(Control::Command(command.clone()))),
            None if args.restart => Control::systemd(&self.root, running).map(Some),
            None => Ok(None),
        }
    }
}

fn init(args: &InitArgs) -> Result<()> {
    let root = Root::open(&args.common.dir)?;
    dockerd_config::check(&root, &args.common.config_file, None)?;
    daemon::stopped(&root)?;
    let mount = mount::serving(&args.mount)?;
    let lock = root.lock()?;
    let before = OwnedEntries::read(&root)?;
    let given = args.common.store.clone().or_else(|| mount::store(&mount));
    let given = given.or_else(|| before.as_ref().map(|owned| owned.store.clone()));
    let (path, store, identity) = open_store(&given.ok_or_else(|| Error::NoStore { path: mount.clone() })?)?;
    let mut owned = before.unwrap_or_else(|| OwnedEntries::new(mount.clone(), path.clone(), identity.clone()));
    (owned.mount, owned.store, owned.identity) = (mount, path, identity);
    let mut session = Session { root, store, owned, lock };
    let outcome = session.apply()?;
    report(&args.common, &session, &outcome);
    Ok(())
}

fn sync(args: &SyncArgs) -> Result<()> {
    let mut session = Session::open(&args.common, args.mount.as_deref())?;
    let outcome = match session.control(args)? {
        Some(control) => {
            control.stop(&session.root)?;
            let outcome = session.apply();
            // Unlocked before dockerd starts, because docker.service may run this command itself.
            let unlocked = session.lock.unlock().map_err(|e| Error::io("unlock", session.root.path(), e));
            control.start()?;
            unlocked.and(outcome)?
        }
        None => session.apply()?,
    };
    report(&args.common, &session, &outcome);
    Ok(())
}

fn status(args: &StatusArgs) -> Result<Health> {
    let root = Root::open(&args.common.dir)?;
    let owned = OwnedEntries::read(&root)?;
    let mut owned = owned.ok_or_else(|| Error::NotPrepared { path: root.path().into() })?;
    let (path, store, _) = open_store(args.common.store.as_deref().unwrap_or(&owned.store))?;
    owned.store = path;
    if let Some(mount) = &args.mount {
        owned.mount = mount::canonical(mount)?;
    }
    let running = daemon::running(&root)?;
    dockerd_config::check(&root, &args.common.config_file, running)?;
    let report = Report::new(&root, &DesiredState::read(&store)?, &owned, running)?;
    if args.common.json {
        print_json(&report)
    } else {
        print(&report.to_string())
    }
    Ok(report.health())
}

fn remove(args: &RemoveArgs) -> Result<()> {
    let root = Root::at(&args.dir)?;
    let _lock = root.lock()?;
    let owned = OwnedEntries::read_any(&root)?.ok_or_else(|| Error::NotPrepared { path: root.path().into() })?;
    daemon::stopped(&root)?;
    let removed = removal::remove(&root, &owned)?;
    if let Some(Err(error)) = mount::cache(&owned.mount).map(|cache| roots::unregister(&cache, root.path())) {
        say(&format!("{} still counts {} among its data-roots: {error}", owned.mount.display(), root.path().display()));
    }
    if args.json {
        print_json(&removed);
    } else {
        print(&format!(
            "{}: {}, {} and {} removed",
            root.path().display(),
            count(removed.images, "image"),
            count(removed.layers, "layer"),
            count(removed.names, "name")
        ));
    }
    Ok(())
}

fn print_json(value: &impl serde::Serialize) {
    // Maps with string keys and plain values only: serialisation cannot fail.
    print(&printable_json(&serde_json::to_string_pretty(value).unwrap_or_default()));
}

/// Prints a line. It is no error if nobody reads it any more.
fn print(line: &str) {
    let _ = writeln!(std::io::stdout(), "{}", printable_lines(line));
}

/// Prints on stderr what needs attention.
fn say(message: &str) {
    report::warn("cachefs", Form::of(std::env::args_os()), message);
}

/// `1 image`, `2 images`.
fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// Prints what was done; what needs attention goes to standard error.
fn report(common: &CommonArgs, session: &Session, outcome: &Outcome) {
    for skipped in &outcome.skipped {
        say(&format!("{} is left out: {}", printable(&skipped.image.to_string()), printable(&skipped.why.to_string())));
    }
    for name in &outcome.names_kept {
        say(&format!(
            "{name} names a local image and stays as it is: run docker rmi {name} and sync again to have the store's"
        ));
    }
    if mount::state(&session.owned.mount) != mount::State::Serving {
        say(&format!(
            "{} is not served: run cachefs mount, else containers cannot start",
            session.owned.mount.display()
        ));
    }
    if common.json {
        return print_json(outcome);
    }
    let dir = session.root.path().display();
    let added = [outcome.images_added, outcome.layers_added, outcome.names_set.len()];
    let removed = [outcome.images_removed, outcome.layers_removed, outcome.names_removed.len()];
    for ([images, layers, names], done) in [(added, "added"), (removed, "removed")] {
        if images + layers + names > 0 {
            let (images, layers, names) = (count(images, "image"), count(layers, "layer"), count(names, "name"));
            print(&format!("{dir}: {images}, {layers} and {names} {done}"));
        }
    }
    if outcome.layers_repaired > 0 {
        print(&format!("{dir}: {} repaired", count(outcome.layers_repaired, "layer")));
    }
    if outcome.restart_needed {
        let waiting = &outcome.waiting;
        let (images, layers) = (count(waiting.images, "image"), count(waiting.layers, "layer"));
        let names = count(waiting.names, "name");
        print(&format!("{dir}: {images}, {layers} and {names} wait until dockerd is stopped: add --restart"));
    } else if [added, removed].as_flattened().iter().sum::<usize>() + outcome.layers_repaired == 0 {
        print(&format!("{dir}: nothing to change"));
    }
}
