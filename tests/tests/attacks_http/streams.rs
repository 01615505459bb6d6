//! Readers that do not read.

use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};

use super::*;

/// A connection from an address of this machine's own choice.
fn connect_from(source: Ipv4Addr, address: &str) -> Result<TcpStream> {
    let target: std::net::SocketAddrV4 = address.parse()?;
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(socket.as_raw_fd(), &SockaddrIn::from(std::net::SocketAddrV4::new(source, 0)))?;
    connect(socket.as_raw_fd(), &SockaddrIn::from(target))?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Asks for something long and reads nothing of it, not even the answer's head.
fn open_readers(address: &str, count: usize, path: &str, token: &str) -> Vec<TcpStream> {
    let reader = |_| {
        let mut stream = TcpStream::connect(address).ok()?;
        send(&mut stream, "GET", path, &[("Authorization", token)], b"").ok()?;
        Some(stream)
    };
    (0..count).filter_map(reader).collect()
}

/// Runs the attack with so many readers of a path whose answer holds the layer's tar.
fn besiege(count: usize, path: &dyn Fn(&[u8]) -> String, token_name: &str) -> Result<()> {
    allow_many_descriptors()?;
    let (mut site, address) = open_site("")?;
    let tar = load_noise(&site, "noise", 24 << 20)?;
    let (attacker, other) = (token(&site, token_name, "viewer", &[])?, token(&site, "other", "viewer", &[])?);
    let path = path(&tar);
    let watch = Watch::begin(site.coordinator())?;
    let readers = open_readers(&address, count, &path, &attacker);
    watch.check_answers()?;
    wait_for_renewals(&site, &watch.epoch)?;
    // Another viewer, from another address, is served meanwhile, whole and right.
    let mut stream = connect_from(Ipv4Addr::new(127, 0, 0, 2), &address)?;
    send(&mut stream, "GET", &path, &[("Authorization", &other)], b"")?;
    let (status, body) = receive(&mut stream)?;
    let is_part = body.windows(4096).any(|window| window == &tar[1 << 20..(1 << 20) + 4096]);
    assert_eq!((status, is_part, body.len() >= tar.len()), (200, true, true));
    watch.check(320 * MIB)?;
    // Whoever does not read is given up, and then there is room for the same token, too.
    wait_until("a place for the attacker's own token", PATIENCE * 2, || {
        let answer = ask(&address, "GET", &path, &[("Authorization", &attacker)], b"");
        Ok(answer.is_ok_and(|(status, _)| status == 200))
    })?;
    let threads = memory_threads(watch.pid)?;
    assert!(threads < 100, "{threads} threads");
    drop(readers);
    watch.check(320 * MIB)?;
    Ok(())
}

fn memory_threads(pid: u32) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/task"))?.count())
}

#[test]
fn mirror_readers_that_do_not_read_hold_little_and_not_for_long() {
    let path = |tar: &[u8]| format!("/v2/library/noise/blobs/{}", tests::images::digest_of(tar));
    besiege(600, &path, "mirror").unwrap();
}

#[test]
fn exports_that_are_not_read_hold_little_and_not_for_long() {
    besiege(560, &|_| "/v1/image/export?name=noise".to_owned(), "export").unwrap();
}

#[test]
fn lists_that_are_not_read_hold_little() {
    allow_many_descriptors().unwrap();
    let (mut site, address) = open_site("").unwrap();
    let viewer = token(&site, "viewer", "viewer", &[]).unwrap();
    // A long list, made of what is cheap: events.
    let admin = token(&site, "admin", "admin", &[]).unwrap();
    let images: Vec<String> = (0..1000).map(|n| format!("127.0.0.1:1/{}/{n}:1", "x".repeat(200))).collect();
    let body = serde_json::json!({"images": images, "priority": 0, "platform": null}).to_string();
    let headers = [("Authorization", admin.as_str()), ("Content-Type", "application/json")];
    let (status, answer) = ask(&address, "POST", "/v1/pulls", &headers, body.as_bytes()).unwrap();
    assert_eq!(status, 200, "{}", String::from_utf8_lossy(&answer));
    let watch = Watch::begin(site.coordinator()).unwrap();
    let readers = open_readers(&address, 500, "/v1/jobs", &viewer);
    watch.check(320 * MIB).unwrap();
    drop(readers);
}
