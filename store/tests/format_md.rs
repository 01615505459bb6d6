//! Compares FORMAT.md, the authoritative description of the format, with what the code does.

use std::path::Path;

use store::chunk::{CHUNK_LEVEL, CHUNK_MAX, CHUNK_TARGET, PIECE_SIZE};
use store::version::{Features, SUPERBLOCK_LEN, Superblock};
use store::{blocks, handover_log, layer, pack, profile, recipe};

const TEXT: &str = include_str!("../FORMAT.md");

/// The rows of all tables, as trimmed cells.
fn rows() -> Vec<Vec<String>> {
    let rows = TEXT.lines().filter(|line| line.starts_with('|'));
    rows.map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', "")).collect()).collect()
}

fn value(name: &str) -> i64 {
    let rows = rows();
    let row = rows.iter().find(|row| row[0] == name).unwrap_or_else(|| panic!("FORMAT.md has no row {name}"));
    row[1].parse().unwrap_or_else(|_| panic!("FORMAT.md has no number for {name}"))
}

#[test]
fn constants() {
    assert_eq!(value("PIECE_SIZE"), i64::from(PIECE_SIZE));
    assert_eq!(value("CHUNK_TARGET"), CHUNK_TARGET as i64);
    assert_eq!(value("CHUNK_MAX"), i64::from(CHUNK_MAX));
    assert_eq!(value("CHUNK_LEVEL"), i64::from(CHUNK_LEVEL));
    assert_eq!(value("STARTUP_LEVEL"), i64::from(profile::STARTUP_LEVEL));
    assert_eq!(value("CONTENT_MAX"), profile::CONTENT_MAX as i64);
    assert_eq!(value("PIECES_MAX"), profile::PIECES_MAX as i64);
    assert_eq!(value("CHUNKS_MAX"), profile::CHUNKS_MAX as i64);
    assert_eq!(value("INDEXES_MAX"), profile::INDEXES_MAX as i64);
    assert_eq!(value("INDEXES_LEN_MAX"), profile::INDEXES_LEN_MAX as i64);
    assert_eq!(value("HEAD_MAX"), profile::HEAD_MAX as i64);
    assert_eq!(value("BLOCK"), i64::from(blocks::BLOCK));
    assert_eq!(value("INDEX_BASE"), layer::INDEX_BASE as i64);
    assert_eq!(value("INDEX_FACTOR"), layer::INDEX_FACTOR as i64);
    assert_eq!(value("INDEX_MAX"), layer::INDEX_MAX as i64);
    assert_eq!(value("INODES_MAX"), layer::INODES_MAX as i64);
    assert_eq!(value("NAMES_MAX"), layer::NAMES_MAX as i64);
}

#[test]
fn the_example_superblock_decodes() {
    let example = TEXT.split("```superblock\n").nth(1).unwrap().split("```").next().unwrap();
    let digits: String = example.chars().filter(|c| !c.is_whitespace()).collect();
    let bytes: Vec<u8> =
        (0..digits.len()).step_by(2).map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap()).collect();
    let superblock = Superblock { features: Features::default(), identity: *b"0123456789abcdef" };
    assert_eq!(bytes, superblock.encode());
    assert_eq!(bytes.len(), SUPERBLOCK_LEN);
    assert_eq!(Superblock::decode(Path::new("/store"), &bytes).unwrap(), superblock);
}

#[test]
fn magics_and_record_lengths() {
    for magic in [
        pack::MAGIC,
        pack::END_MAGIC,
        pack::thinned::MAGIC,
        layer::MAGIC,
        layer::SEALED_MAGIC,
        recipe::MAGIC,
        profile::MAGIC,
        handover_log::MAGIC,
    ] {
        let shown = std::str::from_utf8(magic).unwrap().replace('\0', "\\0");
        assert!(TEXT.contains(&format!("`{shown}`")), "FORMAT.md does not name {shown}");
    }
    let startup = [
        ("startup header", profile::HEADER_LEN),
        ("startup index", profile::INDEX_RECORD_LEN),
        ("startup chunk", profile::CHUNK_RECORD_LEN),
        ("startup piece", profile::PIECE_RECORD_LEN),
        ("handover log header", handover_log::HEADER_LEN),
        ("handover log entry", handover_log::ENTRY_LEN),
    ];
    let index =
        [("inodes", 96), ("entries", 12), ("xattrs", 16), ("extents", 16), ("chunks", 56), ("packs", 32), ("names", 1)];
    for (section, len) in index.into_iter().chain(startup) {
        let found = rows().iter().any(|row| row[0] == section && row[1] == len.to_string());
        assert!(found, "FORMAT.md has no section {section} with records of {len} bytes");
    }
    // The fields of the index header follow each other without gaps.
    let header: Vec<(u64, u64)> =
        rows().iter().filter_map(|row| Some((row[0].parse().ok()?, row[1].parse().ok()?))).collect();
    let mut ends = Vec::new();
    for pair in header.windows(2) {
        match pair[1].0 {
            0 => ends.push(pair[0].0 + pair[0].1),
            at => assert_eq!(pair[0].0 + pair[0].1, at),
        }
    }
    assert_eq!(ends, [SUPERBLOCK_LEN as u64]);
    assert_eq!(header.last().map(|(at, len)| at + len), Some(layer::HEADER_LEN as u64));
}
