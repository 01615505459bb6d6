//! Public reports of faults in other systems, tried here. `tests/CASES.md` lists them with the correct behaviour and its source.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use tests::cluster::Mount;
use tests::hosts;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{Compression, ImageBuilder, ImageFiles, Pools};
use tests::mounts;
use tests::process::{TIMEOUT, run, wait_until};
use tests::registry::Registry;
use tests::secured::Secured;
use tests::site::{Site, SiteSpec, coordinator_spec, run_to_end};

/// An image of one file, whose config has this additional field.
fn image_with(directory: &std::path::Path, field: &'static str, value: serde_json::Value) -> Result<ImageFiles> {
    let pools = Pools::open(directory)?;
    let mut tar = Archive::new(Vec::new());
    tar.add(&Header::new(Kind::File, "file"), "content")?;
    let builder = ImageBuilder::new("image").layer(pools.layer(&tar.finish()?, Compression::Gzip)?);
    builder.setting(field, value).build(&pools, &directory.join("image"))
}

/// A file mounted over another; unmounted when dropped.
struct Bound(std::path::PathBuf);

impl Bound {
    fn new(from: &std::path::Path, over: &std::path::Path) -> Result<Bound> {
        run(std::process::Command::new("mount").arg("--bind").args([from, over]))?.ok()?;
        Ok(Bound(over.to_owned()))
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        mounts::detach_below(&self.0);
    }
}

/// podman #26621, moby #44581: a pull for another platform replaced the image that everybody runs.
#[test]
fn a_hosts_token_neither_changes_a_tags_platform_nor_goes_before_everybody() {
    let secured = Secured::start(&SiteSpec::default()).unwrap();
    let token = secured.token("node", "host", &[]).unwrap();
    let ctl = secured.ctl(Some(&token));
    let refused = |arguments: &[&str], words: &str| {
        let output = ctl.run(arguments).unwrap();
        assert!(output.code == 1 && output.stderr.contains(words), "{}{}", output.stdout, output.stderr);
    };
    let image = "127.0.0.1:1/app:1";
    refused(&["pull", "--detach", "--platform", "linux/arm64", image], "an admin says which");
    refused(&["pull", "--detach", "--priority", "2147483647", image], "a host's priority is 100 at most");
    ctl.ok(&["pull", "--detach", "--priority", "100", image]).unwrap();
    secured.site.ctl().ok(&["pull", "--detach", "--platform", "linux/arm64", image]).unwrap();
}

/// ntpd-rs PR #665, linyaps #1874: the path given for a socket was that of a user's file, and the file was removed.
#[test]
fn a_file_where_the_socket_should_be_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("store")).unwrap();
    let spec = coordinator_spec(directory.path(), "state", &SiteSpec::default()).unwrap();
    let socket = spec.socket();
    std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
    std::fs::write(&socket, "precious").unwrap();
    let output = run_to_end("cachefs-coordinator", &mut spec.command().unwrap(), Duration::from_secs(30)).unwrap();
    assert!(output.code == 1 && output.stderr.contains("is no socket; choose another --socket"), "{}", output.stderr);
    assert_eq!(std::fs::read_to_string(&socket).unwrap(), "precious");
}

/// velero #5578, docker-hadoop PR #70: a volume's own directories made an empty volume look used.
#[test]
fn a_volume_with_snapshots_and_lost_files_is_an_empty_one() {
    let directory = tempfile::tempdir().unwrap();
    for name in [".snapshot", "lost+found", ".glusterfs"] {
        std::fs::create_dir_all(directory.path().join("store").join(name)).unwrap();
    }
    let site = Site::start_in(directory, &SiteSpec::default()).unwrap();
    assert!(site.images().unwrap().is_empty());
    let check = site.ctl().run(&["fsck"]).unwrap();
    assert_eq!(check.code, 0, "{}{}", check.stdout, check.stderr);
}

/// CVE-2023-25153 and similar reports: a config of any size was accepted, and parsed for every reader.
#[test]
fn a_config_of_many_megabytes_is_refused_as_skopeo_refuses_it() {
    let (registry, site, directory) =
        (Registry::start().unwrap(), Site::start().unwrap(), tempfile::tempdir().unwrap());
    let zeros = json!(vec![0; 2_500_000]);
    let image = image_with(directory.path(), "x", zeros).unwrap();
    let reference = registry.push(&image, "large", "1").unwrap();
    let output = site.ctl().run(&["pull", &reference]).unwrap();
    assert!(output.code == 1 && output.stderr.contains("it is longer than 4194304 bytes"), "{}", output.stderr);
}

/// Unknown fields of a config are shown as the registry has them, neither interpreted nor rounded.
#[test]
fn an_images_config_is_shown_as_it_is() {
    let (registry, site, directory) =
        (Registry::start().unwrap(), Site::start().unwrap(), tempfile::tempdir().unwrap());
    let image = image_with(directory.path(), "unknown.field", json!({"n": 9_007_199_254_740_993_i64})).unwrap();
    let reference = registry.push(&image, "app", "1").unwrap();
    site.ctl().ok(&["pull", &reference]).unwrap();
    let shown = site.ctl().json(&["image", &reference]).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&image.blob(&image.config.digest).unwrap()).unwrap();
    assert_eq!(shown["config_document"], config);
}

/// restic #22057: clients that could only add content pushed other users' content out of the last ones that are kept.
#[test]
fn what_a_host_has_pulled_takes_no_place_among_the_last_that_are_kept() {
    let (registry, directory) = (Registry::start().unwrap(), tempfile::tempdir().unwrap());
    let secured =
        Secured::start(&SiteSpec { settings: "host_lease = '1s'\n".to_owned(), ..SiteSpec::default() }).unwrap();
    let (admin, token) = (secured.site.ctl(), secured.token("node", "host", &[]).unwrap());
    let host = secured.ctl(Some(&token));
    let image = image_with(directory.path(), "author", json!("somebody")).unwrap();
    let tags: Vec<String> = (1..=6).map(|n| registry.push(&image, "app", &n.to_string()).unwrap()).collect();
    for good in &tags[3..] {
        admin.ok(&["pull", good]).unwrap();
    }
    // Old tags, and one that an admin pulled before. The host's pull must not make the latter newer.
    for pulled in [&tags[0], &tags[1], &tags[2], &tags[3]] {
        host.ok(&["pull", pulled]).unwrap();
    }
    let settings = secured.site.path().join("settings.yaml");
    std::fs::write(&settings, "retention: {rules: [{pattern: '**', keep_last: 2}]}\n").unwrap();
    admin.ok(&["apply", &settings.to_string_lossy()]).unwrap();
    wait_until("a collection", TIMEOUT, || Ok(admin.run(&["gc", "--grace", "0s"])?.succeeded())).unwrap();
    let left = admin.json(&["images"]).unwrap();
    let is_left = |tag: &String| left["images"].as_array().unwrap().iter().any(|image| image["name"] == **tag);
    let left: Vec<bool> = tags.iter().map(is_left).collect();
    assert_eq!(left, [false, true, true, false, true, true], "two of the host's, two of the admin's");
}

/// nydus-snapshotter PR #404: when memory ran out, the kernel first killed the process that all containers of a host read from.
#[test]
fn a_hosts_daemon_is_no_better_a_victim_than_others_when_memory_runs_out() {
    /// The bit of CAP_SYS_RESOURCE, which is required to go below 0.
    const MAY_LOWER: u64 = 1 << 24;
    let site = Site::start().unwrap();
    let mut spec = hosts::host(&site, "one").unwrap();
    spec.first = Some("echo 500 > /proc/self/oom_score_adj".to_owned());
    let mut mount = Mount::start(spec).unwrap();
    let score = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", mount.process().pid())).unwrap();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim();
    let may_lower = u64::from_str_radix(capabilities, 16).unwrap() & MAY_LOWER != 0;
    assert_eq!(score.trim(), if may_lower { "-999" } else { "0" });
}

/// s3fs-fuse #1587, moosefs #244: `updatedb` walked every mount at night. Mounts have the type that docs/OPERATIONS.md puts into PRUNEFS.
#[test]
fn mounts_have_the_type_by_which_updatedb_is_told_to_leave_them_alone() {
    let site = Site::start().unwrap();
    let mount = hosts::mount(&site, "one").unwrap();
    let kind = mounts::at(mount.path()).unwrap().unwrap().kind;
    let guide = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/OPERATIONS.md")).unwrap();
    assert!(guide.contains(&format!("PRUNEFS=\"{kind} ")), "{kind}");
}

/// harbor #12850: a file that an NFS client still has open cannot be unlinked, and made every later collection fail.
#[test]
fn what_cannot_be_unlinked_yet_stops_no_collection() {
    // Hosts are known soon, so that collections are not postponed.
    let spec = SiteSpec { settings: "host_lease = '1s'\n".to_owned(), ..SiteSpec::default() };
    let (registry, site, directory) =
        (Registry::start().unwrap(), Site::start_with(&spec).unwrap(), tempfile::tempdir().unwrap());
    let image = image_with(directory.path(), "x", json!(1)).unwrap();
    let reference = registry.push(&image, "app", "1").unwrap();
    site.ctl().ok(&["pull", &reference]).unwrap();
    // A mount point is as busy as an NFS file under the name `.nfs...`.
    let trash = std::fs::read_dir(site.store().join("trash")).unwrap().next().unwrap().unwrap().path();
    let busy = trash.join("busy");
    std::fs::write(&busy, "").unwrap();
    let other = directory.path().join("other");
    std::fs::write(&other, "").unwrap();
    let mounted = Bound::new(&other, &busy).unwrap();
    site.ctl().ok(&["remove", &reference]).unwrap();
    let collected = || Ok(site.ctl().run(&["gc", "--grace", "0s"])?.succeeded());
    wait_until("a collection", TIMEOUT, collected).unwrap();
    assert!(site.layers().unwrap().is_empty(), "the rest was collected");
    drop(mounted);
    site.ctl().ok(&["gc"]).unwrap();
    assert!(!busy.exists());
}
