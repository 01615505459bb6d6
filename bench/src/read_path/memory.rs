//! The daemon's memory with a million inodes walked, and with 15,000 files open at once.

use std::fs::{self, File};
use std::io::Read;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;
use tests::cluster::{Mount, MountSpec};
use tests::images::ImageFiles;
use tests::mounts::Overlay;
use tests::process::run;
use tests::site::Site;

use super::inputs::path_in_million;
use super::mode::Mode;
use crate::process;
use crate::report::{Bar, Bound, Report};

/// The name of this measurement in `--only`.
pub(super) const NAME: &str = "memory";
/// The daemon's resident memory, MiB.
const TARGET: Bound = Bound::AtMost(100.0);
/// Files held open at once.
const OPEN_FILES: usize = 15_000;

/// Raises this process's limit on open files to the maximum while the value lives.
struct Descriptors {
    before: u64,
    most: u64,
}

impl Descriptors {
    fn raise() -> Result<Descriptors> {
        let (before, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, most, most).context("cannot allow more open files")?;
        Ok(Descriptors { before, most })
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, self.before, self.most) {
            eprintln!("cannot lower the limit of open files again: {error}");
        }
    }
}

/// Measures a daemon of this mode on `million`, an image of a million inodes, and adds the results to the report.
pub(super) fn measure(report: &mut Report, site: &Site, mode: &Mode, million: &ImageFiles) -> Result<()> {
    let name = &mode.name;
    let directory = site.path().join(format!("memory-{name}"));
    fs::create_dir(&directory)?;
    let mut spec = MountSpec::new(&directory, &site.store());
    spec.arguments = mode.arguments.clone();
    spec.program = mode.program.clone();
    let mut mount = Mount::start(spec)?;
    let chain = million.chain_ids().pop().context("the image has no layer")?;
    let overlay = Overlay::mount(&[mount.tree(&chain)])?;
    let mut find = std::process::Command::new("find");
    let inodes = run(find.arg(overlay.root()).args(["-printf", "."]))?.ok()?.len();
    tell(report, &format!("{inodes} inodes walked"), name, process::memory_of_mount(&mut mount)?);

    let descriptors = Descriptors::raise()?;
    let paths = (0..OPEN_FILES).map(|number| overlay.root().join(path_in_million(number)));
    let mut content = Vec::new();
    for path in paths.clone() {
        // The first read fills the local cache, because cached files may be opened in another way.
        content.clear();
        File::open(&path)?.read_to_end(&mut content)?;
    }
    let mut open = Vec::with_capacity(OPEN_FILES);
    for path in paths {
        let mut file = File::open(&path).with_context(|| format!("with {} files open", open.len()))?;
        file.read_exact(&mut content[..1])?;
        open.push(file);
    }
    tell(report, &format!("and {OPEN_FILES} files open"), name, process::memory_of_mount(&mut mount)?);
    drop((open, descriptors));
    Ok(())
}

fn tell(report: &mut Report, what: &str, mode: &str, memory: process::Memory) {
    report.row(vec![
        NAME.to_owned(),
        what.to_owned(),
        mode.to_owned(),
        format!("{:.1} MiB resident, {:.1} MiB its own", memory.resident, memory.anonymous),
        "-".to_owned(),
        "-".to_owned(),
    ]);
    report.target(format!("daemon, {what}, {mode}: MiB resident"), memory.resident, TARGET);
    report.bar(Bar::new("daemon, MiB resident", format!("{what}, {mode}"), memory.resident).bound(TARGET));
    let samples =
        json!({ "resident_mib": memory.resident, "anonymous_mib": memory.anonymous, "peak_mib": memory.peak });
    report.add_samples(&format!("{NAME}, {what}, {mode}"), samples);
}
