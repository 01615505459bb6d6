//! Odd registries, each pulled from by this project, by skopeo and, for many, by dockerd. The outcome is the same, and
//! this project sends no credentials to a server to which the other does not send them, or the difference is listed
//! with its reason.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, ensure};
use tests::docker::Docker;
use tests::registry::{Authority, Behaviour, Exposure, Played, Tls, write_logins};

use clients::{Library, Outcome};
use listed::{Does, LISTED, Tool};

mod clients;
mod configs;
mod daemon;
mod draw;
mod listed;
mod platforms;

/// The seed makes the same combinations each time.
const SEED: u64 = 20_261_129;
/// The number of combinations, in addition to the single values.
const COMBINATIONS: usize = 250;
/// The number of clients that pull at the same time.
const THREADS: usize = 4;

/// The result of a client's pull from one registry.
struct Pulled {
    outcome: Outcome,
    exposures: BTreeSet<Exposure>,
    is_betrayed: bool,
    log: Vec<String>,
}

/// Plays a behaviour to a client.
fn play(
    behaviour: &Behaviour,
    number: usize,
    tls: &Tls,
    scratch: &Path,
    client: impl FnOnce(&Played, &Path) -> Result<Outcome>,
) -> Result<Pulled> {
    let played = Played::start(behaviour, number as u64, tls)?;
    let config = scratch.join("config.json");
    write_logins(&config, &[(played.address(), behaviour)])?;
    let outcome = client(&played, &config)?;
    Ok(Pulled { outcome, exposures: played.exposures(), is_betrayed: played.is_betrayed(), log: played.log() })
}

/// The difference between this project's pull and a tool's.
fn difference(ours: &Pulled, theirs: &Pulled) -> Option<(Does, String)> {
    match (&ours.outcome, &theirs.outcome) {
        (Outcome::Pulled, Outcome::Refused(why)) => Some((Does::Pull, format!("the tool says: {why}"))),
        (Outcome::Refused(why), Outcome::Pulled) => Some((Does::Refuse, format!("it says: {why}"))),
        (Outcome::Refused(_), Outcome::Refused(_)) => None,
        (Outcome::Pulled, Outcome::Pulled) => {
            let more: Vec<&Exposure> = ours.exposures.difference(&theirs.exposures).collect();
            (!more.is_empty()).then(|| (Does::Show, format!("shown besides: {more:?}")))
        }
    }
}

/// Checks that credentials were sent only to the registry itself and to its token service.
fn check_safety(behaviour: &Behaviour, ours: &Pulled) -> Result<()> {
    let to_storage = ours.exposures.iter().any(|exposure| exposure.server == "storage");
    ensure!(!to_storage, "{behaviour}: storage was shown who we are: {:#?}", ours.log);
    let to_others = ours.exposures.iter().any(|exposure| exposure.server == "tokens" && exposure.place != "token");
    ensure!(!to_others, "{behaviour}: {:#?}", ours.log);
    ensure!(!ours.is_betrayed, "{behaviour}: in the clear after TLS");
    Ok(())
}

/// The results of all comparisons.
#[derive(Default)]
struct Tally {
    agree: usize,
    /// How often each entry of the list was needed.
    listed: Vec<usize>,
    unlisted: Vec<String>,
}

impl Tally {
    fn new() -> Self {
        Self { listed: vec![0; LISTED.len()], ..Self::default() }
    }

    fn count(&mut self, tool: Tool, behaviour: &Behaviour, ours: &Pulled, theirs: &Pulled) {
        let Some((does, what)) = difference(ours, theirs) else {
            self.agree += 1;
            return;
        };
        match LISTED.iter().position(|listed| listed.covers(tool, does, behaviour)) {
            Some(at) => self.listed[at] += 1,
            None => self.unlisted.push(format!("{tool:?} {does:?} [{behaviour}] {what}")),
        }
    }

    fn say(&self, tool: Tool) {
        let listed: usize = self.listed.iter().sum();
        let all = self.agree + listed + self.unlisted.len();
        println!(
            "{tool:?}: {all} combinations, {} agree, {listed} listed, {} not listed",
            self.agree,
            self.unlisted.len()
        );
        for (entry, count) in LISTED.iter().zip(&self.listed).filter(|(_, count)| **count > 0) {
            println!("  {count:4} {:?}: {}", entry.does, entry.why);
        }
        for difference in &self.unlisted {
            println!("  {difference}");
        }
    }
}

/// Calls `each` with every item and its number, on several threads.
fn for_each<T: Sync>(all: &[T], each: impl Fn(usize, &T) -> Result<()> + Sync) -> Result<()> {
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        while let Some((number, one)) = Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|n| Some((n, all.get(n)?)))
        {
            each(number, one)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked"))))
    })
}

/// What all clients share.
struct Stage {
    directory: tempfile::TempDir,
    tls: Tls,
    library: Library,
}

impl Stage {
    fn new() -> Result<Stage> {
        let directory = tempfile::tempdir()?;
        let authority = Authority::new()?;
        let (certificate, key) = authority.issue(directory.path(), "registry")?;
        let pem = directory.path().join("authority.pem");
        std::fs::write(&pem, authority.pem())?;
        let library = Library::new(directory.path(), &pem)?;
        Ok(Stage { directory, tls: Tls { certificate, key }, library })
    }

    /// Pulls with this project's library and checks that credentials were sent only where they may be.
    fn ours(&self, number: usize, behaviour: &Behaviour) -> Result<Pulled> {
        let scratch = tempfile::tempdir_in(self.directory.path())?;
        let ours = play(behaviour, number, &self.tls, scratch.path(), |played, config| {
            self.library.pull(&played.reference(), config)
        })?;
        check_safety(behaviour, &ours)?;
        Ok(ours)
    }
}

#[test]
fn pulls_end_as_skopeos_do_and_show_no_more() -> Result<()> {
    let stage = Stage::new()?;
    let behaviours = [draw::singles(), draw::combinations(SEED, COMBINATIONS)].concat();
    let tally = Mutex::new(Tally::new());
    for_each(&behaviours, |number, behaviour| {
        let ours = stage.ours(number, behaviour)?;
        let scratch = tempfile::tempdir_in(stage.directory.path())?;
        let theirs = play(behaviour, number, &stage.tls, scratch.path(), |played, config| {
            clients::skopeo(&played.reference(), config, scratch.path())
        })?;
        tally.lock().expect("no thread panicked").count(Tool::Skopeo, behaviour, &ours, &theirs);
        Ok(())
    })?;
    let tally = tally.into_inner().expect("no thread panicked");
    tally.say(Tool::Skopeo);
    ensure!(tally.unlisted.is_empty(), "{} differences are not listed", tally.unlisted.len());
    Ok(())
}

#[test]
fn the_coordinator_pulls_what_its_library_pulls() -> Result<()> {
    let stage = Stage::new()?;
    daemon::compare(&stage)
}

/// Whether dockerd waits for many seconds before it continues.
fn is_slow_for_docker(behaviour: &Behaviour) -> bool {
    behaviour.get("fault").starts_with("blob")
        || behaviour.is("framing", "cut")
        || behaviour.get("token").starts_with("503")
}

#[test]
fn pulls_end_as_dockers_do_and_show_no_more() -> Result<()> {
    let stage = Stage::new()?;
    let drawn = draw::combinations(SEED, COMBINATIONS).into_iter().step_by(4);
    let behaviours: Vec<Behaviour> =
        draw::singles().into_iter().chain(drawn).filter(|behaviour| !is_slow_for_docker(behaviour)).collect();
    let docker = Docker::start()?;
    let mut tally = Tally::new();
    for (number, behaviour) in behaviours.iter().enumerate() {
        let ours = stage.ours(number, behaviour)?;
        let scratch = tempfile::tempdir_in(stage.directory.path())?;
        let theirs = play(behaviour, number, &stage.tls, scratch.path(), |played, config| {
            clients::docker(&docker, &played.addresses(), &played.reference(), config)
        })?;
        tally.count(Tool::Docker, behaviour, &ours, &theirs);
    }
    tally.say(Tool::Docker);
    ensure!(tally.unlisted.is_empty(), "{} differences are not listed", tally.unlisted.len());
    Ok(())
}
