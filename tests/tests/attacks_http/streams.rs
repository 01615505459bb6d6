//! Clients that do not read the answers to their requests.

use super::*;

/// Requests something long and reads nothing of it, not even the answer's head.
fn open_readers(address: &str, count: usize, path: &str, token: &str) -> Vec<TcpStream> {
    let reader = |_| {
        let mut stream = TcpStream::connect(address).ok()?;
        send(&mut stream, "GET", path, &[("Authorization", token)], b"").ok()?;
        Some(stream)
    };
    (0..count).filter_map(reader).collect()
}

/// A layer whose index is nearly as large as the layer, because all its extended attributes are different.
fn of_attributes() -> Result<Vec<u8>> {
    let mut tar = Archive::new(Vec::new());
    for number in 0..400 {
        let header = Header::new(Kind::File, format!("{number}")).mode(0o644);
        tar.add(&header.xattr("user.noise", oddities::noise(number, 60_000)), "")?;
    }
    Ok(tar.finish()?)
}

/// Runs the attack on a layer of noise.
fn besiege(count: usize, path: &dyn Fn(&[u8]) -> String, token_name: &str) -> Result<()> {
    let load = |site: &Site| load_noise(site, "noise", 24 << 20);
    besiege_with(&load, count, path, token_name)
}

/// Runs the attack with `count` readers of a path whose answer contains the layer's tar.
fn besiege_with(
    load: &dyn Fn(&Site) -> Result<Vec<u8>>,
    count: usize,
    path: &dyn Fn(&[u8]) -> String,
    token_name: &str,
) -> Result<()> {
    allow_many_descriptors()?;
    let (mut site, address) = open_site("")?;
    let tar = load(&site)?;
    let (attacker, other) = (token(&site, token_name, "viewer", &[])?, token(&site, "other", "viewer", &[])?);
    let path = path(&tar);
    let watch = Watch::begin(site.coordinator())?;
    let readers = open_readers(&address, count, &path, &attacker);
    watch.check_answers()?;
    wait_for_renewals(&site, &watch.epoch)?;
    // Another viewer, from another address, is served meanwhile, with complete and correct content.
    let mut stream = connect_from(Ipv4Addr::new(127, 0, 0, 2), &address)?;
    send(&mut stream, "GET", &path, &[("Authorization", &other)], b"")?;
    let (status, body) = receive(&mut stream)?;
    let is_part = body.windows(4096).any(|window| window == &tar[1 << 20..(1 << 20) + 4096]);
    assert_eq!((status, is_part, body.len() >= tar.len()), (200, true, true));
    watch.check(320 * MIB)?;
    // Readers that do not read are disconnected after a while. Then the same token gets room again.
    wait_until("a place for the attacker's own token", TIMEOUT * 2, || {
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

/// An index is in memory once, however many streams need it, and counts against the memory limit of all streams.
#[test]
fn readers_of_a_layer_with_a_large_index_hold_little_and_not_for_long() {
    let path = |tar: &[u8]| format!("/v2/library/noise/blobs/{}", tests::images::digest_of(tar));
    let load = |site: &Site| load_tar(site, "noise", of_attributes()?);
    besiege_with(&load, 600, &path, "mirror").unwrap();
    besiege_with(&load, 600, &|_| "/v1/image/export?name=noise".to_owned(), "export").unwrap();
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
    // A long list whose entries are cheap to make: jobs.
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

#[test]
fn long_lists_come_in_pages_and_cachefsctl_puts_them_together() {
    const JOBS: usize = 9000;
    let (mut site, address) = open_site("").unwrap();
    let (viewer, admin) =
        (token(&site, "viewer", "viewer", &[]).unwrap(), token(&site, "admin", "admin", &[]).unwrap());
    let some = token(&site, "some", "viewer", &["--images", "127.0.0.1:1/r3/**"]).unwrap();
    for round in 0..JOBS / 1000 {
        let images: Vec<String> =
            (0..1000).map(|n| format!("127.0.0.1:1/r{round}/{}/{n}:1", "x".repeat(200))).collect();
        let body = serde_json::json!({"images": images, "priority": 0, "platform": null}).to_string();
        let headers = [("Authorization", admin.as_str()), ("Content-Type", "application/json")];
        let (status, answer) = ask(&address, "POST", "/v1/pulls", &headers, body.as_bytes()).unwrap();
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&answer));
    }
    let watch = Watch::begin(site.coordinator()).unwrap();
    let page = |token: &str, query: &str| {
        let (status, body) =
            ask(&address, "GET", &format!("/v1/jobs{query}"), &[("Authorization", token)], b"").unwrap();
        assert_eq!(status, 200);
        let list: Value = serde_json::from_slice(&body).unwrap();
        let jobs: Vec<u64> = list["jobs"].as_array().unwrap().iter().map(|job| job["id"].as_u64().unwrap()).collect();
        (jobs, list["continue"].as_str().map(str::to_owned), body.len())
    };
    // A client that does not use pages gets the newest jobs, in an answer of bounded length.
    let (jobs, next, len) = page(&viewer, "");
    assert!(next.is_some() && (1000..JOBS).contains(&jobs.len()) && len < 3 << 20, "{} jobs, {len} bytes", jobs.len());
    assert_eq!(jobs[0] as usize, JOBS);
    let walk = |token: &str| {
        let (mut jobs, mut next, _) = page(token, "?limit=700");
        while let Some(cursor) = next {
            let (more, after, _) = page(token, &format!("?limit=700&continue={cursor}"));
            assert!(more.len() <= 700);
            jobs.extend(more);
            next = after;
        }
        jobs
    };
    // Meanwhile finished jobs beyond a thousand are forgotten.
    let all = walk(&viewer);
    assert!(all.len() > 1000 && all.windows(2).all(|two| two[0] > two[1]), "{}", all.len());
    let few = walk(&some);
    assert!(few.iter().all(|id| (3001..=4000).contains(id)), "{few:?}");
    let refused = ask(&address, "GET", "/v1/jobs?continue=x", &[("Authorization", &viewer)], b"").unwrap();
    assert_eq!(refused.0, 400);
    let listed = site.ctl().json(&["jobs"]).unwrap();
    assert!(listed["jobs"].as_array().unwrap().len() > 1000 && listed["continue"].is_null());
    let readers = open_readers(&address, 500, "/v1/jobs", &viewer);
    watch.check(320 * MIB).unwrap();
    drop(readers);
}

/// A connection with a small receive buffer.
fn narrow(address: &str) -> Result<TcpStream> {
    let target: std::net::SocketAddrV4 = address.parse()?;
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, RcvBuf, &4096)?;
    connect(socket.as_raw_fd(), &SockaddrIn::from(target))?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(TIMEOUT))?;
    Ok(stream)
}

#[test]
fn readers_that_trickle_keep_their_place_for_a_minute_only() {
    let (mut site, address) = open_site("").unwrap();
    let tar = load_noise(&site, "noise", 24 << 20).unwrap();
    let viewer = token(&site, "viewer", "viewer", &[]).unwrap();
    let path = format!("/v2/library/noise/blobs/{}", tests::images::digest_of(&tar));
    let watch = Watch::begin(site.coordinator()).unwrap();
    let descriptors = || Ok::<_, anyhow::Error>(std::fs::read_dir(format!("/proc/{}/fd", watch.pid))?.count());
    let before = descriptors().unwrap();
    let mut readers: Vec<TcpStream> = (0..10).map(|_| narrow(&address).unwrap()).collect();
    for reader in &mut readers {
        send(reader, "GET", &path, &[("Authorization", &viewer)], b"").unwrap();
    }
    let open = || Ok(descriptors()? >= before + 10);
    wait_until("the readers to be served", TIMEOUT, open).unwrap();
    // Each poll reads a few bytes from every reader. They are not silent, but too slow to keep their places.
    let given_up = || {
        readers.iter_mut().for_each(|reader| drop(reader.read(&mut [0; 16])));
        Ok(descriptors()? < before + 5)
    };
    wait_until("the readers to be given up", TIMEOUT * 2, given_up).unwrap();
    watch.check(128 * MIB).unwrap();
}
