//! Test images: six from Debian packages, one small, one that holds everything odd; and a builder for any other.
//!
//! [`image`] and [`small`] build at first use and keep the result per user in
//! `$XDG_CACHE_HOME/cachefs/images-HASH/`, where the hash covers everything the bytes depend on but the packages
//! themselves. Several test processes may ask at once: one builds under a lock, the others wait. A file that has
//! its final name is complete.
//!
//! ```text
//! images-HASH/tars/HEX          uncompressed layers by diffID
//!             blobs/HEX         blobs by digest
//!             base/             tree and lists of the shared base, base/layer.json
//!             NAME/oci/         the image as an OCI layout
//!             NAME/docker.tar   the image as `docker save` writes it, made when first asked for
//! ```

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

pub mod archive;
pub mod blobs;
pub mod builder;
mod debian;
pub mod oddities;

pub use blobs::{Compression, Descriptor, digest_of, digest_of_reader, hex};
pub use builder::{ImageBuilder, ImageFiles, IndexFiles, Layer, MediaTypes, Pools, index};

/// The names of the images that are made from Debian packages.
pub fn debian_images() -> Vec<&'static str> {
    debian::RECIPES.iter().map(|recipe| recipe.name).collect()
}

/// The names of images of several gigabytes, which only benchmarks ask for, on request: `ai` has PyTorch with its CUDA libraries from PyPI, `weights`
/// a file of 4 GiB.
pub fn large_images() -> Vec<&'static str> {
    debian::LARGE.iter().map(|recipe| recipe.name).collect()
}

/// All names that [`image`] knows, but those of large images.
pub fn all_images() -> Vec<&'static str> {
    [debian_images(), vec!["small", "torture", "torture-zstd"]].concat()
}

/// The image of that name, built now if it never was: one of [`debian_images`] or [`large_images`], `small`, `torture` (every oddity
/// and a file of 2 GiB) or `torture-zstd` (the same without that file; zstd layers, which dockerd 20.10 cannot
/// pull from a registry).
pub fn image(name: &str) -> Result<ImageFiles> {
    let known = [all_images(), large_images()].concat();
    if !known.contains(&name) {
        bail!("there is no test image {name}; known are {}", known.join(", "));
    }
    let cache = Cache::open()?;
    let directory = cache.root.join(name);
    if let Ok(image) = ImageFiles::open(&directory) {
        return Ok(image);
    }
    let _building = cache.lock(name)?;
    if let Ok(image) = ImageFiles::open(&directory) {
        return Ok(image);
    }
    std::fs::create_dir_all(&directory)?;
    let built = match name {
        "small" => cache.small(&directory),
        "torture" => cache.torture(&directory),
        "torture-zstd" => cache.torture_zstd(&directory),
        _ => cache.debian(name, &directory),
    };
    built.with_context(|| format!("cannot build the test image {name}"))
}

/// A statically linked busybox in three layers: a few MB, made in a second.
pub fn small() -> Result<ImageFiles> {
    image("small")
}

/// Everything the bytes of the images depend on but Debian's packages.
const RECIPE: &[&str] = &[
    include_str!("images.rs"),
    include_str!("images/archive.rs"),
    include_str!("images/builder.rs"),
    include_str!("images/blobs.rs"),
    include_str!("images/debian.rs"),
    include_str!("images/oddities.rs"),
    debian::BASE_SCRIPT,
    debian::LAYER_SCRIPT,
];

/// The file whose modification time tells when a cache directory was last used.
const LAST_USE: &str = ".last-use";
/// The file whose modification time tells when the building of the base began; no package's file is newer.
const STARTED: &str = "started";
/// How long images of a recipe that is no longer in use are kept: long enough to switch between branches.
const KEPT_UNUSED: Duration = Duration::from_secs(2 * 24 * 3600);

struct Cache {
    root: PathBuf,
    pools: Pools,
}

impl Cache {
    fn open() -> Result<Self> {
        let user = match (std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")) {
            (Some(cache), _) if !cache.is_empty() => PathBuf::from(cache),
            (_, Some(home)) => PathBuf::from(home).join(".cache"),
            _ => bail!("neither XDG_CACHE_HOME nor HOME says where to keep test images"),
        };
        let recipe = digest_of(RECIPE.concat().as_bytes());
        let root = user.join("cachefs").join(format!("images-{}", &hex(&recipe)[..12]));
        let pools = Pools::open(&root)?;
        // The time of the last use, for remove_outdated.
        std::fs::write(root.join(LAST_USE), "")?;
        Ok(Self { root, pools })
    }

    /// Removes images of other recipes that nobody used lately.
    fn remove_outdated(&self) {
        let siblings = self.root.parent().and_then(|parent| parent.read_dir().ok());
        for sibling in siblings.into_iter().flatten().flatten() {
            let ours = sibling.file_name().to_string_lossy().starts_with("images-");
            let used = sibling.path().join(LAST_USE).metadata().and_then(|status| status.modified());
            let age = used.ok().and_then(|used| used.elapsed().ok());
            if ours && age.is_some_and(|age| age > KEPT_UNUSED) {
                let _ = std::fs::remove_dir_all(sibling.path());
            }
        }
    }

    /// Excludes other processes and threads from building the same thing.
    fn lock(&self, name: &str) -> Result<Flock<File>> {
        let path = self.root.join(format!(".lock-{name}"));
        let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        match Flock::lock(file, FlockArg::LockExclusive) {
            Ok(lock) => Ok(lock),
            Err((_, error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
    }

    /// A layer that several images use: built once, described by `NAME/layer.json`.
    fn shared(&self, name: &str, build: impl FnOnce(&Path) -> Result<Layer>) -> Result<Layer> {
        let directory = self.root.join(name);
        let description = directory.join("layer.json");
        let _building = self.lock(name)?;
        if let Ok(text) = std::fs::read(&description) {
            return Ok(serde_json::from_slice(&text)?);
        }
        // What a build that was interrupted left behind.
        if directory.exists() {
            std::fs::remove_dir_all(&directory)?;
        }
        std::fs::create_dir_all(&directory)?;
        let layer = build(&directory)?;
        let partial = directory.join(".partial-layer.json");
        std::fs::write(&partial, serde_json::to_vec_pretty(&layer)?)?;
        std::fs::rename(partial, description)?;
        Ok(layer)
    }

    fn base(&self) -> Result<Layer> {
        self.shared("base", |directory| {
            self.remove_outdated();
            let (tree, mark) = (directory.join("tree"), directory.join(STARTED));
            std::fs::write(&mark, "")?;
            let started = mark.metadata()?.modified()?;
            debian::build_base(&tree, &directory.join("lists"))?;
            let tar = |sink: &mut blobs::Sink| debian::write_layer(&tree, started, sink);
            let layer = self.pools.layer_from(tar, Compression::Gzip)?;
            Ok(Layer { created_by: "/bin/sh -c #(nop) ADD file:bookworm in / ".into(), ..layer })
        })
    }

    fn debian(&self, name: &str, directory: &Path) -> Result<ImageFiles> {
        let recipe = debian::RECIPES.iter().chain(debian::LARGE).find(|recipe| recipe.name == name);
        let recipe = recipe.context("no recipe has this name")?;
        let mut builder = ImageBuilder::new(name).layer(self.base()?);
        let base = self.root.join("base");
        let started = base.join(STARTED).metadata()?.modified()?;
        let mut lowers = vec![base.join("tree")];
        let work = self.workplace(name)?;
        for (number, step) in recipe.steps().iter().enumerate() {
            let inner = work.path().join(number.to_string());
            std::fs::create_dir(&inner)?;
            let upper = step.run(&lowers, &base.join("lists"), &inner)?;
            let tar = |sink: &mut blobs::Sink| debian::write_layer(&upper, started, sink);
            let layer = self.pools.layer_from(tar, Compression::Gzip)?;
            builder = builder.layer(Layer { created_by: format!("/bin/sh -c {step}"), ..layer });
            lowers.push(upper);
        }
        for layer in self.oddities(Compression::Gzip)? {
            builder = builder.layer(layer);
        }
        let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        for variable in [path].iter().chain(recipe.env) {
            builder = builder.env(variable);
        }
        builder.cmd(recipe.cmd).label("org.cachefs.test", name).build(&self.pools, directory)
    }

    /// An empty directory for one build, which is locked: what an interrupted build left there goes.
    fn workplace(&self, name: &str) -> Result<tempfile::TempDir> {
        let prefix = format!(".partial-{name}");
        let left = self.root.join(&prefix);
        if left.exists() {
            std::fs::remove_dir_all(&left).with_context(|| format!("cannot remove {}", left.display()))?;
        }
        Ok(tempfile::Builder::new().prefix(&prefix).rand_bytes(0).tempdir_in(&self.root)?)
    }

    /// The oddities without the huge file.
    fn oddities(&self, compression: Compression) -> Result<Vec<Layer>> {
        let tars = [oddities::lower()?, oddities::attributes()?, oddities::changes()?, oddities::repeated()?];
        tars.iter().map(|tar| self.pools.layer(tar, compression)).collect()
    }

    fn small(&self, directory: &Path) -> Result<ImageFiles> {
        let mut builder = ImageBuilder::new("small");
        for tar in small_layers()? {
            builder = builder.layer(self.pools.layer(&tar, Compression::Gzip)?);
        }
        builder.env("PATH=/bin").cmd(&["/bin/sh"]).label("org.cachefs.test", "small").build(&self.pools, directory)
    }

    fn torture(&self, directory: &Path) -> Result<ImageFiles> {
        let mut builder = ImageBuilder::new("torture").layer(self.pools.layer(&small_layers()?[0], Compression::Gzip)?);
        for (number, layer) in self.oddities(Compression::Gzip)?.into_iter().enumerate() {
            // One layer in the middle is not compressed.
            let layer = match number {
                1 => self.pools.layer(&oddities::attributes()?, Compression::None)?,
                _ => layer,
            };
            builder = builder.layer(layer);
        }
        let huge = self.pools.layer_from(oddities::huge, Compression::Gzip)?;
        builder.layer(huge).env("PATH=/bin").cmd(&["/bin/sh"]).build(&self.pools, directory)
    }

    fn torture_zstd(&self, directory: &Path) -> Result<ImageFiles> {
        let mut builder = ImageBuilder::new("torture-zstd");
        builder = builder.layer(self.pools.layer(&small_layers()?[0], Compression::Zstd)?);
        for layer in self.oddities(Compression::Zstd)? {
            builder = builder.layer(layer);
        }
        builder.env("PATH=/bin").cmd(&["/bin/sh"]).build(&self.pools, directory)
    }
}

/// busybox and its commands; a few files; a change of those files.
fn small_layers() -> Result<Vec<Vec<u8>>> {
    use archive::{Archive, Header, Kind};
    let busybox = std::fs::read("/bin/busybox").context("busybox is missing: install busybox-static")?;
    let mut lowest = Archive::new(Vec::new());
    for path in ["bin/", "dev/", "etc/", "proc/", "root/", "sys/", "tmp/", "var/"] {
        let mode = if path == "tmp/" { 0o1777 } else { 0o755 };
        lowest.add(&Header::new(Kind::Directory, path).mode(mode), "")?;
    }
    lowest.add(&Header::new(Kind::File, "bin/busybox").mode(0o4755), busybox)?;
    for command in [
        "sh",
        "cat",
        "chmod",
        "cp",
        "dd",
        "du",
        "echo",
        "env",
        "find",
        "grep",
        "httpd",
        "id",
        "ln",
        "ls",
        "mkdir",
        "mv",
        "nc",
        "ps",
        "readlink",
        "rm",
        "rmdir",
        "sed",
        "sha256sum",
        "sleep",
        "sort",
        "stat",
        "su",
        "sync",
        "tar",
        "test",
        "touch",
        "true",
        "wc",
        "wget",
    ] {
        lowest.add(&Header::new(Kind::HardLink, format!("bin/{command}")).mode(0o4755).link("bin/busybox"), "")?;
    }
    lowest
        .add(&Header::new(Kind::File, "etc/passwd"), "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n")?;
    lowest.add(&Header::new(Kind::File, "etc/group"), "root:x:0:\nuser:x:1000:\n")?;

    let mut files = Archive::new(Vec::new());
    files.add(&Header::new(Kind::Directory, "data/"), "")?;
    files.add(&Header::new(Kind::File, "data/greeting").mtime(1_600_000_000, 5), "hello\n")?;
    files.add(&Header::new(Kind::File, "data/deleted-later"), "x\n")?;
    files.add(&Header::new(Kind::File, "data/noise"), oddities::noise(9, 1 << 20))?;

    let mut change = Archive::new(Vec::new());
    change.add(&Header::new(Kind::Directory, "data/"), "")?;
    change.add(&Header::new(Kind::File, "data/.wh.deleted-later"), "")?;
    change.add(&Header::new(Kind::File, "data/greeting").mtime(1_600_000_001, 6), "hello again\n")?;
    Ok(vec![lowest.finish()?, files.finish()?, change.finish()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids_follow_the_specification() {
        let small = small().unwrap();
        let (ids, diffs) = (small.chain_ids(), small.diff_ids());
        assert_eq!(ids[0], diffs[0]);
        assert_eq!(ids[1], digest_of(format!("{} {}", diffs[0], diffs[1]).as_bytes()));
        assert_eq!(ids.len(), 3);
    }

    #[test]
    fn what_is_made_by_hand_has_the_same_bytes_every_time() {
        assert_eq!(small_layers().unwrap(), small_layers().unwrap());
        assert_eq!(oddities::attributes().unwrap(), oddities::attributes().unwrap());
    }

    #[test]
    fn an_unknown_image_is_refused() {
        assert!(format!("{:#}", image("nonesuch").unwrap_err()).contains("no test image nonesuch"));
    }
}
