//! Fields in all forms, in headers of every dialect and type.

use super::{Odd, closed};
use crate::blocks::{
    Block, Field, GID, LINK, MAGIC, MAGICS, MAJOR, MINOR, MODE, MTIME, NAME, PREFIX, SIZE, TRAILER, UID, padded,
};
use crate::random::Random;

const NUMBERS: [(&str, Field); 7] = [
    ("mode", MODE),
    ("uid", UID),
    ("gid", GID),
    ("size", SIZE),
    ("mtime", MTIME),
    ("devmajor", MAJOR),
    ("devminor", MINOR),
];

const KINDS: &[u8] = b"\x000000122334455667SVMDNAXZ ";

/// An entry with a few odd fields and content that may not match its size, followed by another entry.
pub(super) fn odd(random: &mut Random) -> Odd {
    let kind = random.one(KINDS);
    let magic = if random.percent(60) { MAGICS[random.below(3)] } else { random.one(&MAGICS) };
    let name = random.one(&[&b"f"[..], b"d/f", b"f/", b"d/", b"x\xff\xfe", b"./f", b"/f"]);
    let mut what = format!("type {:?}, magic {}, name {}", char::from(kind), magic.escape_ascii(), name.escape_ascii());
    let mut block = Block::new(kind, name).put(MAGIC, magic);
    if matches!(kind, b'1' | b'2') {
        block = block.link(random.one(&[&b"base"[..], b"missing", b"/base"]));
    }
    let content = if random.percent(70) { &b"12345"[..] } else { b"" };
    block = block.number(SIZE, content.len() as u64);
    let usual = |field: Field| if field == SIZE { content.len() as u64 } else { 0o123 };
    for _ in 0..=random.below(2) {
        let (field_name, field) = random.one(&NUMBERS);
        let (form, bytes) = form(random, field.1, usual(field));
        what.push_str(&format!(", {field_name} {form}"));
        block = block.put(field, bytes);
    }
    if random.percent(25) {
        let prefix = random.one(&[&b"p"[..], b"p/q", b"12345", b"p\xff", b"/p", b"7777777777"]);
        what.push_str(&format!(", prefix {}", prefix.escape_ascii()));
        block = block.put(PREFIX, prefix);
        if random.percent(30) {
            what.push_str(", star's trailer");
            block = block.put(TRAILER, "tar\0");
        }
    }
    if random.percent(10) {
        what.push_str(", a full name and link");
        block = block.put(NAME, [b'n'; 100]).put(LINK, [b'l'; 100]);
    }
    let (sum, header) = sealed(random, block);
    what.push_str(&sum);
    let base = Block::new(b'0', "base").with("base\n");
    Odd { what, tar: closed([base, header, padded(content)].concat()) }
}

/// A number in one of many forms, and the form's name.
fn form(random: &mut Random, len: usize, value: u64) -> (&'static str, Vec<u8>) {
    let octal = format!("{value:o}");
    let base_256 = |bytes: &[u8], fill: u8| {
        let mut field = vec![fill; len];
        field[len - bytes.len()..].copy_from_slice(bytes);
        field[0] |= 0x80;
        field
    };
    let zeros = format!("{value:0len$o}");
    match random.below(22) {
        0 => ("of NULs", vec![0; len]),
        1 => ("of blanks", vec![b' '; len]),
        2 => ("without an end", zeros.into_bytes()),
        3 => ("right-aligned", format!("{octal:>len$}").into_bytes()),
        4 => ("with a blank behind", format!("{octal} ").into_bytes()),
        5 => ("with a NUL before", format!("\0{octal}").into_bytes()),
        6 => ("with blanks and NULs around", format!(" \0 {octal} \0").into_bytes()),
        7 => ("with more after its NUL", format!("{octal}\x007z").into_bytes()),
        8 => ("with a blank in the middle", format!("0 {octal}").into_bytes()),
        9 => ("with a digit 8", format!("8{octal}").into_bytes()),
        10 => ("with a sign", format!("-{octal}").into_bytes()),
        11 => ("with a plus", format!("+{octal}").into_bytes()),
        12 => ("of sevens", vec![b'7'; len]),
        13 => ("of letters", b"abc".to_vec()),
        14 => ("in base 256", base_256(&value.to_be_bytes()[4..], 0)),
        15 => ("minus one", vec![0xff; len]),
        16 => ("negative", base_256(&(-5i32).to_be_bytes(), 0xff)),
        17 => ("of 40 bits", base_256(&[1, 2, 3, 4, 5], 0)),
        18 => ("of 63 bits and more", [&[0x80, 0x40][..], &vec![1; len - 2]].concat()),
        19 => ("2^32 - 1", base_256(&[0xff; 4], 0)),
        20 => ("2^32 + 7", base_256(&[1, 0, 0, 0, 7], 0)),
        _ => ("in hexadecimal", format!("0x{value:x}").into_bytes()),
    }
}

/// The header with its checksum in one of many forms, and the form's name.
fn sealed(random: &mut Random, block: Block) -> (String, Vec<u8>) {
    let (sum, signed) = block.sums();
    let (what, text) = match random.below(16) {
        0 => ("without an end", format!("{sum:08o}")),
        1 => ("of blanks and digits", format!("{sum:>6o}\0 ")),
        2 => ("ending in blank and NUL", format!("{sum:06o} \0")),
        3 => ("of signed bytes", format!("{signed:06o}\0 ")),
        4 => ("that is wrong", format!("{:06o}\0 ", sum + 1)),
        5 => ("of blanks", " ".repeat(8)),
        6 => ("of NULs", "\0".repeat(8)),
        7 => ("of one byte", "7\0".to_owned()),
        _ => return (String::new(), block.sealed()),
    };
    (format!(", a sum {what}"), block.sealed_as(text))
}
