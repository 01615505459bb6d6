//! Extended headers: PAX and GNU, repeated, merged and contradicting each other, and the sparse files and attributes that they describe.

use super::{Odd, closed};
use crate::blocks::{Block, MAGIC, MAGICS, NAME, long, pax, record};
use crate::random::Random;

type Record = (&'static [u8], &'static [u8]);

/// Records about an entry, valid and invalid.
const RECORDS: [Record; 44] = [
    (b"path", b"pax"),
    (b"path", b"pax/"),
    (b"path", b"dir/pax"),
    (b"path", b"/pax"),
    (b"path", b""),
    (b"path", b"pa\0x"),
    (b"path", b"pax\xff"),
    (b"linkpath", b"base"),
    (b"linkpath", b"nowhere"),
    (b"linkpath", b""),
    (b"size", b"5"),
    (b"size", b"0"),
    (b"size", b"+5"),
    (b"size", b" 5"),
    (b"size", b"512"),
    (b"size", b"-1"),
    (b"size", b"5x"),
    (b"size", b""),
    (b"mtime", b"1234567890.987654321"),
    (b"mtime", b"1234567890.98765432199"),
    (b"mtime", b"-1.5"),
    (b"mtime", b"99999999999999"),
    (b"mtime", b"9223372036.854775807"),
    (b"mtime", b".5"),
    (b"mtime", b"5."),
    (b"mtime", b"1e9"),
    (b"mtime", b""),
    (b"atime", b"12"),
    (b"atime", b"noon"),
    (b"ctime", b"1.2.3"),
    (b"uid", b"70000"),
    (b"uid", b"-1"),
    (b"uid", b"4294967295"),
    (b"uid", b"4294967303"),
    (b"uid", b"07"),
    (b"uid", b"root"),
    (b"gid", b"3000000"),
    (b"gid", b""),
    (b"uname", b"nobody"),
    (b"gname", b"no\0body"),
    (b"comment", b"any\0thing"),
    (b"hdrcharset", b"BINARY"),
    (b"LIBARCHIVE.xattr.user.a", b"eA=="),
    (b"SCHILY.xattr.user.a", b"one"),
];

/// Texts of extended headers that are malformed.
const BROKEN: [&[u8]; 11] = [
    b"9 path=\n",
    b"10 path=ab\n",
    b"x path=ab\n",
    b"-11 path=ab\n",
    b"+11 path=ab\n",
    b"0000000000000000000000000000039 path=a\n",
    b"11 path=abc",
    b"9 pathab\n",
    b"6 =ab\n",
    b"11 a\0b=abc\n",
    b" 11 path=ab\n",
];

/// A few extended headers and the entry that they belong to.
pub(super) fn odd(random: &mut Random) -> Odd {
    let mut what = String::new();
    let mut tar = Block::new(b'0', "base").with("base\n");
    for _ in 0..=random.below(3) {
        let (said, header) = header(random);
        what.push_str(&said);
        tar.extend(header);
    }
    let kind = random.one(b"\x0000000001225356g");
    let magic = random.one(&MAGICS[..3]);
    let name = random.one(&[&b"short"[..], b"short/", b"dir/short"]);
    what.push_str(&format!("type {:?} named {}", char::from(kind), name.escape_ascii()));
    let block = Block::new(kind, name).put(MAGIC, magic).link("base");
    let content: &[u8] = if matches!(kind, 0 | b'0') { b"12345" } else { b"" };
    tar.extend(block.with(content));
    Odd { what, tar: closed(tar) }
}

fn header(random: &mut Random) -> (String, Vec<u8>) {
    match random.below(10) {
        0 | 1 => {
            let name = random.one(&[&b"gnu"[..], b"gnu/", b"dir/gnu", b"", b"gnu\xfe", b"gnu\0rest"]);
            (format!("L {}, ", name.escape_ascii()), long(b'L', name))
        }
        2 => {
            let name = random.one(&[&b"base"[..], b"gnu-target", b""]);
            (format!("K {}, ", name.escape_ascii()), long(b'K', name))
        }
        3 => {
            let records: Vec<Record> = (0..random.below(3)).map(|_| random.one(&RECORDS)).collect();
            let name = random.one(&[&b"pax_global_header"[..], b"base", b"global"]);
            let text: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
            (format!("g {} {}, ", name.escape_ascii(), shown(&records)), Block::new(b'g', name).with(text))
        }
        4 if random.percent(50) => {
            let text = random.one(&BROKEN);
            (format!("x of {}, ", text.escape_ascii()), Block::new(b'x', "PaxHeaders/1").with(text))
        }
        _ => {
            let records: Vec<Record> = (0..=random.below(3)).map(|_| random.one(&RECORDS)).collect();
            (format!("x {}, ", shown(&records)), pax(b'x', &records))
        }
    }
}

fn shown(records: &[(&[u8], &[u8])]) -> String {
    let each = records.iter().map(|(key, value)| format!("{}={}", key.escape_ascii(), value.escape_ascii()));
    format!("[{}]", each.collect::<Vec<_>>().join(" "))
}

/// A file of 40 bytes of which twelve have data, described in one of several ways, and often incorrectly.
pub(super) fn sparse(random: &mut Random) -> Odd {
    let wrong = random.percent(55);
    let pick = |random: &mut Random, right: &'static str, others: &[&'static str]| {
        if wrong && random.percent(40) { random.one(others) } else { right }
    };
    let maps = [
        "4,6,20,6",
        "4,6,20,7",
        "4,6,8,6",
        "20,6,4,6",
        "4,12",
        "",
        "0,0,4,6,4,0,20,6",
        "4,6,36,6",
        "-4,6,20,6",
        "4,6,20",
    ];
    let map = pick(random, maps[0], &maps);
    let version = random.below(4);
    let size = pick(random, "40", &["26", "25", "0", "", "x", "9000000000000000000", "-1"]);
    let count = (map.split(',').count() / 2).to_string();
    let count = if wrong && random.percent(20) { random.one(&["1", "3", "-1", "", "x"]) } else { &count };
    let mut records = vec![(&b"GNU.sparse.name"[..], &b"sparse"[..])];
    let key: &[u8] = if version == 3 { b"GNU.sparse.realsize" } else { b"GNU.sparse.size" };
    records.push((key, size.as_bytes()));
    let mut content = Vec::new();
    let numbers: Vec<&str> = map.split(',').filter(|number| !number.is_empty()).collect();
    match version {
        0 => {
            records.push((b"GNU.sparse.numblocks", count.as_bytes()));
            for (number, text) in numbers.iter().enumerate() {
                let key: &[u8] = if number % 2 == 0 { b"GNU.sparse.offset" } else { b"GNU.sparse.numbytes" };
                records.push((key, text.as_bytes()));
            }
        }
        1 | 2 => {
            records.push((b"GNU.sparse.numblocks", count.as_bytes()));
            records.push((b"GNU.sparse.map", map.as_bytes()));
            if version == 2 {
                records.push((b"GNU.sparse.major", pick(random, "0", &["1", "2", ""]).as_bytes()));
                records.push((b"GNU.sparse.minor", pick(random, "1", &["0", "7"]).as_bytes()));
            }
        }
        _ => {
            records.push((b"GNU.sparse.major", pick(random, "1", &["0", "2", ""]).as_bytes()));
            records.push((b"GNU.sparse.minor", pick(random, "0", &["1", ""]).as_bytes()));
            content = format!("{count}\n{}\n", numbers.join("\n")).into_bytes();
            content.resize(pick(random, "512", &["512", "100", "1024"]).parse().unwrap_or(512), 0);
        }
    }
    content.extend_from_slice(pick(random, "123456abcdef", &["123456abcde", "123456abcdefg", ""]).as_bytes());
    let kind = if wrong { random.one(b"0000005S2\0") } else { b'0' };
    let what = format!("type {:?} {}, {} bytes", char::from(kind), shown(&records), content.len());
    let block = Block::new(kind, "GNUSparseFile.0/sparse").link("x");
    let block = if kind == b'S' { block.put(MAGIC, MAGICS[1]) } else { block };
    let whole = block.with(&content);
    // An entry of a type without content is followed by none, whatever its size field says.
    let entry = if matches!(kind, b'5' | b'2') { whole[..512].to_vec() } else { whole };
    Odd { what, tar: closed([pax(b'x', &records), entry].concat()) }
}

/// An entry with extended attributes that the kernel accepts, ignores or refuses.
pub(super) fn attributes(random: &mut Random) -> Odd {
    let capability: &[u8] = &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let acl: &[u8] = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\xe8\x03\0\0\x04\0\x04\0\xff\xff\xff\xff\x10\0\x04\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";
    let long = ["user.", &"n".repeat(250)].concat();
    let longer = ["user.", &"n".repeat(251)].concat();
    let names: [&[u8]; 17] = [
        b"user.a",
        b"user.b",
        b"user.",
        b"user",
        b"user.new\nline=",
        b"user.nul\0",
        b"trusted.a",
        b"trusted.overlay.opaque",
        b"trusted.overlay.redirect",
        b"security.a",
        b"security.capability",
        b"security.",
        b"system.posix_acl_access",
        b"system.other",
        b"other.a",
        b"",
        if random.percent(50) { long.as_bytes() } else { longer.as_bytes() },
    ];
    let mut what = String::new();
    let mut tar = Block::new(b'0', "base").with("base\n");
    let count = random.below(2);
    let mut records = Vec::new();
    for _ in 0..=count {
        let name = random.one(&names);
        let right: &[u8] = match name {
            b"security.capability" => capability,
            b"system.posix_acl_access" => acl,
            _ => b"value",
        };
        let value = if random.percent(80) { right } else { random.one(&[&b""[..], b"y", b"\0\n\xff", capability]) };
        what.push_str(&format!("{}={} ", name[..name.len().min(30)].escape_ascii(), value.escape_ascii()));
        records.push(([&b"SCHILY.xattr."[..], name].concat(), value));
    }
    let kind = random.one(b"00015236");
    let records: Vec<(&[u8], &[u8])> = records.iter().map(|(key, value)| (&key[..], *value)).collect();
    tar.extend(pax(b'x', &records));
    let link: &[u8] = if kind == b'1' { b"base" } else { b"elsewhere" };
    what.push_str(&format!("on type {:?}", char::from(kind)));
    let content: &[u8] = if kind == b'0' { b"content" } else { b"" };
    tar.extend(Block::new(kind, "").put(NAME, "entry").link(link).with(content));
    Odd { what, tar: closed(tar) }
}
