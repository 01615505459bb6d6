//! The coordinator keeps its promises: what it acknowledged holds after removals, on a full disk, after damage, and
//! under concurrent requests.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;
use tests::cluster::{Coordinator, Ctl, Mount, MountSpec};
use tests::hosts;
use tests::images::{hex, small};
use tests::process::{Process, TIMEOUT, run, wait_until};
use tests::registry::Registry;
use tests::site::{Site, SiteSpec, coordinator_spec, run_to_end};

/// How long work on small images may take on a loaded machine.
const LONG: Duration = Duration::from_secs(120);
/// A setting of the coordinators.
const LEASE: &str = "host_lease = '1s'\n";

/// Checks that a new host with an empty cache can list the image's first layer.
fn fresh_host_reads(site: &Site, name: &str, layer: &str) -> Result<()> {
    let host = Mount::start(MountSpec::new(&site.path().join(name), &site.store()))?;
    let entries = fs::read_dir(host.layer(layer)).context("the layer cannot be listed")?;
    ensure!(entries.count() > 0, "the layer is empty");
    Ok(())
}

/// A site whose hosts are known soon, so that collections are not postponed.
fn site() -> Result<Site> {
    Site::start_with(&SiteSpec { settings: LEASE.to_owned(), ..SiteSpec::default() })
}

/// Runs one complete collection without grace.
fn collect(ctl: &Ctl) -> Result<()> {
    wait_until("a collection", LONG, || Ok(ctl.run(&["gc", "--grace", "0s"])?.succeeded()))
}

fn newest_generation(site: &Site) -> Result<PathBuf> {
    let mut files = site.files("catalogue")?;
    files.retain(|path| path.file_name().is_some_and(|name| name.len() == 16));
    files.pop().context("there is no generation")
}

#[test]
fn a_pinned_digest_survives_the_removal_of_its_tag() {
    let (registry, site, image) = (Registry::start().unwrap(), site().unwrap(), small().unwrap());
    let reference = registry.push(&image, "small", "3").unwrap();
    let ctl = site.ctl();
    ctl.ok(&["pull", &reference]).unwrap();
    let manifest = ctl.json(&["image", &reference]).unwrap()["manifest"].as_str().unwrap().to_owned();
    let repository = reference.strip_suffix(":3").unwrap();
    let by_digest = format!("{repository}@{manifest}");
    ctl.ok(&["pin", &by_digest]).unwrap();
    let pinned = |name: &str| {
        let list = ctl.json(&["images"]).unwrap();
        let images = list["images"].as_array().unwrap().clone();
        images.iter().any(|image| image["name"] == name && image["pinned"] == true)
    };
    assert!(pinned(&reference), "what is held is shown as pinned under the name that it has");
    let refused = ctl.run(&["remove", &by_digest]).unwrap();
    assert!(refused.code == 1 && refused.stderr.contains("is pinned"), "{refused:?}");
    ctl.ok(&["remove", &reference]).unwrap();
    collect(&ctl).unwrap();
    assert!(pinned(&by_digest));
    for layer in &image.layers {
        assert!(site.has_layer(&layer.diff_id).unwrap());
    }
    ctl.ok(&["wait", &by_digest, "--timeout", "10s"]).unwrap();
    fresh_host_reads(&site, "host", &image.layers[0].diff_id).unwrap();
    ctl.ok(&["unpin", &by_digest]).unwrap();
    ctl.ok(&["remove", &by_digest]).unwrap();
    collect(&ctl).unwrap();
    assert_eq!(site.layers().unwrap(), Vec::<String>::new());
}

/// A settings document with its own schedules, pins, limits and retention.
fn document(number: usize) -> String {
    let mut text = format!(
        "pull_on_demand: {}\nlimits: {{parallel_layers: {}}}\nschedules:\n",
        number.is_multiple_of(2),
        number + 1
    );
    for schedule in 0..4 {
        text +=
            &format!("  - {{name: s{number}-{schedule}, images: ['r.io/app:{number}'], cron: '0 {number} * * *'}}\n");
    }
    text += &format!("  - {{name: common, images: ['r.io/app:{number}'], every: {}h}}\n", number + 1);
    text + &format!(
        "pins: ['r.io/a:{number}', 'r.io/b:{number}']\nretention: {{rules: [{{pattern: 'r.io/{number}', keep_last: {}}}]}}\n",
        number + 1
    )
}

#[test]
fn of_many_documents_at_once_one_holds() {
    const WRITERS: usize = 6;
    let mut site = Site::start().unwrap();
    let ctl = site.ctl();
    let path = |number: usize| site.path().join(format!("{number}.yaml")).display().to_string();
    let shown = |ctl: &Ctl| ctl.ok(&["apply", "--show"]).unwrap();
    // Applies each document alone, to learn how it is shown.
    let alone: Vec<String> = (0..WRITERS)
        .map(|number| {
            fs::write(path(number), document(number)).unwrap();
            ctl.ok(&["apply", &path(number)]).unwrap();
            shown(&ctl)
        })
        .collect();
    assert!(alone.iter().enumerate().all(|(number, one)| !alone[..number].contains(one)));
    for round in 0..6 {
        let mut all: Vec<Process> = (0..WRITERS)
            .map(|number| site.begin(&format!("apply-{round}-{number}"), &["apply", &path(number)]).unwrap())
            .collect();
        for apply in &mut all {
            assert!(apply.wait(LONG).unwrap().success(), "{}", apply.log());
        }
        let now = shown(&ctl);
        assert!(alone.contains(&now), "round {round}: no document holds, but\n{now}");
    }
    let before = shown(&ctl);
    site.coordinator().restart().unwrap();
    assert_eq!(shown(&site.ctl()), before, "what was held in memory is what was written down");
}

#[test]
fn single_changes_come_before_a_document_or_after() {
    let site = Site::start().unwrap();
    let ctl = site.ctl();
    let path = site.path().join("one.yaml").display().to_string();
    let schedules = |paused: bool| {
        let one = |number| format!("  - {{name: s{number}, images: ['r.io/app:1'], every: 1h, paused: {paused}}}\n");
        format!("schedules:\n{}", (0..8).map(one).collect::<String>())
    };
    fs::write(&path, schedules(true)).unwrap();
    ctl.ok(&["apply", &path]).unwrap();
    fs::write(&path, schedules(false)).unwrap();
    let mut applying = site.begin("apply", &["apply", &path]).unwrap();
    let mut adding = site.begin("add", &["schedule", "add", "s3", "--image", "r.io/x:1", "--every", "2h"]).unwrap();
    let mut pausing = site.begin("pause", &["schedule", "pause", "s5"]).unwrap();
    assert!(applying.wait(LONG).unwrap().success());
    assert!(!adding.wait(LONG).unwrap().success(), "the name is taken before and after");
    assert!(pausing.wait(LONG).unwrap().success());
    let list = ctl.json(&["schedule", "list"]).unwrap();
    let paused = |name: &str| {
        let found =
            list["schedules"].as_array().unwrap().iter().find(|one| one["spec"]["name"] == name || one["name"] == name);
        let found = found.unwrap_or_else(|| panic!("no {name} in {list}"));
        found["spec"]["paused"] == true || found["paused"] == true
    };
    for other in ["s0", "s3", "s7"] {
        assert!(!paused(other), "{other}: {list}");
    }
}

#[test]
fn with_a_generation_missing_what_is_published_can_be_mounted() {
    let (registry, mut site, image) = (Registry::start().unwrap(), Site::start().unwrap(), small().unwrap());
    let first = registry.push(&image, "first", "1").unwrap();
    let second = registry.push(&image, "second", "1").unwrap();
    site.ctl().ok(&["pull", &first]).unwrap();
    fs::remove_file(newest_generation(&site).unwrap()).unwrap();
    site.ctl().ok(&["pull", &second]).unwrap();
    fresh_host_reads(&site, "host", &image.layers[0].diff_id).unwrap();
    site.coordinator().restart().unwrap();
    assert_eq!(site.images().unwrap(), [first, second.clone()]);
    // Lost while nobody leads: the error names a way out, which works.
    site.ctl().ok(&["remove", &second]).unwrap();
    site.coordinator().kill9().unwrap();
    let mut files = site.files("catalogue").unwrap();
    files.pop();
    fs::remove_file(files.pop().unwrap()).unwrap();
    let command = site.coordinator().spec().command();
    let ended = run_to_end("coordinator", &mut command.unwrap(), TIMEOUT).unwrap();
    assert!(ended.code == 1 && ended.stderr.contains("--salvage-catalogue"), "{}", ended.stderr);
    let mut spec = site.coordinator().spec().clone();
    spec.arguments.push("--salvage-catalogue".to_owned());
    let coordinator = Coordinator::start(spec).unwrap();
    coordinator.ctl().ok(&["fsck", "--rebuild", "--repair"]).unwrap();
    coordinator.ctl().ok(&["pull", &registry.reference("first", "1")]).unwrap();
    fresh_host_reads(&site, "late", &image.layers[0].diff_id).unwrap();
}

#[test]
fn a_superblock_that_is_damaged_while_nobody_leads_comes_back() {
    let (registry, mut site, image) = (Registry::start().unwrap(), Site::start().unwrap(), small().unwrap());
    let reference = registry.push(&image, "small", "1").unwrap();
    site.ctl().ok(&["pull", &reference]).unwrap();
    let (path, copy) = (site.store().join("cachefs-store"), site.store().join("cachefs-store.copy"));
    let good = fs::read(&path).unwrap();
    assert_eq!(fs::read(&copy).unwrap(), good);
    site.coordinator().stop().unwrap();
    for damage in [None, Some(&b""[..]), Some(b"CACHEFS\0 no more")] {
        match damage {
            Some(bytes) => fs::write(&path, bytes).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let name = format!("host-{}", damage.map_or(9, <[u8]>::len));
        fresh_host_reads(&site, &name, &image.layers[0].diff_id).unwrap();
        site.coordinator().restart().unwrap();
        assert_eq!(fs::read(&path).unwrap(), good);
        site.coordinator().stop().unwrap();
    }
    // If both are damaged, the error names a way out, and the identity is restored from the coordinator's own database.
    fs::remove_file(&path).unwrap();
    fs::write(&copy, b"rubbish").unwrap();
    let mut spec = site.coordinator().spec().clone();
    let ended = run_to_end("coordinator", &mut spec.command().unwrap(), TIMEOUT).unwrap();
    assert!(ended.code == 1 && ended.stderr.contains("--salvage-superblock"), "{}", ended.stderr);
    spec.arguments.push("--salvage-superblock".to_owned());
    let coordinator = Coordinator::start(spec).unwrap();
    assert_eq!((fs::read(&path).unwrap(), fs::read(&copy).unwrap()), (good.clone(), good));
    coordinator.ctl().ok(&["fsck", "--deep"]).unwrap();
}

#[test]
fn a_damaged_handover_log_is_found_written_anew_and_its_loss_is_said() {
    let mut site = Site::start().unwrap();
    let ctl = site.ctl();
    ctl.ok(&["schedule", "add", "nightly", "--image", "r.io/app:1", "--cron", "0 3 * * *"]).unwrap();
    ctl.ok(&["token", "create", "ci", "--role", "viewer"]).unwrap();
    let log = site.files("ledger").unwrap().pop().unwrap();
    assert_eq!(log.metadata().unwrap().mode() & 0o777, 0o600);
    let good = fs::read(&log).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    fs::write(&log, &bad).unwrap();
    let check = ctl.run(&["fsck"]).unwrap();
    // A leader that checks its store may have repaired the log already.
    let healed = ctl.ok(&["events"]).unwrap().contains("no other coordinator could have gone on");
    assert!(healed || (check.code == 1 && check.stdout.contains("handover log")), "{check:?}");
    ctl.ok(&["fsck", "--repair"]).unwrap();
    ctl.ok(&["fsck"]).unwrap();
    // With the log, a coordinator whose database is lost knows everything.
    let lose_database = |site: &mut Site| {
        site.coordinator().kill9().unwrap();
        fs::remove_dir_all(site.path().join("state")).unwrap();
    };
    lose_database(&mut site);
    site.coordinator().restart().unwrap();
    assert!(site.ctl().ok(&["schedule", "list"]).unwrap().contains("nightly"));
    assert!(site.ctl().ok(&["token", "list"]).unwrap().contains("ci"));
    // Without the log, the coordinator reports the loss.
    lose_database(&mut site);
    let log = site.files("ledger").unwrap().pop().unwrap();
    fs::write(&log, b"CFSLEDGR").unwrap();
    site.coordinator().restart().unwrap();
    let events = site.ctl().ok(&["events"]).unwrap();
    assert!(events.contains("handover.lost") || events.contains("schedules, settings and tokens"), "{events}");
    assert!(site.files("quarantine").unwrap().iter().any(|path| path.ends_with(log.file_name().unwrap())));
}

/// A file system of a few megabytes.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(path: &Path, size: &str) -> Result<SmallDisk> {
        fs::create_dir(path)?;
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some(format!("size={size}").as_str()))?;
        Ok(SmallDisk(path.to_owned()))
    }

    /// Fills all remaining space with a file that does not belong to the store.
    fn fill(&self, name: &str) -> Result<()> {
        use std::io::Write;
        let mut file = fs::File::create(self.0.join(name))?;
        for len in [1 << 20, 1 << 12, 1] {
            while file.write_all(&vec![7; len]).is_ok() {}
        }
        Ok(())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_shared_disk_can_be_emptied_and_a_coordinator_started_on_it() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let reference = registry.push(&image, "small", "1").unwrap();
    let directory = tempfile::Builder::new().prefix("site-").tempdir().unwrap();
    let disk = SmallDisk::mount(&directory.path().join("store"), "64m").unwrap();
    let spec = SiteSpec { settings: LEASE.to_owned(), ..SiteSpec::default() };
    let mut coordinator = Coordinator::start(coordinator_spec(directory.path(), "state", &spec).unwrap()).unwrap();
    let ctl = coordinator.ctl();
    ctl.ok(&["pull", &reference]).unwrap();
    disk.fill("others-1").unwrap();
    coordinator.kill9().unwrap();
    coordinator.restart().unwrap();
    ctl.ok(&["remove", &reference]).unwrap();
    collect(&ctl).unwrap();
    let layers = run(Command::new("find").arg(directory.path().join("store/packs")).args(["-type", "f"])).unwrap();
    assert_eq!(layers.stdout, "", "the bytes are gone");
    fs::remove_file(directory.path().join("store/others-1")).unwrap();
    ctl.ok(&["pull", &reference]).unwrap();
    let reserve = directory.path().join("store/reserve");
    wait_until("room to be kept again", TIMEOUT, || Ok(reserve.exists())).unwrap();
    coordinator.stop().unwrap();
    drop(disk);
}

/// The same command, run with another umask.
fn under_umask(umask: &str, command: &Command) -> Command {
    let mut shell = Command::new("sh");
    shell
        .arg("-c")
        .arg(format!("umask {umask}; exec \"$0\" \"$@\""))
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell
}

/// The files below a directory that another user cannot read.
fn unreadable(path: &Path) -> Result<Vec<String>> {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "find"]).arg(path);
    command.args(["!", "-readable", "-printf", "%P\n"]);
    Ok(run(&mut command)?.stdout.lines().map(str::to_owned).collect())
}

#[test]
fn hosts_of_any_user_read_the_store_and_nobody_reads_the_state_whatever_the_umask() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let reference = registry.push(&image, "small", "1").unwrap();
    for umask in ["077", "022", "000"] {
        let directory = tempfile::Builder::new().prefix("site-").tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let spec = SiteSpec {
            settings: "blob_cache = '64M'".to_owned(),
            arguments: vec!["--create".to_owned()],
            ..SiteSpec::default()
        };
        let spec = coordinator_spec(directory.path(), "state", &spec).unwrap();
        let log = directory.path().join("log");
        let mut process =
            Process::spawn("coordinator", &mut under_umask(umask, &spec.command().unwrap()), &log).unwrap();
        process.wait_ready(TIMEOUT, || Ok(std::os::unix::net::UnixStream::connect(spec.socket()).is_ok())).unwrap();
        let ctl = Ctl { server: format!("unix:{}", spec.socket().display()), environment: Vec::new() };
        ctl.ok(&["pull", &reference]).unwrap();
        ctl.ok(&["fsck", "--deep"]).unwrap();
        let mut closed = unreadable(&directory.path().join("store")).unwrap();
        closed.sort();
        let private = |path: &String| {
            ["ledger", "reserve", "staging", "quarantine", "trash"].iter().any(|name| path.starts_with(name))
        };
        assert!(closed.iter().all(private), "umask {umask}: {closed:?}");
        assert!(closed.contains(&"ledger".to_owned()), "umask {umask}: {closed:?}");
        assert_eq!(
            unreadable(&directory.path().join("state")).unwrap(),
            [""],
            "umask {umask}: the directory itself is closed"
        );
        for file in walk(&directory.path().join("state")).unwrap() {
            assert_eq!(file.metadata().unwrap().mode() & 0o077, 0, "umask {umask}: {}", file.display());
        }
        process.terminate(TIMEOUT).unwrap();
        // The coordinator corrects modes that an older coordinator had made too strict.
        let index = walk(&directory.path().join("store/layers")).unwrap().pop().unwrap();
        for path in [&index, index.parent().unwrap(), index.parent().unwrap().parent().unwrap()] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
        }
        let mut again = Process::spawn("coordinator", &mut under_umask(umask, &spec.command().unwrap()), &log).unwrap();
        again.wait_ready(TIMEOUT, || Ok(std::os::unix::net::UnixStream::connect(spec.socket()).is_ok())).unwrap();
        assert!(!unreadable(&directory.path().join("store")).unwrap().iter().any(|path| path.starts_with("layers")));
        again.terminate(TIMEOUT).unwrap();
    }
}

fn walk(path: &Path) -> Result<Vec<PathBuf>> {
    let (mut files, mut directories) = (Vec::new(), vec![path.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory)?.flatten() {
            if entry.path().is_dir() { directories.push(entry.path()) } else { files.push(entry.path()) }
        }
    }
    files.sort();
    Ok(files)
}

#[test]
fn a_state_directory_that_others_could_have_written_to_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let spec = coordinator_spec(directory.path(), "state", &SiteSpec::default()).unwrap();
    fs::create_dir(directory.path().join("store")).unwrap();
    let state = directory.path().join("state");
    fs::create_dir(&state).unwrap();
    fs::set_permissions(&state, fs::Permissions::from_mode(0o777)).unwrap();
    let ended = run_to_end("coordinator", &mut spec.command().unwrap(), TIMEOUT).unwrap();
    assert!(ended.code == 1 && ended.stderr.contains("others may write to directory"), "{}", ended.stderr);
    fs::set_permissions(&state, fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::chown(&state, Some(65534), None).unwrap();
    let ended = run_to_end("coordinator", &mut spec.command().unwrap(), TIMEOUT).unwrap();
    assert!(ended.code == 1 && ended.stderr.contains("belongs to user 65534"), "{}", ended.stderr);
}

#[test]
fn a_store_from_a_backup_goes_on_above_what_its_hosts_have_seen() {
    let (registry, mut site, image) = (Registry::start().unwrap(), Site::start().unwrap(), small().unwrap());
    let kept = registry.push(&image, "kept", "1").unwrap();
    site.ctl().ok(&["pull", &kept]).unwrap();
    let backup = site.path().join("backup");
    run(Command::new("cp").arg("-a").arg(site.store()).arg(&backup)).unwrap().ok().unwrap();
    for tag in ["1", "2", "3"] {
        let reference = registry.push(&image, "later", tag).unwrap();
        site.ctl().ok(&["pull", &reference]).unwrap();
    }
    let host = hosts::mount(&site, "backup").unwrap();
    let sees = |name: &str| host.path().join("images").join(kept.split('/').next().unwrap()).join(name).exists();
    wait_until("the host to see what came later", LONG, || Ok(sees("later/3"))).unwrap();
    // Replaces the store by the backup, below the same mount point.
    site.coordinator().stop().unwrap();
    let script = "find \"$0\" -mindepth 1 -delete; cp -a \"$1\"/. \"$0\"/";
    run(Command::new("sh").args(["-c", script]).arg(site.store()).arg(&backup)).unwrap().ok().unwrap();
    site.coordinator().restart().unwrap();
    assert!(site.ctl().ok(&["events"]).unwrap().contains("put back from a backup"));
    let after = registry.push(&image, "after", "1").unwrap();
    site.ctl().ok(&["pull", &after]).unwrap();
    wait_until("the host to follow", LONG, || Ok(sees("after/1") && !sees("later/3"))).unwrap();
    fs::read_dir(host.layer(hex(&image.layers[0].diff_id))).unwrap();
    let list: Value = site.ctl().json(&["images"]).unwrap();
    assert_eq!(list["images"].as_array().unwrap().len(), 2, "{list}");
}
