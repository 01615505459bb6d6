//! Real images from Debian packages: a shared base, then one overlayfs layer for each step, as `docker build`
//! would make them.
//!
//! The bytes depend on the packages only: times of building are replaced by one fixed time, logs and caches
//! are removed, entries are sorted.

use std::collections::HashMap;
use std::fmt;
use std::fs::{File, Metadata};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use nix::sys::stat::{major, minor};

use super::archive::{Archive, Header, Kind};
use crate::process::run;

/// The time that replaces every time of building: 2026-01-01.
const BUILT: i64 = 1_767_225_600;

/// The script that makes the base.
pub(super) const BASE_SCRIPT: &str = include_str!("../../images/base.sh");
/// The script that makes one more layer.
pub(super) const LAYER_SCRIPT: &str = include_str!("../../images/layer.sh");

/// One image: what its steps run, and how it is started.
pub(super) struct Recipe {
    pub(super) name: &'static str,
    /// Commands, one layer each, on top of the base.
    commands: &'static [&'static str],
    /// Packages from PyPI: one more layer, and another one with their compiled modules.
    python: &'static [&'static str],
    pub(super) env: &'static [&'static str],
    pub(super) cmd: &'static [&'static str],
}

/// What makes one layer.
pub(super) enum Step {
    Command(&'static str),
    /// Installs Python packages.
    Python(&'static [&'static str]),
}

impl Recipe {
    /// The steps, one layer each.
    pub(super) fn steps(&self) -> Vec<Step> {
        let mut steps: Vec<Step> = self.commands.iter().map(|command| Step::Command(command)).collect();
        if !self.python.is_empty() {
            steps.extend([Step::Python(self.python), Step::Command(COMPILE_PYTHON)]);
        }
        steps
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Command(command) => f.write_str(command),
            Step::Python(packages) => write!(f, "pip install {}", packages.join(" ")),
        }
    }
}

impl Step {
    /// Does this step above `lowers` (lowest first); returns the tree of what it changed, which lies below `work`.
    pub(super) fn run(&self, lowers: &[PathBuf], lists: &Path, work: &Path) -> Result<PathBuf> {
        match self {
            Step::Command(command) => run_command(command, lowers, lists, work),
            Step::Python(packages) => install_python(packages, work),
        }
    }
}

/// What most images do at their end: whiteouts of whole directories of the layers below.
const SLIM: &str = "rm -rf /usr/share/doc /usr/share/man /usr/share/info; rm -f /etc/cron.daily/*";

/// The images. All share the base; [`super::oddities`] go on top of each.
pub(super) const RECIPES: &[Recipe] = &[
    Recipe {
        name: "bash",
        commands: &[
            "$install bash-completion less",
            // A directory made anew is opaque; links across directories; a setuid copy.
            "rm -rf /etc/skel; mkdir /etc/skel; echo 'PS1=\"\\w \"' > /etc/skel/.bashrc; mkdir /opt/tools
             cp /usr/bin/id /opt/tools/id; chmod 6755 /opt/tools/id; ln /opt/tools/id /usr/local/bin/who-am-i",
        ],
        python: &[],
        env: &["LANG=C.UTF-8"],
        cmd: &["bash"],
    },
    Recipe {
        name: "python3",
        commands: &[
            "$install python3",
            "mkdir -p /srv/app; echo 'import json, ssl, sqlite3, asyncio; print(json.dumps(\"ready\"))' > /srv/app/main.py
             rm -rf /usr/lib/python3.*/test /usr/lib/python3.*/lib2to3",
            SLIM,
        ],
        python: &[],
        env: &["PYTHONDONTWRITEBYTECODE=1"],
        cmd: &["python3", "/srv/app/main.py"],
    },
    Recipe {
        name: "nginx",
        commands: &[
            "$install nginx-light",
            "rm -rf /var/www/html; mkdir /var/www/html; echo '<h1>cachefs</h1>' > /var/www/html/index.html
             ln -sf /dev/stdout /var/log/nginx/access.log; ln -sf /dev/stderr /var/log/nginx/error.log",
        ],
        python: &[],
        env: &[],
        cmd: &["nginx", "-g", "daemon off;"],
    },
    Recipe {
        name: "redis",
        commands: &["$install redis-server", SLIM],
        python: &[],
        env: &[],
        cmd: &["redis-server", "--protected-mode", "no", "--save", ""],
    },
    Recipe {
        name: "nodejs",
        commands: &[
            "$install nodejs",
            "mkdir -p /srv/app; echo 'console.log(JSON.stringify({ready: true}))' > /srv/app/main.js",
        ],
        python: &[],
        env: &["NODE_ENV=production"],
        cmd: &["node", "/srv/app/main.js"],
    },
    Recipe {
        name: "gcc",
        commands: &[
            "$install gcc libc6-dev",
            "mkdir -p /srv/hello; printf '#include <stdio.h>\\nint main(void) { puts(\"ready\"); return 0; }\\n' > /srv/hello/hello.c",
            SLIM,
        ],
        python: &[],
        env: &[],
        cmd: &["sh", "-c", "gcc -o /tmp/hello /srv/hello/hello.c && /tmp/hello"],
    },
];

/// Images that are built on request only: gigabytes each.
pub(super) const LARGE: &[Recipe] = &[
    Recipe {
        name: "ai",
        commands: &["$install python3"],
        python: &["torch"],
        env: &["PYTHONDONTWRITEBYTECODE=1"],
        cmd: &["python3", "-c", "import torch"],
    },
    Recipe {
        name: "weights",
        commands: &[
            "$install python3",
            // 4 GiB that do not compress, always the same.
            "python3 -c 'import random
r = random.Random(4)
with open(\"/srv/weights\", \"wb\") as f:
    for _ in range(256): f.write(r.randbytes(1 << 24))'",
        ],
        python: &[],
        env: &["PYTHONDONTWRITEBYTECODE=1"],
        cmd: &["sleep", "infinity"],
    },
];

/// The version of Debian's Python, and where packages that are not Debian's lie.
const PYTHON: &str = "3.11";
const PYTHON_PACKAGES: &str = "usr/local/lib/python3.11/dist-packages";
/// Has modules compiled whose times will be replaced.
const COMPILE_PYTHON: &str =
    "python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /usr/local/lib/python3.11/dist-packages";

/// Makes the base tree at `tree` and the package lists at `lists`.
pub(super) fn build_base(tree: &Path, lists: &Path) -> Result<()> {
    let mut command = Command::new("sh");
    command.args(["-c", BASE_SCRIPT, "base.sh"]).arg(tree).arg(lists).env("SOURCE_DATE_EPOCH", BUILT.to_string());
    run(&mut command)?.ok().context("cannot make the base of the test images")?;
    Ok(())
}

/// Runs `step` above `lowers` (lowest first); what it changed is then the tree `work/upper`.
fn run_command(step: &str, lowers: &[PathBuf], lists: &Path, work: &Path) -> Result<PathBuf> {
    let lower: Vec<_> = lowers.iter().rev().map(|path| path.to_string_lossy().into_owned()).collect();
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]);
    command.args(["sh", "-c", LAYER_SCRIPT, "layer.sh"]).arg(work).arg(lists);
    command.arg(lower.join(":")).arg(step).env("SOURCE_DATE_EPOCH", BUILT.to_string());
    run(&mut command)?.ok().with_context(|| format!("cannot run the image step `{step}`"))?;
    Ok(work.join("upper"))
}

/// Installs Python packages into a tree of their own, `work/upper`, with this machine's pip: an image has no certificates to reach PyPI with.
fn install_python(packages: &[&str], work: &Path) -> Result<PathBuf> {
    let upper = work.join("upper");
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--no-compile", "--no-cache-dir", "--only-binary=:all:"]);
    pip.args(["--implementation", "cp", "--python-version", PYTHON, "--target"]).arg(upper.join(PYTHON_PACKAGES));
    run(pip.args(packages))?.ok().with_context(|| format!("cannot install {}", packages.join(", ")))?;
    Ok(upper)
}

/// Writes a directory tree as a layer: whiteouts and opaque directories of overlayfs become those of OCI.
/// Times since `building`, when the base's building began, are replaced.
pub(super) fn write_layer(tree: &Path, building: SystemTime, out: &mut impl Write) -> Result<()> {
    let since = i64::try_from(building.duration_since(UNIX_EPOCH)?.as_secs())?;
    let mut layer = LayerWriter { archive: Archive::new(out), since, links: HashMap::new() };
    layer.directory(tree, Path::new(""))?;
    layer.archive.finish()?;
    Ok(())
}

struct LayerWriter<'a, W: Write> {
    archive: Archive<&'a mut W>,
    since: i64,
    links: HashMap<u64, Vec<u8>>,
}

impl<W: Write> LayerWriter<'_, W> {
    fn directory(&mut self, root: &Path, inner: &Path) -> Result<()> {
        let path = root.join(inner);
        let entries = std::fs::read_dir(&path).with_context(|| format!("cannot list {}", path.display()))?;
        let mut names = entries.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
        names.sort();
        for name in names {
            self.entry(root, &inner.join(name))?;
        }
        Ok(())
    }

    fn entry(&mut self, root: &Path, inner: &Path) -> Result<()> {
        let path = root.join(inner);
        let status = path.symlink_metadata()?;
        let mut name = inner.as_os_str().as_bytes().to_vec();
        if status.file_type().is_char_device() && status.rdev() == 0 {
            return self.whiteout(inner, b".wh.");
        }
        if let Some(first) = self.links.get(&status.ino()) {
            let header = self.header(Kind::HardLink, name, &status).link(first);
            return Ok(self.archive.add(&header, "")?);
        }
        if status.nlink() > 1 && !status.is_dir() {
            self.links.insert(status.ino(), name.clone());
        }
        let Some(kind) = kind_of(&status) else { return Ok(()) };
        if kind == Kind::Directory {
            name.push(b'/');
        }
        let mut header = self.header(kind, name, &status);
        for (name, value) in layer_xattrs(&path)? {
            header = header.xattr(name, value);
        }
        match kind {
            Kind::File => self.archive.stream(&header, status.size(), File::open(&path)?)?,
            Kind::Symlink => {
                let target = std::fs::read_link(&path)?;
                self.archive.add(&header.link(target.as_os_str().as_bytes()), "")?;
            }
            _ => self.archive.add(&header, "")?,
        }
        if kind == Kind::Directory {
            if xattr::get(&path, "trusted.overlay.opaque")?.is_some_and(|value| value == b"y") {
                self.whiteout(&inner.join(".opq"), b".wh..wh.")?;
            }
            self.directory(root, inner)?;
        }
        Ok(())
    }

    fn whiteout(&mut self, inner: &Path, prefix: &[u8]) -> Result<()> {
        let (Some(parent), Some(name)) = (inner.parent(), inner.file_name()) else { bail!("a whiteout has no name") };
        let name = parent.join(std::ffi::OsStr::from_bytes(&[prefix, name.as_bytes()].concat()));
        let header = Header::new(Kind::File, name.as_os_str().as_bytes()).mode(0).mtime(BUILT, 0);
        Ok(self.archive.add(&header, "")?)
    }

    fn header(&self, kind: Kind, name: Vec<u8>, status: &Metadata) -> Header {
        let mtime = if status.mtime() >= self.since { (BUILT, 0) } else { (status.mtime(), status.mtime_nsec()) };
        let number = |value: u64| u32::try_from(value).unwrap_or(0);
        Header::new(kind, name)
            .mode(status.mode() & 0o7777)
            .owner(status.uid().into(), status.gid().into())
            .mtime(mtime.0, u32::try_from(mtime.1).unwrap_or(0))
            .device(number(major(status.rdev())), number(minor(status.rdev())))
    }
}

fn kind_of(status: &Metadata) -> Option<Kind> {
    let kind = status.file_type();
    Some(match () {
        () if kind.is_file() => Kind::File,
        () if kind.is_dir() => Kind::Directory,
        () if kind.is_symlink() => Kind::Symlink,
        () if kind.is_char_device() => Kind::CharDevice,
        () if kind.is_block_device() => Kind::BlockDevice,
        () if kind.is_fifo() => Kind::Fifo,
        () => return None,
    })
}

/// The attributes that belong to the layer; overlayfs's own are left out.
fn layer_xattrs(path: &Path) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut found = Vec::new();
    for name in xattr::list(path)? {
        let bytes = name.as_bytes();
        if bytes == b"security.capability" || bytes.starts_with(b"user.") {
            found.push((bytes.to_vec(), xattr::get(path, &name)?.unwrap_or_default()));
        }
    }
    found.sort();
    Ok(found)
}
