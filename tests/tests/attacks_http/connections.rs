//! Silent connections, and bodies that do not end.

use std::net::Shutdown;
use std::process::Command;

use tests::process::Process;
use tests::secured::Secured;

use super::*;

/// A coordinator with at most 1,024 descriptors, a limit that silent peers once exhausted.
struct Poor {
    process: Process,
    socket: PathBuf,
    // Dropped last: the process uses it.
    directory: tempfile::TempDir,
}

impl Poor {
    fn start(address: &str) -> Result<Poor> {
        let directory = tempfile::Builder::new().prefix("poor-").tempdir()?;
        std::fs::create_dir(directory.path().join("store"))?;
        let spec = SiteSpec { listen: Some(address.to_owned()), ..SiteSpec::default() };
        let spec = tests::site::coordinator_spec(directory.path(), "state", &spec)?;
        let plain = spec.command()?;
        let mut command = Command::new("prlimit");
        command.arg("--nofile=1024:1024").arg(plain.get_program()).args(plain.get_args());
        command.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let mut process = Process::spawn("coordinator", &mut command, &directory.path().join("log"))?;
        let socket = spec.socket();
        process.wait_ready(TIMEOUT, || Ok(UnixStream::connect(&socket).is_ok()))?;
        Ok(Poor { process, socket, directory })
    }

    fn beat(&self, epoch: &Value) -> Result<u64> {
        let name = format!("store/lease/{:016x}.beat", epoch.as_u64().context("no epoch")?);
        Ok(std::fs::read_to_string(self.directory.path().join(name))?.parse()?)
    }
}

#[test]
fn silent_connections_take_nothing_from_the_lease_and_the_administrator() {
    allow_many_descriptors().unwrap();
    let address = format!("127.0.0.1:{}", free_port().unwrap());
    let poor = Poor::start(&address).unwrap();
    let pid = poor.process.pid();
    let watch = Watch {
        epoch: status(&poor.socket).unwrap()["epoch"].clone(),
        resident: resident(pid).unwrap(),
        socket: poor.socket.clone(),
        pid,
    };
    let silent: Vec<TcpStream> = (0..1300).map(|_| TcpStream::connect(&address).unwrap()).collect();
    watch.check(64 * MIB).unwrap();
    // A client that sends a request is served, and the lease is still renewed.
    assert_eq!(ask(&address, "GET", "/v1/version", &[], b"").unwrap().0, 200);
    let first = poor.beat(&watch.epoch).unwrap();
    let renewed = || Ok(poor.beat(&watch.epoch)? >= first + 2);
    wait_until("two renewals of the lease", TIMEOUT, renewed).unwrap();
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    assert!(open < 700, "{open} of 1024 descriptors are in use");
    watch.check(64 * MIB).unwrap();
    drop(silent);
}

#[test]
fn silent_connections_end_by_themselves() {
    let (mut site, address) = open_site("").unwrap();
    let watch = Watch::begin(site.coordinator()).unwrap();
    // One peer sends nothing, one half a head, and one nothing after its first request.
    let mut peers: Vec<TcpStream> = (0..3).map(|_| TcpStream::connect(&address).unwrap()).collect();
    peers[1].write_all(b"GET /v1/version HTTP/1.1\r\nHost: loc").unwrap();
    peers[2].write_all(b"GET /v1/version HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    for peer in &mut peers {
        peer.set_read_timeout(Some(TIMEOUT)).unwrap();
        let mut rest = Vec::new();
        // The coordinator closes the connection within the read's timeout, in each of the three states.
        peer.read_to_end(&mut rest).unwrap();
    }
    watch.check(32 * MIB).unwrap();
}

/// Sends one more byte, and returns whether the coordinator has ended the connection.
fn has_ended(peer: &mut TcpStream) -> bool {
    let _ = peer.write(b"x");
    match peer.read(&mut [0; 1024]) {
        Ok(len) => len == 0,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    }
}

#[test]
fn heads_and_bodies_that_trickle_end_all_the_same() {
    let (mut site, address) = open_site("").unwrap();
    let host = token(&site, "host", "host", &[]).unwrap();
    let watch = Watch::begin(site.coordinator()).unwrap();
    let mut peers: Vec<TcpStream> = (0..2).map(|_| TcpStream::connect(&address).unwrap()).collect();
    peers[0].write_all(b"GET /v1/version HTTP/1.1\r\nHost: localhost\r\nX: ").unwrap();
    let head = format!(
        "POST /v1/pulls HTTP/1.1\r\nHost: localhost\r\nAuthorization: {host}\r\nContent-Type: application/json\r\n\
         Content-Length: 100000\r\n\r\n"
    );
    peers[1].write_all(head.as_bytes()).unwrap();
    peers.iter().for_each(|peer| peer.set_nonblocking(true).unwrap());
    // Each poll sends a byte, so that neither peer is silent for long.
    let all_ended = || {
        peers.retain_mut(|peer| !has_ended(peer));
        Ok(peers.is_empty())
    };
    wait_until("the end of both", TIMEOUT * 2, all_ended).unwrap();
    watch.check(32 * MIB).unwrap();
}

#[test]
fn silent_tls_peers_do_not_make_an_administrator_wait() {
    allow_many_descriptors().unwrap();
    let mut secured = Secured::start(&SiteSpec::default()).unwrap();
    let token = secured.token("admin", "admin", &[]).unwrap();
    let watch = Watch::begin(secured.site.coordinator()).unwrap();
    let address = secured.url().replace("https://", "");
    let silent: Vec<TcpStream> = (0..600).map(|_| TcpStream::connect(&address).unwrap()).collect();
    let ctl = secured.ctl(Some(&token));
    let timed = |_| {
        let start = Instant::now();
        ctl.ok(&["status"]).unwrap();
        start.elapsed()
    };
    let best = (0..5).map(timed).min().unwrap();
    assert!(best < Duration::from_secs(1), "an administrator waited {best:?} behind silent peers");
    watch.check(64 * MIB).unwrap();
    drop(silent);
}

/// Sends nearly all of a notification of 2 MB and leaves the request open. If the coordinator refuses it meanwhile, the rest is not sent.
fn leave_open(address: &str, headers: &[(&str, &str)]) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    let mut head = Head { first: "POST /v1/hooks/harbor HTTP/1.1".to_owned(), headers: Vec::new() };
    head.set("Host", "localhost");
    head.set("Content-Length", "2000000");
    head.set("Content-Type", "application/json");
    headers.iter().for_each(|(name, value)| head.set(name, value));
    stream.write_all(&head.bytes())?;
    let _ = stream.write_all(&vec![b' '; 1_990_000]);
    Ok(stream)
}

/// Leaves `count` such requests open at the same time.
fn leave_many_open(count: usize, address: &str, headers: &[(&str, &str)]) -> Result<Vec<TcpStream>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..count).map(|_| scope.spawn(|| leave_open(address, headers))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a sender crashed")).collect()
    })
}

#[test]
fn a_webhook_shows_its_secret_before_its_body_is_read() {
    allow_many_descriptors().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let secret = directory.path().join("secret");
    std::fs::write(&secret, "s3cret").unwrap();
    let with_secret = format!("webhook_secret_file = '{}'\n", secret.display());
    for settings in ["", with_secret.as_str()] {
        let (mut site, address) = open_site(settings).unwrap();
        let watch = Watch::begin(site.coordinator()).unwrap();
        let open: Vec<TcpStream> = leave_many_open(300, &address, &[]).unwrap();
        watch.check(64 * MIB).unwrap();
        // The refusal arrives although the body does not end.
        let mut stream = open.into_iter().next_back().unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        assert_eq!(receive(&mut stream).unwrap().0, 401);
        let refused = events(&site).unwrap().into_iter().filter(|(kind, _)| kind == "access.refused");
        let messages: Vec<String> = refused.map(|(_, message)| message).collect();
        assert_eq!(messages.len(), 1, "{messages:?}");
        assert!(messages[0].contains("127.0.0.1 was refused POST /v1/hooks/{kind}"), "{messages:?}");
    }
}

#[test]
fn bodies_of_those_who_are_known_have_a_budget_and_an_end() {
    allow_many_descriptors().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let secret = directory.path().join("secret");
    std::fs::write(&secret, "s3cret").unwrap();
    let (mut site, address) = open_site(&format!("webhook_secret_file = '{}'\n", secret.display())).unwrap();
    let watch = Watch::begin(site.coordinator()).unwrap();
    let shown = [("Authorization", "Bearer s3cret")];
    let open: Vec<TcpStream> = leave_many_open(100, &address, &shown).unwrap();
    watch.check(128 * MIB).unwrap();
    // Requests that found no room get 429. The others are told that they took too long.
    let statuses: Vec<u16> = open
        .into_iter()
        .map(|mut stream| {
            stream.set_read_timeout(Some(TIMEOUT)).unwrap();
            let status = receive(&mut stream).map_or(0, |(status, _)| status);
            let _ = stream.shutdown(Shutdown::Both);
            status
        })
        .collect();
    assert!(
        statuses.contains(&429) && statuses.iter().all(|status| [400, 408, 429, 0].contains(status)),
        "{statuses:?}"
    );
    // After that there is room again.
    let body = br#"{"type": "SCANNING_COMPLETED"}"#;
    let headers = [("Authorization", "Bearer s3cret"), ("Content-Type", "application/json")];
    assert_eq!(ask(&address, "POST", "/v1/hooks/harbor", &headers, body).unwrap().0, 200);
    watch.check(128 * MIB).unwrap();
}
