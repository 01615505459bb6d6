//! Layers with many entries, and entries with large attributes.

use super::*;

/// The header with `count` extended attributes.
fn attributes(header: Header, count: u64, value: impl Fn(u64) -> Vec<u8>) -> Header {
    (0..count).fold(header, |header, number| header.xattr(format!("user.number-{number}"), value(number)))
}

/// 60,000 bytes that compress well and differ for each seed.
fn distinct(seed: u64) -> Vec<u8> {
    [&seed.to_be_bytes()[..], &[b'v'; 60_000]].concat()
}

#[test]
fn entries_with_large_attributes_are_refused_by_name() {
    let mut target = Target::new().unwrap();
    // Each entry has a megabyte of attributes, which compress to a few bytes.
    let layer = target.archive(|tar| {
        for number in 0..1500 {
            tar.add(&attributes(file(format!("large-{number}")), 16, |_| vec![b'v'; 60_000]), "")?;
        }
        Ok(())
    });
    target.check_refused("large", layer.unwrap(), &["large-0", "extended attributes", "128 KiB"]).unwrap();
    // Each entry is within its own limit, but together they exceed the limit for a layer.
    let layer = target.archive(|tar| {
        for number in 0..1500 {
            tar.add(&attributes(file(format!("many-{number}")), 2, |at| distinct(number * 2 + at)), "")?;
        }
        Ok(())
    });
    target.check_refused("many", layer.unwrap(), &["many-559", "64 MiB", "extended attributes"]).unwrap();
    // Hard links that each add an attribute to the same inode.
    let layer = target.archive(|tar| {
        tar.add(&file("first"), "x")?;
        for number in 0..400 {
            let link = Header::new(Kind::HardLink, format!("link-{number}")).link("first");
            tar.add(&link.xattr(format!("user.number-{number}"), distinct(number)), "")?;
        }
        Ok(())
    });
    target.check_refused("links", layer.unwrap(), &["link-2", "extended attributes"]).unwrap();
}

#[test]
fn equal_attributes_cost_nothing_however_many_entries_have_them() {
    let mut target = Target::new().unwrap();
    let layer = target.archive(|tar| {
        for number in 0..1500 {
            tar.add(&attributes(file(format!("equal-{number}")), 2, |_| vec![b'v'; 60_000]), "")?;
        }
        Ok(())
    });
    target.check_published("equal", layer.unwrap()).unwrap();
}

#[test]
fn an_index_out_of_proportion_to_its_layer_is_refused() {
    let mut target = Target::new().unwrap();
    // Each path implies two thousand directories that have no entry in the tar.
    let layer = target.archive(|tar| {
        for number in 0..500 {
            tar.add(&file(format!("{number}/{}end", "d/".repeat(2000))), "")?;
        }
        Ok(())
    });
    target.check_refused("deep", layer.unwrap(), &["2 times as large as its tar", "d/d/d/"]).unwrap();
    // 400 entries whose attributes are all different, as in a layer whose index once reached 373 MB.
    let layer = target.archive(|tar| {
        for number in 0..400 {
            tar.add(&attributes(file(format!("distinct-{number}")), 15, |at| distinct(number * 15 + at)), "")?;
        }
        Ok(())
    });
    target.check_refused("distinct", layer.unwrap(), &["distinct-0", "128 KiB"]).unwrap();
}

#[test]
fn extended_headers_in_a_row_are_one() {
    let mut target = Target::new().unwrap();
    let layer = target.layer(|out| {
        // Extended headers for an entry that never follows.
        for number in 0..1000u32 {
            let mut records = Archive::new(Vec::new());
            let header = file("x").record(format!("key.{number}"), vec![b'v'; 900_000]);
            records.add(&header, "")?;
            let mut bytes = records.into_unfinished();
            bytes.truncate(bytes.len() - 512);
            out.write_all(&bytes)?;
        }
        Ok(())
    });
    target.check_refused("row", layer.unwrap(), &["extended headers longer than 1 MiB"]).unwrap();
}

/// Writes `count` entries of the same kind, made by changing a few bytes of one header.
fn numbered(out: &mut dyn Write, count: u32) -> Result<()> {
    let mut one = Archive::new(Vec::new());
    one.add(&file("d/0000000"), "")?;
    let mut header = one.into_unfinished();
    let mut block = Vec::with_capacity(1 << 20);
    for number in 0..count {
        let name = format!("{number:07}");
        header[2..9].copy_from_slice(name.as_bytes());
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block.extend_from_slice(&header);
        if block.len() >= 1 << 20 {
            out.write_all(&block)?;
            block.clear();
        }
    }
    out.write_all(&block)?;
    Ok(out.write_all(&[0; 1024])?)
}

#[test]
fn millions_of_empty_files_are_refused_and_a_million_is_not() {
    let mut target = Target::new().unwrap();
    let layer = target.layer(|out| numbered(out, 2_000_000)).unwrap();
    target.check_refused("millions", layer, &["d/124999", "1250000 files and directories"]).unwrap();
    let layer = target.layer(|out| numbered(out, 1_000_000)).unwrap();
    target.check_published("million", layer).unwrap();
}

#[test]
fn chains_of_symbolic_links_are_followed_only_so_far() {
    let mut target = Target::new().unwrap();
    let layer = target.archive(|tar| {
        // The path of l0 has fifteen hundred steps that lead nowhere, and each further link adds as many on top of the one before.
        let steps = "a/../".repeat(780);
        tar.add(&Header::new(Kind::Directory, "a"), "")?;
        tar.add(&Header::new(Kind::Symlink, "l0").link(format!("{steps}a")), "")?;
        for number in 1..39 {
            let link = format!("{steps}l{}", number - 1);
            tar.add(&Header::new(Kind::Symlink, format!("l{number}")).link(link), "")?;
        }
        for number in 0..50_000 {
            tar.add(&file(format!("l38/f{number}")), "")?;
        }
        Ok(())
    });
    let before = target.cpu_seconds().unwrap();
    target.check_refused("chains", layer.unwrap(), &["l38/f", "symbolic links"]).unwrap();
    let spent = target.cpu_seconds().unwrap() - before;
    assert!(spent < 30.0, "{spent} seconds of processor time");
}

#[test]
fn a_hundred_thousand_links_and_a_deep_tree_are_stored() {
    let mut target = Target::new().unwrap();
    let layer = target.archive(|tar| {
        tar.add(&attributes(file("first"), 2, distinct), "content")?;
        for number in 0..100_000 {
            tar.add(&Header::new(Kind::HardLink, format!("links/{number}")).link("first"), "")?;
        }
        let mut path = String::new();
        while path.len() < 3000 {
            path.push_str("deep/");
            tar.add(&Header::new(Kind::Directory, &path), "")?;
        }
        Ok(())
    });
    target.check_published("links", layer.unwrap()).unwrap();
}
