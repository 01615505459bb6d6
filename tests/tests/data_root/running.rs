//! Containers: what they see, change and may do.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use tests::docker::Docker;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{Compression, ImageBuilder, ImageFiles, Pools, image};
use tests::process::run;
use tests::tree::snapshot;

use super::host::Host;

#[test]
fn images_of_the_store_are_listed_and_run_without_a_pull() {
    let host = Host::start(&["small", "bash"]).unwrap();
    assert_eq!(host.listed().unwrap(), ["bash:latest", "small:latest"]);
    let id = host.docker().ok(&["image", "inspect", "--format", "{{.Id}}", "bash"]).unwrap();
    assert_eq!(id, image("bash").unwrap().config.digest);
    assert_eq!(host.shell("small", "cat /data/greeting; ls /data").unwrap(), "hello again\ngreeting\nnoise");
    assert!(host.shell("bash", "bash --version").unwrap().starts_with("GNU bash"));
    // Nothing was copied: in place of layers the data-root has links.
    let directories = host.docker().extracted(&image("bash").unwrap()).unwrap();
    assert!(
        directories.iter().all(|diff| diff.is_symlink() && diff.canonicalize().unwrap().starts_with(host.mount.path()))
    );
}

/// The changes that each of several containers makes to the image's files, and what it sees afterwards.
const CHANGES: &str = "
set -e
echo $1 > /data/greeting
mv /data/noise /data/moved-$1
rm -rf /etc/passwd /tmp
mkdir /data/new && echo mine > /data/new/file
chmod 600 /etc/group && chown 7:8 /etc/group
mv /bin/wget /bin/wget-$1
ln /data/greeting /data/link
echo more >> /data/moved-$1
cat /data/greeting && ls /data && ls -d /bin/wget* && test ! -e /etc/passwd && wc -c < /data/moved-$1";

#[test]
fn containers_change_image_files_at_once_and_each_for_itself() {
    let host = Host::start(&["small"]).unwrap();
    let layers: Vec<_> = image("small").unwrap().diff_ids().iter().map(|id| host.mount.layer(id)).collect();
    let before: Vec<_> = layers.iter().map(|layer| snapshot(layer).unwrap()).collect();
    std::thread::scope(|scope| {
        let run = |n: String| {
            let host = &host;
            scope.spawn(move || {
                let arguments = ["run", "--rm", "--network", "none", "small", "sh", "-c", CHANGES, "sh", &n];
                (host.docker().ok(&arguments), n)
            })
        };
        let threads: Vec<_> = (1..=5).map(|n| run(n.to_string())).collect();
        for thread in threads {
            let (output, n) = thread.join().unwrap();
            let expected = format!("{n}\ngreeting\nlink\nmoved-{n}\nnew\n/bin/wget-{n}\n{}", (1 << 20) + 5);
            assert_eq!(output.unwrap(), expected);
        }
    });
    let after: Vec<_> = layers.iter().map(|layer| snapshot(layer).unwrap()).collect();
    assert!(before == after, "a container changed a layer");
    assert_eq!(host.shell("small", "cat /data/greeting").unwrap(), "hello again");
}

#[test]
fn changes_are_shown_by_diff_and_survive_a_stop() {
    let host = Host::start(&["small"]).unwrap();
    let docker = host.docker();
    let script = "rm /data/noise; echo x > /data/greeting; mkdir /data/d; test -e /ran && echo again; touch /ran";
    docker.ok(&["run", "--name", "one", "--network", "none", "small", "sh", "-c", script]).unwrap();
    let lines = docker.ok(&["diff", "one"]).unwrap();
    let lines: BTreeSet<_> = lines.lines().collect();
    for line in ["C /data", "D /data/noise", "C /data/greeting", "A /data/d", "A /ran"] {
        assert!(lines.contains(line), "{line} is not in {lines:?}");
    }
    let again = docker.run(&["start", "--attach", "one"]).unwrap();
    assert_eq!(again.stdout, "again\n");
    assert_eq!(docker.ok(&["cp", "one:/data/greeting", "-"]).unwrap().matches("x\n").count(), 1);
    docker.ok(&["rm", "one"]).unwrap();
}

#[test]
fn setuid_programs_of_an_image_run_as_their_owner() {
    let host = Host::start(&["bash"]).unwrap();
    let who = |program: &str| {
        host.docker().ok(&["run", "--rm", "--network", "none", "--user", "1234:1234", "bash", program, "-un"])
    };
    assert_eq!(who("/opt/tools/id").unwrap(), "root");
    assert_eq!(who("/usr/local/bin/who-am-i").unwrap(), "root");
    assert!(who("/usr/bin/id").is_err(), "user 1234 has no name");
    let forbidden =
        ["run", "--rm", "--security-opt", "no-new-privileges", "--user", "7", "bash", "/opt/tools/id", "-u"];
    assert_eq!(host.docker().ok(&forbidden).unwrap(), "7");
}

/// The capability `cap_dac_override=ep`, as the kernel stores it (revision 2).
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// An image with busybox, a device, a file for one user, and a file for all.
fn with_device(directory: &Path) -> Result<ImageFiles> {
    let mut tar = Archive::new(Vec::new());
    for path in ["bin/", "opt/", "dev/", "proc/", "sys/"] {
        tar.add(&Header::new(Kind::Directory, path), "")?;
    }
    tar.add(&Header::new(Kind::File, "bin/busybox").mode(0o755), std::fs::read("/bin/busybox")?)?;
    for command in ["cat", "find", "head", "sh", "wc"] {
        tar.add(&Header::new(Kind::HardLink, format!("bin/{command}")).mode(0o755).link("bin/busybox"), "")?;
    }
    tar.add(&Header::new(Kind::CharDevice, "opt/zero").mode(0o666).device(1, 5), "")?;
    tar.add(&Header::new(Kind::File, "opt/theirs").mode(0o600).owner(65534, 65534), "for one\n")?;
    tar.add(&Header::new(Kind::File, "opt/ours").mode(0o644), "for all\n")?;
    tar.add(&Header::new(Kind::File, "opt/roots").mode(0o600), "for root\n")?;
    let pools = Pools::open(directory)?;
    let layer = pools.layer(&tar.finish()?, Compression::Gzip)?;
    ImageBuilder::new("device").layer(layer).env("PATH=/bin").build(&pools, &directory.join("device"))
}

/// The mount is nosuid, nodev and accessible to root only. Containers must not be affected by that.
#[test]
fn a_containers_users_read_its_files_and_devices_though_only_root_enters_the_mount() {
    let directory = tempfile::tempdir().unwrap();
    let image = with_device(directory.path()).unwrap();
    let mut host = Host::prepare_with(std::slice::from_ref(&image)).unwrap();
    host.start_docker().unwrap();
    let script =
        "cat /opt/theirs /opt/ours; head -c 7 /opt/zero | wc -c; find /opt | wc -l; ! cat /opt/roots 2>/dev/null";
    let run = ["run", "--rm", "--network", "none", "--user", "65534:65534", "device", "sh", "-c", script];
    assert_eq!(host.docker().ok(&run).unwrap(), "for one\nfor all\n7\n5");
}

/// An image with busybox as plain `/bin/cat`, busybox as `/opt/cat` with a capability, and a file that only root may read.
fn capable(directory: &Path) -> Result<ImageFiles> {
    let busybox = std::fs::read("/bin/busybox")?;
    let mut tar = Archive::new(Vec::new());
    for path in ["bin/", "opt/", "dev/", "proc/", "sys/"] {
        tar.add(&Header::new(Kind::Directory, path), "")?;
    }
    tar.add(&Header::new(Kind::File, "bin/cat").mode(0o755), &busybox)?;
    let header = Header::new(Kind::File, "opt/cat").mode(0o755).xattr("security.capability", CAPABILITY);
    tar.add(&header, &busybox)?;
    tar.add(&Header::new(Kind::File, "secret").mode(0o600), "not for all\n")?;
    let pools = Pools::open(directory)?;
    let layer = pools.layer(&tar.finish()?, Compression::Gzip)?;
    ImageBuilder::new("capable").layer(layer).cmd(&["/bin/cat"]).build(&pools, &directory.join("capable"))
}

#[test]
fn file_capabilities_are_seen_and_work() {
    let directory = tempfile::tempdir().unwrap();
    let image = capable(directory.path()).unwrap();
    let mut host = Host::prepare_with(std::slice::from_ref(&image)).unwrap();
    host.start_docker().unwrap();
    let docker = host.docker();
    let read =
        |program: &str| docker.run(&["run", "--rm", "--network", "none", "--user", "7", "capable", program, "/secret"]);
    assert_eq!(read("/opt/cat").unwrap().stdout, "not for all\n");
    assert!(read("/bin/cat").unwrap().stderr.contains("Permission denied"));
    docker
        .ok(&["run", "--detach", "--name", "one", "--network", "none", "--interactive", "capable", "/bin/cat"])
        .unwrap();
    let merged = docker.ok(&["inspect", "--format", "{{.GraphDriver.Data.MergedDir}}", "one"]).unwrap();
    let file = Path::new(&merged).join("opt/cat");
    let output = run(Command::new("/usr/sbin/getcap").arg(&file)).unwrap().ok().unwrap();
    assert_eq!(output, format!("{} cap_dac_override=ep", file.display()));
}

/// An image that has a layer, its removal, and the same layer again, and three times the same empty layer, as every builder makes it.
fn repeating(directory: &Path) -> Result<ImageFiles> {
    let mut base = Archive::new(Vec::new());
    for path in ["bin/", "dev/", "proc/", "sys/"] {
        base.add(&Header::new(Kind::Directory, path), "")?;
    }
    base.add(&Header::new(Kind::File, "bin/busybox").mode(0o755), std::fs::read("/bin/busybox")?)?;
    for command in ["cat", "ls", "sh"] {
        base.add(&Header::new(Kind::HardLink, format!("bin/{command}")).mode(0o755).link("bin/busybox"), "")?;
    }
    let mut with = Archive::new(Vec::new());
    with.add(&Header::new(Kind::Directory, "data/"), "")?;
    with.add(&Header::new(Kind::File, "data/kept"), "kept\n")?;
    with.add(&Header::new(Kind::Directory, "data/deep/"), "")?;
    with.add(&Header::new(Kind::File, "data/deep/file"), "deep\n")?;
    let mut without = Archive::new(Vec::new());
    without.add(&Header::new(Kind::File, ".wh.data"), "")?;
    let pools = Pools::open(directory)?;
    let [base, with, without, empty] =
        [base.finish()?, with.finish()?, without.finish()?, Archive::new(Vec::new()).finish()?];
    let mut builder = ImageBuilder::new("repeating").env("PATH=/bin");
    for tar in [&base, &empty, &with, &without, &with, &empty, &empty] {
        builder = builder.layer(pools.layer(tar, Compression::Gzip)?);
    }
    builder.build(&pools, &directory.join("repeating"))
}

/// rules_docker #1392, moby #52411: overlayfs does not accept the same directory twice ("conflicting lowerdir path").
#[test]
fn an_image_with_the_same_layer_twice_runs_and_changes() {
    let directory = tempfile::tempdir().unwrap();
    let image = repeating(directory.path()).unwrap();
    let mut host = Host::prepare_with(std::slice::from_ref(&image)).unwrap();
    host.start_docker().unwrap();
    let script = "cat /data/kept /data/deep/file; ls /data; echo more >> /data/kept; cat /data/kept";
    assert_eq!(host.shell("repeating", script).unwrap(), "kept\ndeep\ndeep\nkept\nkept\nmore");
    let links = host.docker().extracted(&image).unwrap();
    let targets: BTreeSet<_> = links.iter().map(|diff| std::fs::read_link(diff).unwrap()).collect();
    assert_eq!(targets.len(), 7, "each place has a directory of its own: {targets:?}");
    assert_eq!(host.status().unwrap()["in_sync"], true);
}

/// Scripts with `set -e` run `chattr -i` before they write.
#[test]
fn flags_of_files_are_shown_and_changed_as_on_a_local_disk() {
    let mut ours = Host::prepare_on(&["small"], "fuse").unwrap();
    ours.start_docker().unwrap();
    let native = Docker::start().unwrap();
    native.load(&image("small").unwrap()).unwrap();
    let said = [ours.docker(), &native].map(|docker| {
        docker.ok(&["run", "--detach", "--name", "one", "--network", "none", "small", "sleep", "1000000"]).unwrap();
        let merged = docker.ok(&["inspect", "--format", "{{.GraphDriver.Data.MergedDir}}", "one"]).unwrap();
        let script = "set -e; lsattr -d data data/greeting bin/busybox; chattr -i data/greeting; chattr -R -i bin data; \
                      chattr +i data/noise; lsattr data; ! rm data/noise 2> /dev/null; chattr -i data/noise; rm data/noise; \
                      lsattr data bin/busybox";
        let said = run(Command::new("sh").args(["-c", script]).current_dir(merged)).unwrap().ok().unwrap();
        docker.ok(&["rm", "--force", "one"]).unwrap();
        said
    });
    assert_eq!(said[0], said[1]);
}

/// EROFS has no flags. A file that was written has them, as it lies on the host's own disk.
#[test]
fn files_of_native_trees_have_no_flags_until_they_are_written() {
    let mut host = Host::prepare_on(&["small"], "native").unwrap();
    host.start_docker().unwrap();
    host.docker().ok(&["run", "--detach", "--name", "one", "--network", "none", "small", "sleep", "1000000"]).unwrap();
    let merged = host.docker().ok(&["inspect", "--format", "{{.GraphDriver.Data.MergedDir}}", "one"]).unwrap();
    let script = "lsattr -d data/greeting || echo none; set -e; echo >> data/greeting; chattr +i data/greeting; \
                  ! rm data/greeting 2> /dev/null; chattr -i data/greeting; rm data/greeting";
    let said = run(Command::new("sh").args(["-c", script]).current_dir(merged)).unwrap();
    assert!(
        said.code == 0 && said.stdout == "none\n",
        "{said:?}: when this fails, correct SEMANTICS.md and COMPATIBILITY.md"
    );
    assert!(said.stderr.contains("Operation not supported"), "{said:?}");
    host.docker().ok(&["rm", "--force", "one"]).unwrap();
}

/// What scripts and backup programs look at. The lines that begin with `device` are what a FUSE tree cannot show as a local
/// disk does, see docs/COMPATIBILITY.md. Numbers of inodes after a copy-up and new hard links are not looked at: above FUSE they
/// are as on a local disk only until the kernel forgets the inode, see SEMANTICS.
const LOOKS: &str = r#"
stat="busybox stat -c"
$stat '%h %a %U' /bin/ls /data /etc; [ /bin/ls -ef /bin/cat ] && echo "names of one file"
mkdir /copy && cp -a /bin/ls /bin/cat /copy && $stat %h /copy/ls
tar -cf /archive /bin && tar -tvf /archive | grep -c 'link to\| -> '
tar -cf /archive /bin && tar -tf /archive | wc -l
find / -xdev -path /proc -prune -o -path /copy -prune -o -type f -print | wc -l
awk '{ print $4 }' /proc/self/maps | sort -u | wc -l
[ $($stat %d /) = $($stat %d /bin/busybox) ] && echo "device: one" || echo "device: several"
echo "device: $(du -sx /bin | cut -f1)"
"#;

#[test]
fn programs_see_what_they_see_on_a_local_disk_but_for_device_numbers() {
    let ours = Host::start(&["small"]).unwrap();
    let native = Docker::start().unwrap();
    native.load(&image("small").unwrap()).unwrap();
    let looks = ["run", "--rm", "--network", "none", "small", "sh", "-c", LOOKS];
    let [ours, native] = [ours.docker(), &native].map(|docker| docker.ok(&looks).unwrap());
    let of = |said: &str, about_devices: bool| -> Vec<String> {
        said.lines().filter(|line| line.starts_with("device") == about_devices).map(str::to_owned).collect()
    };
    assert_eq!(of(&ours, false), of(&native, false));
    assert!(of(&native, false).len() > 7, "{native}");
    assert_eq!(of(&native, true)[0], "device: one");
    assert_eq!(of(&ours, true)[0], "device: several");
}
