//! Debian trees with programs that this machine does not have, above all newer engines, built once per user and entered.
//!
//! A tree lies in `$XDG_CACHE_HOME/cachefs/engines/SUITE-HASH`; HASH covers the list of packages. A program in it sees the tree as
//! its root, and this machine's `/tmp`, `/dev`, control groups and network; mounts that are made later below `/tmp` appear there
//! too, those that it makes itself are its own and end with it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::images::{digest_of, hex};
use crate::namespace::Namespace;
use crate::process::{Process, TIMEOUT, run};

/// What a tree of container engines holds besides the base system.
const ENGINES: &str = "ca-certificates,docker.io,docker-cli,containerd,runc,podman,containernetworking-plugins,iproute2,iptables,nftables,procps,mount,kmod";

/// Makes the tree `$0` the root and runs the rest of the arguments.
const ENTER: &str = r#"set -e
mount --bind "$0" "$0"
mount -t proc proc "$0/proc"
mount -t sysfs sysfs "$0/sys"
mount --rbind /sys/fs/cgroup "$0/sys/fs/cgroup"
mount --rbind /dev "$0/dev"
mount --rbind /tmp "$0/tmp"
mount -t tmpfs tmpfs "$0/run"
mkdir -p "$0/.old"
cd "$0"
pivot_root . .old
cd /
umount -l /.old
exec "$@"
"#;

/// A Debian tree.
#[derive(Debug, Clone)]
pub struct EngineTree {
    suite: String,
    root: PathBuf,
}

impl EngineTree {
    /// The tree of a Debian suite; built now if it never was. `sid` has Docker 28.5 and containerd 2.1,
    /// `trixie` has Docker 26.1 and containerd 1.7; both have Podman 5.
    pub fn of(suite: &str) -> Result<EngineTree> {
        Self::with(suite, ENGINES)
    }

    /// The tree of a Debian suite with these packages, separated by commas; built now if it never was.
    pub fn with(suite: &str, packages: &str) -> Result<EngineTree> {
        let user = match (std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")) {
            (Some(cache), _) if !cache.is_empty() => PathBuf::from(cache),
            (_, Some(home)) => PathBuf::from(home).join(".cache"),
            _ => bail!("neither XDG_CACHE_HOME nor HOME says where to keep trees of engines"),
        };
        let engines = user.join("cachefs/engines");
        std::fs::create_dir_all(&engines)?;
        // Another list of packages makes another tree.
        let name = format!("{suite}-{}", &hex(&digest_of(packages.as_bytes()))[..12]);
        let root = engines.join(&name);
        let lock = std::fs::File::create(engines.join(format!("{name}.lock")))?;
        // Several tests may want it at once: one builds it.
        let _building = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
        if !root.is_dir() {
            let partial = engines.join(format!("{name}.partial"));
            let _ = std::fs::remove_dir_all(&partial);
            let mut build = Command::new("mmdebstrap");
            build.args(["--quiet", "--variant=apt", "--skip=cleanup/apt/lists"]);
            build
                .arg("--aptopt=Acquire::Check-Valid-Until \"false\"")
                .arg("--aptopt=APT::Install-Recommends \"false\"");
            build.arg(format!("--include={packages}")).arg(suite).arg(&partial);
            run(&mut build)?.ok().with_context(|| format!("cannot build a Debian tree of {suite}"))?;
            std::fs::rename(&partial, &root)?;
        }
        Ok(EngineTree { suite: suite.to_owned(), root })
    }

    /// The Debian suite.
    pub fn suite(&self) -> &str {
        &self.suite
    }

    /// Makes the tree the root of a new mount namespace, in a network namespace. What happens there is logged in `directory`.
    pub fn enter(&self, namespace: &Namespace, directory: &Path) -> Result<EnteredTree> {
        let mut command = namespace.command("unshare");
        command.args(["--mount", "--propagation", "slave", "--", "bash", "-c", ENTER]).arg(&self.root);
        command.args(["sleep", "infinity"]).env("PATH", PATH);
        let mut holder = Process::spawn("engine-tree", &mut command, &directory.join("engine-tree.log"))?;
        let comm = format!("/proc/{}/comm", holder.pid());
        holder.wait_ready(TIMEOUT, || Ok(std::fs::read_to_string(&comm)?.trim() == "sleep"))?;
        Ok(EnteredTree { holder })
    }
}

/// A mount namespace with a tree as its root. It lasts as long as the value or a program in it, so engines may be restarted
/// and find the mounts of their containers.
#[derive(Debug)]
pub struct EnteredTree {
    holder: Process,
}

impl EnteredTree {
    /// A command in the tree.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        let target = self.holder.pid().to_string();
        command.args(["--target", &target, "--mount", "--net", "--root", "--wd", "--"]).arg(program);
        command.env("PATH", PATH).env("HOME", "/root");
        command
    }
}

/// Where programs are in a tree.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
