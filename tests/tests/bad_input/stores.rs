//! Stores that cannot be used: absent, foreign, newer, damaged, read-only, full.

use super::*;

/// Offsets of the feature sets and of the digest in the superblock (`store/FORMAT.md`).
const INCOMPATIBLE: usize = 28;
const READ_ONLY_COMPATIBLE: usize = 20;
const DIGEST: usize = 52;

/// A mount that is unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(path: &Path, arguments: &[&str]) -> Result<Self> {
        run(Command::new("mount").args(arguments).arg(path))?.ok()?;
        Ok(Self(path.to_owned()))
    }

    fn remount(&self, options: &str) -> Result<()> {
        run(Command::new("mount").arg("-o").arg(format!("remount,{options}")).arg(&self.0))?.ok().map(drop)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        mounts::detach_below(&self.0);
    }
}

/// Checks that the coordinator refuses to start.
fn check_coordinator(directory: &Path, words: &[&str]) -> Result<()> {
    let spec = coordinator_spec(directory, "state", &SiteSpec::default())?;
    refuse_coordinator(&spec, words)
}

fn refuse_coordinator(spec: &CoordinatorSpec, words: &[&str]) -> Result<()> {
    let output = run_to_end("cachefs-coordinator", &mut spec.command()?, Duration::from_secs(30))?;
    check_refusal(&output, "cachefs-coordinator", words)
}

/// Checks that the daemon refuses to start.
fn check_mount(directory: &Path, words: &[&str]) -> Result<()> {
    let spec = MountSpec::new(&directory.join("host"), &directory.join("store"));
    std::fs::create_dir_all(&spec.mountpoint)?;
    let output = run_to_end("cachefs", &mut spec.command()?, Duration::from_secs(30))?;
    check_refusal(&output, "cachefs", words)?;
    ensure!(mounts::at(&spec.mountpoint)?.is_none(), "something is mounted");
    Ok(())
}

/// A store with the small image, whose coordinator has stopped.
fn stopped_store() -> Result<Site> {
    let (registry, image, mut site) = (Registry::start()?, small()?, Site::start()?);
    let reference = registry.push(&image, "small", "1")?;
    site.ctl().ok(&["pull", &reference])?;
    site.coordinator().stop()?;
    Ok(site)
}

/// The superblock and its copy.
const SUPERBLOCKS: [&str; 2] = ["cachefs-store", "cachefs-store.copy"];

/// Changes the superblock and its copy and corrects their checksums.
fn change_superblock(store: &Path, change: impl Fn(&mut [u8])) -> Result<()> {
    for name in SUPERBLOCKS {
        let mut bytes = std::fs::read(store.join(name))?;
        change(&mut bytes);
        let digest = blake3::hash(&bytes[..DIGEST]);
        bytes[DIGEST..].copy_from_slice(digest.as_bytes());
        std::fs::write(store.join(name), bytes)?;
    }
    Ok(())
}

#[test]
fn what_is_no_store_is_refused_by_all() {
    let directory = tempfile::tempdir().unwrap();
    let (path, store) = (directory.path(), directory.path().join("store"));
    let name = store.to_str().unwrap();
    // If the directory is absent, the shared disk is most likely not mounted, so nothing is created there.
    check_coordinator(path, &[name, "no such directory"]).unwrap();
    check_mount(path, &[name, "no such directory"]).unwrap();
    assert!(!store.exists());

    std::fs::write(&store, "a file").unwrap();
    check_coordinator(path, &[name, "not a directory"]).unwrap();
    check_mount(path, &[name, "not a directory"]).unwrap();
    std::fs::remove_file(&store).unwrap();

    std::fs::create_dir(&store).unwrap();
    check_mount(path, &[name, "is not a cachefs store"]).unwrap();
    std::fs::write(store.join("holiday.jpg"), "precious").unwrap();
    check_coordinator(path, &[name, "is not a cachefs store"]).unwrap();
    check_mount(path, &[name, "is not a cachefs store"]).unwrap();
    std::fs::write(store.join("cachefs-store"), "something else").unwrap();
    check_coordinator(path, &[name, "is not a cachefs store"]).unwrap();
    check_mount(path, &[name, "is not a cachefs store"]).unwrap();
    assert_eq!(std::fs::read_dir(&store).unwrap().count(), 2, "nothing was added");
}

#[test]
fn a_newer_or_damaged_store_is_refused_for_what_it_is() {
    let site = stopped_store().unwrap();
    let (path, store) = (site.path(), site.store());
    let name = store.to_str().unwrap();
    let good = std::fs::read(store.join("cachefs-store")).unwrap();
    let restore = || SUPERBLOCKS.iter().for_each(|name| std::fs::write(store.join(name), &good).unwrap());

    change_superblock(&store, |bytes| bytes[INCOMPATIBLE + 1] |= 1).unwrap();
    let words = [name, "needs a newer cachefs", "incompatible features 0x100", "upgrade"];
    check_coordinator(path, &words).unwrap();
    check_mount(path, &words).unwrap();
    restore();

    change_superblock(&store, |bytes| bytes[8] = 2).unwrap();
    check_coordinator(path, &[name, "needs a newer cachefs", "version 2"]).unwrap();
    check_mount(path, &[name, "needs a newer cachefs", "version 2"]).unwrap();
    restore();

    let mut damaged = good.clone();
    damaged[40] ^= 1;
    // Both copies are damaged. One good copy would be enough; the tests in `damage` cover that.
    SUPERBLOCKS.iter().for_each(|name| std::fs::write(store.join(name), &damaged).unwrap());
    check_coordinator(path, &[name, "damaged"]).unwrap();
    check_mount(path, &[name, "damaged"]).unwrap();
    restore();

    // A feature that only writers must know does not keep readers out.
    change_superblock(&store, |bytes| bytes[READ_ONLY_COMPATIBLE] |= 4).unwrap();
    check_coordinator(path, &[name, "writing needs", "0x4"]).unwrap();
    let image = small().unwrap();
    let mount = Mount::start(MountSpec::new(&path.join("reader"), &store)).unwrap();
    assert!(mount.layer(&image.diff_ids()[0]).join("bin/busybox").exists());
}

#[test]
fn a_read_only_store_has_readers_but_no_coordinator() {
    let site = stopped_store().unwrap();
    let (path, store) = (site.path(), site.store());
    let before = std::fs::read_dir(store.join("catalogue")).unwrap().count();
    let bind = Mounted::new(&store, &["--bind", store.to_str().unwrap()]).unwrap();
    bind.remount("bind,ro").unwrap();
    check_coordinator(path, &[store.to_str().unwrap(), "read-write"]).unwrap();
    let image = small().unwrap();
    let mount = Mount::start(MountSpec::new(&path.join("reader"), &store)).unwrap();
    let greeting = mount.layer(&image.diff_ids()[2]).join("data/greeting");
    assert_eq!(std::fs::read_to_string(greeting).unwrap(), "hello again\n");
    drop(mount);
    drop(bind);
    assert_eq!(std::fs::read_dir(store.join("catalogue")).unwrap().count(), before);
}

#[test]
fn a_full_disk_fails_the_job_and_a_retry_after_space_returned_succeeds() {
    let directory = tempfile::tempdir().unwrap();
    let store = directory.path().join("store");
    std::fs::create_dir(&store).unwrap();
    // Declared first, so that it is unmounted last.
    let disk = Mounted::new(&store, &["-t", "tmpfs", "-o", "size=4m", "tmpfs"]).unwrap();
    let site = Site::start_in(directory, &impatient()).unwrap();
    let (registry, pool) = (Registry::start().unwrap(), tempfile::tempdir().unwrap());
    let pools = Pools::open(pool.path()).unwrap();
    let mut tar = Archive::new(Vec::new());
    tar.add(&Header::new(Kind::File, "noise"), oddities::noise(5, 12 << 20)).unwrap();
    let layer = pools.layer(&tar.finish().unwrap(), Compression::Zstd).unwrap();
    let image = ImageBuilder::new("large").layer(layer).build(&pools, &pool.path().join("large")).unwrap();
    let reference = registry.push(&image, "large", "1").unwrap();
    check_pull(&site, &reference, &["is full", "free space", store.to_str().unwrap()]).unwrap();
    let little = registry.push(&small().unwrap(), "small", "1").unwrap();
    site.ctl().ok(&["pull", &little]).unwrap();

    disk.remount("size=64m").unwrap();
    let id = site.job(&reference).unwrap()["id"].to_string();
    site.ctl().ok(&["retry", &id]).unwrap();
    site.ctl().ok(&["wait", &reference, "--timeout", "60s"]).unwrap();
    assert!(site.has_layer(&image.diff_ids()[0]).unwrap());
    assert_eq!(site.job(&little).unwrap()["state"], Value::from("published"));
    drop(site);
}

#[test]
fn a_coordinators_own_settings_are_checked() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    std::fs::create_dir(path.join("store")).unwrap();
    let with = |settings: &str| SiteSpec { settings: settings.to_owned(), ..SiteSpec::default() };
    let refuse = |spec: &SiteSpec, words: &[&str]| {
        refuse_coordinator(&coordinator_spec(path, "state", spec).unwrap(), words).unwrap();
    };
    refuse(&with("paralel_layers = 4\n"), &["state.toml", "line 3", "paralel_layers"]);
    refuse(&with("parallel_layers = 0\n"), &["parallel_layers", "at least 1"]);
    refuse(&SiteSpec { authorities: vec!["no certificate".to_owned()], ..with("") }, &["state-authority-0.pem"]);
    refuse(&SiteSpec { listen: Some("0.0.0.0:7411".to_owned()), ..with("") }, &["0.0.0.0:7411", "loopback"]);

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    refuse(&SiteSpec { listen: Some(address.clone()), ..with("") }, &[&address]);

    let mut spec = coordinator_spec(path, "state", &with("")).unwrap();
    spec.state = path.join("occupied");
    std::fs::write(&spec.state, "a file").unwrap();
    refuse_coordinator(&spec, &[spec.state.to_str().unwrap()]).unwrap();
    let usage = run(Command::new(binary("cachefs-coordinator").unwrap()).arg("serve")).unwrap();
    assert!(usage.code != 0 && usage.stderr.contains("--store is missing"), "{}", usage.stderr);
}
