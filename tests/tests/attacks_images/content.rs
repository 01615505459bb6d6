//! Meaningless bytes, missing bytes, and bytes that never end.

use super::*;

/// The map of a sparse file with these ranges, in the format of GNU sparse 1.0: in blocks before the data.
fn map(ranges: impl Iterator<Item = (u64, u64)>) -> Vec<u8> {
    let (mut lines, mut count) = (String::new(), 0);
    for (offset, length) in ranges {
        lines.push_str(&format!("{offset}\n{length}\n"));
        count += 1;
    }
    let mut text = format!("{count}\n{lines}").into_bytes();
    text.resize(text.len().next_multiple_of(512), 0);
    text
}

fn sparse(name: &str, size: u64) -> Header {
    let header = file(format!("GNUSparseFile.0/{name}")).record("GNU.sparse.major", "1");
    header
        .record("GNU.sparse.minor", "0")
        .record("GNU.sparse.name", name)
        .record("GNU.sparse.realsize", size.to_string())
}

#[test]
fn what_follows_the_archives_end_is_not_kept_in_memory() {
    let mut target = Target::new().unwrap();
    let with_trailer = |target: &Target, mib: u64| {
        target.layer(|out| {
            let mut tar = Archive::new(&mut *out);
            tar.add(&file("file"), "content")?;
            tar.finish()?;
            std::io::copy(&mut Numbered { at: 0 }.take(mib << 20), out)?;
            Ok(())
        })
    };
    let layer = with_trailer(&target, 384).unwrap();
    target.check_refused("long", layer, &["64 MiB", "the archive's end"]).unwrap();
    let layer = with_trailer(&target, 60).unwrap();
    target.check_published("short", layer).unwrap();
}

#[test]
fn what_is_in_a_whiteout_is_not_kept_in_memory() {
    let mut target = Target::new().unwrap();
    let with_whiteout = |target: &Target, mib: u64| {
        target.archive(|tar| {
            tar.add(&file("file"), "content")?;
            Ok(tar.stream(&file("d/.wh.gone"), mib << 20, Numbered { at: 0 })?)
        })
    };
    let layer = with_whiteout(&target, 384).unwrap();
    target.check_refused("long", layer, &["d/.wh.gone", "64 MiB"]).unwrap();
    let layer = with_whiteout(&target, 60).unwrap();
    target.check_published("short", layer).unwrap();
}

#[test]
fn a_sparse_map_costs_what_it_is_long() {
    let mut target = Target::new().unwrap();
    // Each file has a megabyte of map, for which the blob needs a kilobyte.
    let layer = target.archive(|tar| {
        for number in 0..16 {
            let map = map((0..250_000).map(|_| (0, 0)));
            tar.add(&sparse(&format!("map-{number}"), 0), map)?;
        }
        Ok(())
    });
    let layer = layer.unwrap();
    assert!(layer.blob.size < 100_000, "{} bytes are sent", layer.blob.size);
    let before = target.cpu_seconds().unwrap();
    target.check_published("maps", layer).unwrap();
    let spent = target.cpu_seconds().unwrap() - before;
    assert!(spent < 20.0, "{spent} seconds of processor time");
}

#[test]
fn holes_are_bounded_and_two_gigabytes_of_them_are_stored() {
    let mut target = Target::new().unwrap();
    let with_holes = |target: &Target, count: u64| {
        target.archive(|tar| {
            for number in 0..count {
                let name = format!("holes-{number}");
                let data = [map([(4096, 3), ((2 << 30) - 2, 2)].into_iter()), b"abcde".to_vec()].concat();
                tar.add(&sparse(&name, 2 << 30), data)?;
            }
            Ok(())
        })
    };
    let layer = with_holes(&target, 500).unwrap();
    target.check_refused("many", layer, &["holes-8", "16 GiB"]).unwrap();
    let layer = with_holes(&target, 1).unwrap();
    target.check_published("one", layer).unwrap();
}

#[test]
fn cancelling_ends_what_would_go_on_for_hours() {
    let mut target = Target::new().unwrap();
    // Half a terabyte, in one blob that arrives at once.
    let zeros = zstd::encode_all(&vec![0; 64 << 20][..], 1).unwrap();
    let mut head = Archive::new(Vec::new());
    head.stream(&Header { claimed_size: Some(500 << 30), ..file("bomb") }, 0, std::io::empty()).unwrap();
    let head = zstd::encode_all(&head.into_unfinished()[..], 1).unwrap();
    let blob = [head, zeros.repeat(8000)].concat();
    assert!(blob.len() < 40 << 20, "{} bytes are sent", blob.len());
    let unknown = tests::images::digest_of(b"nobody will ever know");
    let layer = target.pools.raw_layer(&blob, Compression::Zstd.layer_type(), &unknown).unwrap();
    let reference = target.push("bomb", layer).unwrap();
    target.site.ctl().ok(&["pull", "--detach", &reference]).unwrap();
    let unpacked = |site: &Site| Ok::<_, anyhow::Error>(site.job(&reference)?["unpacked_bytes"].as_u64().unwrap_or(0));
    wait_until("some of it to be unpacked", LONG, || Ok(unpacked(&target.site)? > 1 << 30)).unwrap();
    let id = target.site.job(&reference).unwrap()["id"].to_string();
    target.site.ctl().ok(&["cancel", &id]).unwrap();
    // An empty staging directory means that the unpacker has ended. The decoder ends when nobody reads from it.
    wait_until("an empty staging", Duration::from_secs(10), || Ok(target.site.staged()?.is_empty())).unwrap();
    wait_until("an idle coordinator", Duration::from_secs(20), || {
        let before = target.cpu_seconds()?;
        std::thread::sleep(Duration::from_secs(1));
        Ok(target.cpu_seconds()? - before < 0.2)
    })
    .unwrap();
    assert_eq!(target.site.job(&reference).unwrap()["state"], "cancelled");
    target.check_memory().unwrap();
    assert!(target.site.coordinator().stop().unwrap().success());
}

/// A layer with one file of `size` zeros. The tar is written into `packer`, from which `finish` makes the blob.
fn zeros<W: Write>(target: &Target, size: u64, packer: W, finish: impl FnOnce(W) -> Vec<u8>) -> Layer {
    let mut hashed = streamed::Hashed::new(packer);
    let mut tar = Archive::new(&mut hashed);
    tar.stream(&file("zeros"), size, std::io::repeat(0)).expect("memory takes it");
    tar.finish().expect("memory takes it");
    let (packer, diff_id) = hashed.finish();
    target.pools.raw_layer(&finish(packer), Compression::Gzip.layer_type(), &diff_id).expect("memory takes it")
}

/// Changes an xz stream with one block so that it claims another dictionary size; code 30 means 128 MiB.
fn claim_dictionary(mut xz: Vec<u8>, code: u8) -> Vec<u8> {
    // After the stream's header come: length, flags, the filter's id, the length of its properties, the dictionary
    // size, padding, and a checksum of these.
    let header = &mut xz[12..24];
    assert_eq!((header[0], header[2], header[3]), (2, 0x21, 1), "a block's header of twelve bytes with LZMA2");
    header[4] = code;
    let mut checksum = flate2::Crc::new();
    checksum.update(&header[..8]);
    header[8..].copy_from_slice(&checksum.sum().to_le_bytes());
    xz
}

#[test]
fn bombs_of_bzip2_and_dictionaries_of_xz_take_no_memory() {
    let mut target = Target::new().unwrap();
    let packer = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
    let bzip2 = zeros(&target, 1 << 30, packer, |packer| packer.finish().unwrap());
    assert!(bzip2.blob.size < 10_000, "{} bytes", bzip2.blob.size);
    target.check_published("bzip2", bzip2).unwrap();
    // The largest dictionary that is accepted, and enough content to use all of it.
    let packer = liblzma::write::XzEncoder::new(Vec::new(), 0);
    let xz = zeros(&target, 512 << 20, packer, |packer| claim_dictionary(packer.finish().unwrap(), 30));
    target.check_published("xz", xz).unwrap();
}

#[test]
fn bombs_of_gzip_and_zstd_take_no_memory() {
    let mut target = Target::new().unwrap();
    let gzip = target.pools.layer_from(
        |sink| {
            let mut tar = Archive::new(sink);
            tar.stream(&file("megabytes"), 256 << 20, std::io::repeat(0))?;
            Ok(tar.finish().map(drop)?)
        },
        Compression::Gzip,
    );
    target.check_published("gzip", gzip.unwrap()).unwrap();
    let zstd = target.archive(|tar| Ok(tar.stream(&file("gigabytes"), 2 << 30, std::io::repeat(0))?));
    target.check_published("zstd", zstd.unwrap()).unwrap();
}

#[test]
fn documents_nested_deep_or_with_a_hundred_thousand_layers_are_refused() {
    let mut target = Target::new().unwrap();
    let image = tests::images::small().unwrap();
    target.registry.push(&image, "image", "1").unwrap();
    let faulty = FaultyRegistry::start(&target.registry.address()).unwrap();
    let (reference, kind) = (faulty.reference("image", "1"), image.manifest.media_type.clone());
    let layer = format!(
        "{{\"mediaType\":\"{}\",\"digest\":\"{}\",\"size\":1}}",
        Compression::Gzip.layer_type(),
        image.config.digest
    );
    let of_layers = |count: usize| {
        let layers = vec![layer.as_str(); count].join(",");
        let config = serde_json::to_string(&image.config).unwrap();
        format!("{{\"schemaVersion\":2,\"mediaType\":\"{kind}\",\"config\":{config},\"layers\":[{layers}]}}")
    };
    let rows: [(String, &str); 4] = [
        ("[".repeat(1 << 20), "cannot be understood"),
        (format!("{{\"a\":{}", "[".repeat(3 << 20)), "cannot be understood"),
        (of_layers(20_000), "layers"),
        (of_layers(100_000), "manifest"),
    ];
    for (body, word) in rows {
        faulty.inject(Match::Manifests, Fault::Answer(kind.clone(), body.into_bytes()), 99);
        let job = target.pull(&reference).unwrap();
        let reason = job["reason"].as_str().unwrap_or_default();
        assert!(job["state"] == "failed" && reason.contains(word) && reason.len() < 1600, "{job}");
        faulty.heal();
    }
}
