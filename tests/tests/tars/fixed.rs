//! Archives from practice, each with a name: from public reports, and as writers of all kinds produce them.
//!
//! `written/` has the output of real tools: GNU tar 1.34, bsdtar 3.6, busybox 1.35, Python 3.11, 7-Zip 16 and Perl
//! 5.36, for a small tree with everything in it. Writers that are not packaged for Debian are imitated header by
//! header.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};
use flate2::read::GzDecoder;

use crate::blocks::{Block, GID, MAGIC, MAGICS, MAJOR, MINOR, MODE, MTIME, SIZE, UID, end, long, padded, pax};
use crate::generate::Odd;

/// All fixed archives.
pub(crate) fn all() -> Result<Vec<Odd>> {
    let mut all = written()?;
    all.extend(reported());
    all.extend(imitated());
    Ok(all)
}

fn written() -> Result<Vec<Odd>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tars/written");
    let mut all = Vec::new();
    for file in std::fs::read_dir(&directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let path = file?.path();
        let mut tar = Vec::new();
        GzDecoder::new(std::fs::File::open(&path)?).read_to_end(&mut tar)?;
        all.push(Odd { what: format!("written/{}", path.file_name().unwrap_or_default().display()), tar });
    }
    all.sort_by(|one, other| one.what.cmp(&other.what));
    Ok(all)
}

fn odd(what: &str, parts: &[Vec<u8>]) -> Odd {
    Odd { what: what.to_owned(), tar: [&parts.concat()[..], &end()].concat() }
}

fn file(name: &str) -> Block {
    Block::new(b'0', name)
}

/// Archives from public reports.
fn reported() -> Vec<Odd> {
    let directory = |name: &str| Block::new(b'5', name);
    let after = || file("after").with("x\n");
    let blank = file("blank").put(UID, "").put(GID, "").put(MTIME, "").with("x\n");
    let blank_directory = directory("blankdir/").put(SIZE, "").sealed();
    let blank_link = Block::new(b'2', "blanklink").link("blank").put(SIZE, "").put(MODE, "").sealed();
    let root = directory("./").number(MODE, 0o700).number(UID, 1000).number(GID, 1000);
    let hidden = file("hidden").with("a file that Docker does not see");
    let nul = [(&b"SCHILY.xattr.user.a\0b"[..], &b"v"[..])];
    vec![
        odd("tar-rs #181: fields that are all NUL", &[blank, blank_directory, blank_link]),
        odd("a mode with a NUL before it", &[file("nul0").put(MODE, "\0 000644").with("x\n")]),
        odd("cpython #75738: type 0, a slash, content", &[file("notadir/").with("hello"), after()]),
        odd("a header in the content of such a file", &[file("dir/").with(hidden), after()]),
        odd("nydus #171: the root's entry", &[root.clone().sealed(), after()]),
        odd("the root's entry as a slash", &[root.put(crate::blocks::NAME, "/").sealed(), after()]),
        odd(
            "two PAX headers, of which the last one counts",
            &[pax(b'x', &[(b"path", b"one"), (b"uid", b"7")]), pax(b'x', &[(b"gid", b"8")]), after()],
        ),
        odd("PAX against GNU", &[pax(b'x', &[(b"path", b"pax")]), long(b'L', b"gnu"), after()]),
        odd("GNU against PAX", &[long(b'L', b"gnu"), pax(b'x', &[(b"path", b"pax")]), after()]),
        odd("a global header forgets what came before", &[long(b'L', b"gnu"), pax(b'g', &[]), after()]),
        odd("a path twice", &[after(), after()]),
        odd("a path twice, spelled otherwise", &[after(), file("./after").with("y")]),
        odd("a path twice, absolute", &[after(), file("/after").with("y")]),
        odd("a contiguous file", &[Block::new(b'7', "contiguous").with("x")]),
        odd("a NUL in an attribute's name", &[pax(b'x', &nul), after()]),
        odd("a sparse file's name without a version", &[pax(b'x', &[(b"GNU.sparse.name", b"sparse")]), after()]),
        odd("nothing at all", &[]),
        Odd { what: "no byte at all".to_owned(), tar: Vec::new() },
    ]
}

/// Archives as Go, Java, Node and others write them.
fn imitated() -> Vec<Odd> {
    // node-tar with `portable`: no owner, no time, and PAX headers with sizes of all kinds.
    let node = Block::new(b'0', "package/index.js").put(UID, "").put(GID, "").put(MODE, "000644 \0");
    let node = node.put(MTIME, "03560116604 ").put(MAJOR, "000000 \0").put(MINOR, "000000 \0");
    let node_pax = Block::new(b'x', "PaxHeader/package/long").put(MODE, "000644 \0").put(SIZE, "00000000022 ");
    let node_pax = [node_pax.sealed(), padded(b"18 path=node/long\n")].concat();
    // commons-compress: numbers that end with a space, a directory in the old format, base 256 for large owners.
    let java = file("java/App.class").put(MODE, "0100644\0").put(SIZE, "00000000005 ").put(MTIME, "13460413762 ");
    let java_directory = Block::new(0, "java/").put(MODE, "0040755\0").put(MAGIC, MAGICS[2]);
    let large = file("java/large").put(MAGIC, MAGICS[1]).put(UID, [0x80, 0, 0, 0, 0xb2, 0xd0, 0x5e, 0]);
    // Go: ustar where possible, GNU with base 256, PAX with a special name.
    let go = [
        Block::new(b'x', "PaxHeaders.0/go")
            .put(MAGIC, MAGICS[0])
            .number(MODE, 0)
            .with(b"30 mtime=1350244992.02396011\n\n"),
        file("go/file").with("go\n"),
    ];
    let go_pax =
        pax(b'x', &[(b"mtime", b"1350244992.02396011"), (b"atime", b"1350244992.02"), (b"path", b"go/\xc3\xa9")]);
    // star: a trailer of its own, and times where others have a prefix.
    let star = Block::new(b'0', "file").put(crate::blocks::PREFIX, "star").put(crate::blocks::TRAILER, "tar\0");
    vec![
        odd("node-tar", &[node.with("module\n"), node_pax, file("short").with("x")]),
        odd(
            "commons-compress",
            &[java_directory.sealed(), [java.sealed(), padded(b"class")].concat(), large.with("x")],
        ),
        odd("Go with a record that is too short", &go),
        odd("Go", &[go_pax, file("go/plain").with("go\n")]),
        odd("star", &[star.with("star\n")]),
        odd(
            "v7 with a device, which that has no numbers for",
            &[Block::new(b'3', "null").put(MAGIC, MAGICS[2]).number(MAJOR, 1).sealed()],
        ),
    ]
}
