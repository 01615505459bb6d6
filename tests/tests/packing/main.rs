//! Layers and archives in every packing, each given to this project and to docker, and layers to skopeo too. The
//! outcome is the same, or the difference is listed with its reason.
//!
//! `layers`: pulled layers. `archives`: loaded archives as Docker writes them today. `before_1_10`: loaded archives as
//! Docker wrote them before 1.10. Archives are compared by image names and ids, and their layers are unpacked here too.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use coordinator::registries::Registry;
use coordinator::registries::archive::Archive;
use coordinator::registries::archive::spool::spool;
use coordinator::registries::compression::Compression;
use futures::TryStreamExt;
use liblzma::stream::{Check, Filters, LzmaOptions, Stream};
use store::Digest;
use tests::docker::Docker;
use tests::images::archive::{Archive as Tar, Header, Kind};
use tokio_util::sync::CancellationToken;

mod archives;
mod before_1_10;
mod layers;

/// Image names with the images' ids.
type Images = BTreeMap<String, String>;

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

fn zstd(bytes: &[u8]) -> Result<Vec<u8>> {
    Ok(zstd::encode_all(bytes, 1)?)
}

fn bzip2(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

fn xz(bytes: &[u8]) -> Result<Vec<u8>> {
    xz_with(bytes, 1 << 20, Check::Crc64)
}

fn xz_with(bytes: &[u8], dictionary: u32, check: Check) -> Result<Vec<u8>> {
    let mut options = LzmaOptions::new_preset(1)?;
    let mut filters = Filters::new();
    filters.lzma2(options.dict_size(dictionary));
    let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), Stream::new_stream_encoder(&filters, check)?);
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

/// A function that packs a tar.
type Pack = fn(&[u8]) -> Result<Vec<u8>>;

/// The tar in two packed streams with something between them.
fn halves(tar: &[u8], pack: Pack, between: &[u8]) -> Result<Vec<u8>> {
    let (first, second) = tar.split_at(700);
    Ok([&pack(first)?, between, &pack(second)?].concat())
}

/// `packed` without its last `by` bytes.
fn cut(mut packed: Vec<u8>, by: usize) -> Vec<u8> {
    packed.truncate(packed.len() - by);
    packed
}

/// Packings by name. Each format has variants with one stream, two streams, trailing rubbish, and a missing end.
const PACKINGS: &[(&str, Pack)] = &[
    ("plain", |tar| Ok(tar.to_vec())),
    ("gzip", gzip),
    ("gzip twice", |tar| halves(tar, gzip, b"")),
    ("gzip and rubbish", |tar| Ok([gzip(tar)?, b"rubbish".to_vec()].concat())),
    ("gzip and zeros", |tar| Ok([gzip(tar)?, vec![0; 512]].concat())),
    ("gzip cut", |tar| Ok(cut(gzip(tar)?, 4))),
    ("bzip2", bzip2),
    ("bzip2 twice", |tar| halves(tar, bzip2, &bzip2(b"")?)),
    ("bzip2 and rubbish", |tar| Ok([bzip2(tar)?, b"rubbish".to_vec()].concat())),
    ("bzip2 and zeros", |tar| Ok([bzip2(tar)?, vec![0; 512]].concat())),
    ("bzip2 cut", |tar| Ok(cut(bzip2(tar)?, 4))),
    ("bzip2 half", |tar| Ok(cut(bzip2(tar)?, 3000))),
    ("xz", xz),
    ("xz twice", |tar| halves(tar, xz, &xz(b"")?)),
    ("xz padded", |tar| Ok([halves(tar, xz, &[0; 8])?, vec![0; 4]].concat())),
    ("xz padded by three", |tar| Ok([xz(tar)?, vec![0; 3]].concat())),
    ("xz and rubbish", |tar| Ok([xz(tar)?, b"rubbish".to_vec()].concat())),
    ("xz cut", |tar| Ok(cut(xz(tar)?, 8))),
    ("xz half", |tar| Ok(cut(xz(tar)?, 3000))),
    ("xz without check", |tar| xz_with(tar, 1 << 20, Check::None)),
    ("xz with sha256", |tar| xz_with(tar, 1 << 20, Check::Sha256)),
    ("xz of 128 MiB", |tar| xz_with(tar, 128 << 20, Check::Crc64)),
    ("xz of 256 MiB", |tar| xz_with(tar, 256 << 20, Check::Crc64)),
    ("zstd", zstd),
    ("zstd twice", |tar| halves(tar, zstd, b"")),
    ("zstd and rubbish", |tar| Ok([zstd(tar)?, b"rubbish".to_vec()].concat())),
    ("gzip of gzip", |tar| gzip(&gzip(tar)?)),
    ("lz4's first bytes", |tar| Ok([b"\x04\x22\x4d\x18".to_vec(), tar.to_vec()].concat())),
    ("compress's first bytes", |tar| Ok([b"\x1f\x9d\x90".to_vec(), tar.to_vec()].concat())),
];

/// The packings that docker treats differently, whether this project accepts them, and why.
const OTHERWISE: &[(&str, bool, &str)] = &[
    (
        "xz of 256 MiB",
        false,
        "a dictionary is memory that a stranger asks for: 128 MiB are the most, and `xz -9` uses 64",
    ),
    ("zstd", true, "docker 20.10 knows no zstd"),
    ("zstd twice", true, "docker 20.10 knows no zstd"),
];

/// Compares the outcomes of this project and docker for a packing.
fn compare(packing: &str, ours: &Result<String>, dockers: &Result<String>) -> Result<()> {
    let said = || format!("{packing}: here {ours:?}, docker {dockers:?}");
    match OTHERWISE.iter().find(|(other, ..)| *other == packing) {
        Some((_, taken, _)) => ensure!(ours.is_ok() == *taken && dockers.is_ok() != *taken, said()),
        None => ensure!(ours.is_ok() == dockers.is_ok(), said()),
    }
    Ok(())
}

/// A tar with a file that no other tar has. Packed in any way, it is still thousands of bytes long.
fn tar_with(name: &str) -> Result<Vec<u8>> {
    let noise: Vec<u8> =
        (0..1000_u32).flat_map(|n| *blake3::hash(format!("{name} {n}").as_bytes()).as_bytes()).collect();
    let mut tar = Tar::new(Vec::new());
    tar.add(&Header::new(Kind::File, "noise"), noise)?;
    Ok(tar.finish()?)
}

/// A tar of these members.
fn tar_of(members: &[(String, Vec<u8>)]) -> Result<Vec<u8>> {
    let mut tar = Tar::new(Vec::new());
    for (name, content) in members {
        let kind = if name.ends_with('/') { Kind::Directory } else { Kind::File };
        tar.add(&Header::new(kind, name), content)?;
    }
    Ok(tar.finish()?)
}

/// Opens an archive with this project and returns its images. Each layer is unpacked and checked against the manifest and the config.
fn opened(archive: &[u8]) -> Result<Images> {
    let directory = tempfile::tempdir()?;
    let spooled = spool(archive, &directory.path().join("spool"), &CancellationToken::new())?;
    let archive = Archive::open(spooled.path(), None)?;
    let names: Vec<_> = archive.names().cloned().collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut images = Images::new();
    for name in names {
        let resolved = runtime.block_on(archive.resolve(&name, None))?;
        for layer in &resolved.layers {
            let stream = archive.layer(&name, layer);
            let blob: Vec<u8> = runtime.block_on(stream.map_ok(|bytes| bytes.to_vec()).try_concat())?;
            ensure!(Digest::of(&blob) == layer.blob, "a layer of {name} is not what the manifest says");
            let mut tar = Vec::new();
            std::io::Read::read_to_end(&mut Compression::sniff(&blob).unpack(&blob[..])?, &mut tar)?;
            ensure!(Digest::of(&tar) == layer.diff_id, "a layer of {name} is not what its config says");
        }
        images.insert(name.to_string(), resolved.config.digest.to_string());
    }
    Ok(images)
}

/// Loads an archive with `docker load` and returns the images that have names. All images are removed afterwards.
fn loaded(docker: &Docker, archive: &[u8]) -> Result<Images> {
    let mut command = docker.command(&["load", "--quiet"]);
    let mut client = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // A daemon that refuses the archive does not read all of it.
    let _ = client.stdin.take().context("no way in")?.write_all(archive);
    let output = client.wait_with_output()?;
    let listed = docker.ok(&["images", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}"])?;
    let lines = listed.lines().filter_map(|line| line.split_once(' '));
    let named = lines.filter(|(name, _)| !name.contains("<none>"));
    let images = named.map(|(name, id)| (name.to_owned(), id.to_owned())).collect();
    docker.ok(&["image", "prune", "--all", "--force"])?;
    if output.status.success() { Ok(images) } else { bail!("{}", String::from_utf8_lossy(&output.stderr).trim()) }
}
