//! 32-bit programs without large-file support, whose `stat` and `getdents` fail on numbers that do not fit into 32 bits.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use tests::hosts;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{Compression, ImageBuilder, ImageFiles, Pools};
use tests::mounts;
use tests::process::run;
use tests::site::Site;

/// Compiles `programs32/list.c` for 32 bits.
fn build(directory: &Path) -> Result<PathBuf> {
    let (source, program) = (concat!(env!("CARGO_MANIFEST_DIR"), "/tests/programs32/list.c"), directory.join("list"));
    let mut compiler = Command::new("cc");
    compiler.args(["-m32", "-O1", "-static", "-nostdlib", "-ffreestanding", "-fno-pic", "-fno-stack-protector", "-o"]);
    run(compiler.arg(&program).arg(source))?.ok()?;
    Ok(program)
}

/// The names that the program sees in a directory, each with the inode number from the listing and that from `stat`.
fn listed(program: &Path, directory: &Path) -> Result<BTreeMap<String, (u64, u64)>> {
    let text = run(Command::new(program).arg(directory))?.ok()?;
    let line = |line: &str| {
        let mut words = line.splitn(3, ' ');
        let mut next = || words.next().context("a word is missing");
        let numbers = (next()?.parse()?, next()?.parse()?);
        Ok((next()?.to_owned(), numbers))
    };
    text.lines().map(line).collect()
}

fn names(directory: &Path) -> Result<Vec<String>> {
    let name = |entry: std::io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    let mut names = fs::read_dir(directory)?.map(name).collect::<Result<Vec<_>>>()?;
    names.extend([".".to_owned(), "..".to_owned()]);
    names.sort_unstable();
    Ok(names)
}

fn directories_below(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    found.push(directory.to_owned());
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            directories_below(&entry.path(), found)?;
        }
    }
    Ok(())
}

/// An image of two layers. Both have many files in a common directory, and many in a directory of their own.
fn two_layers(directory: &Path, name: &str) -> Result<ImageFiles> {
    let pools = Pools::open(directory)?;
    let mut builder = ImageBuilder::new(name);
    for layer in ["one", "two"] {
        let mut tar = Archive::new(Vec::new());
        for path in ["both/".to_owned(), format!("{layer}/")] {
            tar.add(&Header::new(Kind::Directory, &path), "")?;
        }
        for number in 0..400 {
            for directory in ["both", layer] {
                let path = format!("{directory}/{layer}-{number}");
                tar.add(&Header::new(Kind::File, &path), format!("{name} {path}"))?;
            }
        }
        builder = builder.layer(pools.layer(&tar.finish()?, Compression::Gzip)?);
    }
    builder.build(&pools, &directory.join(name))
}

/// An overlay like those that engines mount; unmounted when dropped.
struct Overlay(PathBuf);

impl Overlay {
    fn over(lower: &Path, directory: &Path) -> Result<Overlay> {
        let part = |name: &str| {
            let path = directory.join(name);
            fs::create_dir_all(&path).map(|()| path)
        };
        let (upper, work, merged) = (part("upper")?, part("work")?, part("merged")?);
        let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str()))?;
        Ok(Overlay(merged))
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        mounts::detach_below(&self.0);
    }
}

/// SEMANTICS: "Numbers of inodes, and offsets in directories of images, are below 2^31".
///
/// bcachefs #650, Vulkan-Loader #1551: to 32-bit programs directories looked empty and files missing.
#[test]
fn programs_of_32_bits_list_and_stat_what_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let program = build(directory.path()).unwrap();
    let site = Site::start().unwrap();
    let all: Vec<ImageFiles> = ["a", "b"].map(|name| two_layers(directory.path(), name).unwrap()).into();
    all.iter().for_each(|image| hosts::load(&site, image).unwrap());
    let host = hosts::mount(&site, "one").unwrap();
    let mut of_files = HashSet::new();
    for image in &all {
        let root = host.chain(image.chain_ids().last().unwrap());
        let mut directories = Vec::new();
        directories_below(&root, &mut directories).unwrap();
        for directory in &directories {
            let seen = listed(&program, directory).unwrap();
            assert_eq!(seen.keys().cloned().collect::<Vec<_>>(), names(directory).unwrap(), "{}", directory.display());
            for (name, (listed, stated)) in seen.iter().filter(|(name, _)| !name.starts_with('.')) {
                assert_eq!(listed, stated, "{}/{name}", directory.display());
                of_files.insert(*stated);
            }
        }
        let container = Overlay::over(&root, &site.path().join(&image.name)).unwrap();
        for directory in ["", "one", "both"] {
            let directory = container.0.join(directory);
            assert_eq!(
                listed(&program, &directory).unwrap().into_keys().collect::<Vec<_>>(),
                names(&directory).unwrap()
            );
        }
    }
    assert_eq!(of_files.len(), 2 * (4 * 400 + 3), "every file and directory has a number of its own");
}
