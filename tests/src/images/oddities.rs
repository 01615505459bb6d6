//! Layers that hold everything a tar can hold: what real images have now and then, all at once.
//!
//! All names lie below `odd/`, so that the layers go on top of any image. They are meant in this order:
//! [`lower`], [`attributes`], [`changes`], [`repeated`], [`huge`]. Bounds of this collection: dockerd 20.10
//! refuses a tar that names one path twice, so none does.

use std::io::{self, Read, Write};

use anyhow::Result;

use super::archive::{Archive, Header, Kind};

/// Size of the one file of [`huge`].
pub const HUGE_SIZE: u64 = 2 << 30;

/// File capability `cap_net_raw=ep`, as the kernel stores it (revision 2).
pub const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// A tar in memory.
type Tar = Archive<Vec<u8>>;

fn directory(tar: &mut Tar, path: &str) -> io::Result<()> {
    tar.add(&Header::new(Kind::Directory, path), "")
}

fn file(tar: &mut Tar, path: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> io::Result<()> {
    tar.add(&Header::new(Kind::File, path), content)
}

/// Bytes that do not compress well, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// What later layers delete, hide, replace and repeat.
pub fn lower() -> Result<Vec<u8>> {
    let mut tar = Tar::new(Vec::new());
    for path in ["odd/", "odd/removed/", "odd/removed/inner/", "odd/opaque/", "odd/opaque/kept/", "odd/replaced/"] {
        directory(&mut tar, path)?;
    }
    file(&mut tar, "odd/removed/inner/file", "deleted with its directory\n")?;
    file(&mut tar, "odd/opaque/hidden", "hidden by an opaque directory\n")?;
    file(&mut tar, "odd/opaque/kept/below", "hidden, though the directory comes back\n")?;
    file(&mut tar, "odd/replaced/file", "this directory becomes a file\n")?;
    file(&mut tar, "odd/becomes-directory", "this file becomes a directory\n")?;
    file(&mut tar, "odd/becomes-link", "this file becomes a link\n")?;
    file(&mut tar, "odd/deleted", "deleted\n")?;
    file(&mut tar, [b"odd/", &[b'w'; 251][..]].concat(), "deleted; its whiteout's name has 255 bytes\n")?;
    file(&mut tar, "odd/rewritten", "first version\n")?;
    file(&mut tar, "odd/mode-changes", noise(1, 70_000))?;
    file(&mut tar, "odd/linked-below", "two names, one of which goes\n")?;
    tar.add(&Header::new(Kind::HardLink, "odd/linked-twin").link("odd/linked-below"), "")?;
    tar.add(&Header::new(Kind::Directory, "odd/mtime-kept/").mtime(1_111_111_111, 111), "")?;
    file(&mut tar, "odd/mtime-kept/gone", "")?;
    Ok(tar.finish()?)
}

/// Every attribute at its edges.
pub fn attributes() -> Result<Vec<u8>> {
    let mut tar = Tar::new(Vec::new());
    tar.add(&Header::new(Kind::Global, "pax_global_header").record("comment", "0123456789abcdef"), "")?;
    directory(&mut tar, "./odd/")?;
    modes(&mut tar)?;
    times(&mut tar)?;
    names(&mut tar)?;
    links(&mut tar)?;
    devices(&mut tar)?;
    xattrs(&mut tar)?;
    contents(&mut tar)?;
    Ok(tar.finish()?)
}

fn modes(tar: &mut Tar) -> io::Result<()> {
    directory(tar, "odd/modes/")?;
    for mode in [0o4755, 0o2755, 0o6711, 0o1644, 0o7777, 0o000, 0o400, 0o777] {
        tar.add(&Header::new(Kind::File, format!("odd/modes/file-{mode:04o}")).mode(mode), "x")?;
        tar.add(&Header::new(Kind::Directory, format!("odd/modes/dir-{mode:04o}/")).mode(mode), "")?;
    }
    for (uid, gid) in [(1000, 1000), (65534, 65534), (0, 2_097_152), (3_000_000_000, 4_294_967_294)] {
        tar.add(&Header::new(Kind::File, format!("odd/modes/owner-{uid}-{gid}")).owner(uid, gid).mode(0o4755), "x")?;
    }
    tar.add(&Header::new(Kind::Symlink, "odd/modes/link").owner(1000, 1001).mode(0o777).link("file-0777"), "")
}

fn times(tar: &mut Tar) -> io::Result<()> {
    directory(tar, "odd/times/")?;
    let times = [(0, 0), (1, 1), (473_385_600, 0), (1_600_000_000, 123_456_789), (1_600_000_000, 999_999_999)];
    for (seconds, nanoseconds) in times.into_iter().chain([(2_147_483_648, 0), (4_102_444_800, 500_000_000)]) {
        let name = format!("odd/times/{seconds}.{nanoseconds:09}");
        tar.add(&Header::new(Kind::File, &name).mtime(seconds, nanoseconds), "")?;
        tar.add(&Header::new(Kind::Directory, format!("{name}.d/")).mtime(seconds, nanoseconds), "")?;
        tar.add(&Header::new(Kind::Symlink, format!("{name}.l")).mtime(seconds, nanoseconds).link("x"), "")?;
    }
    Ok(())
}

fn names(tar: &mut Tar) -> io::Result<()> {
    directory(tar, "odd/names/")?;
    file(tar, b"odd/names/latin-\xe9\xff", "not UTF-8\n")?;
    tar.add(&Header::new(Kind::Directory, b"odd/names/\xc3\x28-dir/"), "")?;
    file(tar, b"odd/names/\xc3\x28-dir/\x80", "")?;
    file(tar, [b"odd/names/", &[b'n'; 255][..]].concat(), "a name of 255 bytes\n")?;
    file(tar, [b"odd/names/", &[0xfe; 255][..]].concat(), "255 bytes that are not UTF-8\n")?;
    let gnu = [b"odd/names/", &[b'g'; 200][..]].concat();
    tar.add(&Header::new(Kind::File, gnu).gnu_names(), "a long name in GNU's way\n")?;
    for name in [
        "new\nline",
        " space ",
        "tab\t",
        "back\\slash",
        "quote\"'",
        "*?[x]",
        "-rf",
        "...",
        "comma,colon:x",
        "snow\u{2603}man",
        "\u{1}control",
        ".wh",
        "wh.",
        "x.wh.y",
    ] {
        file(tar, format!("odd/names/{name}"), name)?;
    }
    file(tar, "/odd/names/absolute", "named with a leading slash\n")?;
    file(tar, "./odd/names/dotted", "named with a leading dot\n")?;
    file(tar, "odd/implied/parents/are/missing", "its directories are not in the tar\n")?;
    deep(tar)
}

/// 24 directories of 90 bytes each: a path of more than 2,000 bytes.
fn deep(tar: &mut Tar) -> io::Result<()> {
    let mut path = "odd/deep/".to_owned();
    directory(tar, &path)?;
    for level in 0..24 {
        path.push_str(&format!("{level:02}-{}/", "d".repeat(87)));
        directory(tar, &path)?;
    }
    file(tar, format!("{path}bottom"), "at the bottom\n")
}

fn links(tar: &mut Tar) -> io::Result<()> {
    for path in ["odd/links/", "odd/links/a/", "odd/links/b/"] {
        directory(tar, path)?;
    }
    file(tar, "odd/links/a/first", noise(2, 5000))?;
    for name in ["odd/links/b/second", "odd/links/third", "odd/links/a/fourth"] {
        tar.add(&Header::new(Kind::HardLink, name).link("odd/links/a/first"), "")?;
    }
    let long = format!("odd/links/a/{}", "h".repeat(200));
    file(tar, &long, "")?;
    tar.add(&Header::new(Kind::HardLink, "odd/links/b/of-long").link(&long), "")?;
    tar.add(&Header::new(Kind::Symlink, "odd/links/a/symbolic").link("../b/second"), "")?;
    tar.add(&Header::new(Kind::HardLink, "odd/links/b/of-symbolic").link("odd/links/a/symbolic"), "")?;
    let targets: [(&str, Vec<u8>); 7] = [
        ("relative", b"a/first".to_vec()),
        ("absolute", b"/odd/links/third".to_vec()),
        ("outside", b"../../../../../../etc/hostname".to_vec()),
        ("dangling", b"no/such/file".to_vec()),
        ("loop", b"loop".to_vec()),
        ("bytes", b"\xff\xfe".to_vec()),
        ("long", [b'l'; 4000].to_vec()),
    ];
    for (name, target) in targets {
        tar.add(&Header::new(Kind::Symlink, format!("odd/links/{name}")).mode(0o777).link(target), "")?;
    }
    Ok(())
}

fn devices(tar: &mut Tar) -> io::Result<()> {
    directory(tar, "odd/devices/")?;
    tar.add(&Header::new(Kind::CharDevice, "odd/devices/null").mode(0o666).device(1, 3), "")?;
    tar.add(&Header::new(Kind::CharDevice, "odd/devices/large").mode(0o600).device(1234, 567_890), "")?;
    tar.add(&Header::new(Kind::BlockDevice, "odd/devices/loop").mode(0o660).owner(0, 6).device(7, 5), "")?;
    tar.add(&Header::new(Kind::Fifo, "odd/devices/fifo").mode(0o622).mtime(1_234_567_890, 42), "")
}

fn xattrs(tar: &mut Tar) -> io::Result<()> {
    directory(tar, "odd/xattrs/")?;
    let with = |name: &str| Header::new(Kind::File, format!("odd/xattrs/{name}"));
    tar.add(&with("capability").mode(0o755).xattr("security.capability", CAPABILITY), "#!/bin/sh\n")?;
    tar.add(&with("user").xattr("user.colour", "red").xattr("user.empty", ""), "x")?;
    tar.add(&with("binary").xattr("user.binary", b"\0\n=\xff\0"), "x")?;
    tar.add(&with("large").xattr("user.large", noise(3, 2000)), "x")?;
    let directory = Header::new(Kind::Directory, "odd/xattrs/directory/");
    tar.add(&directory.xattr("user.of", "a directory").mtime(1_500_000_000, 7), "")
}

fn contents(tar: &mut Tar) -> io::Result<()> {
    directory(tar, "odd/contents/")?;
    file(tar, "odd/contents/empty", "")?;
    for size in [1, 511, 512, 513, 4095, 4096, 4097, 65_536, 131_073, 1_100_000] {
        file(tar, format!("odd/contents/noise-{size}"), noise(size, usize::try_from(size).unwrap_or(0)))?;
    }
    let mut zeros = vec![0; 3 << 20];
    file(tar, "odd/contents/zeros", &zeros)?;
    zeros[1_500_000..1_500_004].copy_from_slice(b"data");
    file(tar, "odd/contents/zeros-but-four", &zeros)?;
    file(tar, "odd/contents/text", "the same line again and again\n".repeat(20_000))
}

/// What a Dockerfile's later steps do to [`lower`] and [`attributes`]: delete, hide, replace, rewrite.
pub fn changes() -> Result<Vec<u8>> {
    let mut tar = Tar::new(Vec::new());
    directory(&mut tar, "odd/")?;
    for name in ["removed", "deleted", "linked-twin", "never-was"] {
        file(&mut tar, format!("odd/.wh.{name}"), "")?;
    }
    file(&mut tar, [b"odd/.wh.", &[b'w'; 251][..]].concat(), "")?;
    file(&mut tar, "odd/names/.wh.-rf", "")?;
    file(&mut tar, b"odd/names/.wh.latin-\xe9\xff", "")?;
    directory(&mut tar, "odd/opaque/")?;
    file(&mut tar, "odd/opaque/.wh..wh..opq", "")?;
    directory(&mut tar, "odd/opaque/kept/")?;
    file(&mut tar, "odd/opaque/kept/new", "only this is seen\n")?;
    tar.add(&Header::new(Kind::Directory, "odd/modes/dir-0777/").mode(0o3711).owner(5, 6), "")?;
    file(&mut tar, "odd/replaced", "now a file\n")?;
    directory(&mut tar, "odd/becomes-directory/")?;
    file(&mut tar, "odd/becomes-directory/file", "now a directory\n")?;
    tar.add(&Header::new(Kind::Symlink, "odd/becomes-link").link("rewritten"), "")?;
    file(&mut tar, "odd/rewritten", "second version, longer\n")?;
    tar.add(&Header::new(Kind::File, "odd/mode-changes").mode(0o755), noise(1, 70_000))?;
    tar.add(&Header::new(Kind::Directory, "odd/mtime-kept/").mtime(1_222_222_222, 222_222_222), "")?;
    file(&mut tar, "odd/mtime-kept/.wh.gone", "")?;
    directory(&mut tar, "odd/emptied/")?;
    file(&mut tar, "odd/emptied/.wh..wh..opq", "")?;
    Ok(tar.finish()?)
}

/// Content of the other layers once more under other names: it ought to cost nothing.
pub fn repeated() -> Result<Vec<u8>> {
    let mut tar = Tar::new(Vec::new());
    directory(&mut tar, "odd/repeated/")?;
    for size in [4097, 65_536, 131_073, 1_100_000] {
        let content = noise(size, usize::try_from(size)?);
        file(&mut tar, format!("odd/repeated/one-{size}"), &content)?;
        file(&mut tar, format!("odd/repeated/two-{size}"), &content)?;
    }
    Ok(tar.finish()?)
}

/// One file of 2 GiB: zeros with a few bytes of data at its start, its middle, its end, and a MiB of noise.
pub fn huge(out: &mut impl Write) -> Result<()> {
    let mut tar = Archive::new(out);
    tar.add(&Header::new(Kind::Directory, "odd/"), "")?;
    let mid = HUGE_SIZE / 2;
    let noise = noise(4, 1 << 20);
    let zeros = |length: u64| io::repeat(0).take(length);
    let before_noise = mid + 7 - 5;
    let after_noise = HUGE_SIZE - 4 - (mid + 7) - noise.len() as u64;
    let content =
        (&b"start"[..]).chain(zeros(before_noise)).chain(&noise[..]).chain(zeros(after_noise)).chain(&b"end\n"[..]);
    tar.stream(&Header::new(Kind::File, "odd/huge").mtime(1_700_000_000, 1), HUGE_SIZE, content)?;
    tar.finish()?;
    Ok(())
}
