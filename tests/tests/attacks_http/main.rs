//! Attacks on the coordinator's HTTP API, each run on a small scale against the real program.
//!
//! Every attack ends with the same check ([`Watch::check`]): an administrator on the unix socket is answered within a
//! second, the coordinator's memory has not grown beyond a stated bound, and the epoch is the same as before, so the
//! lease was never lost.

use std::io::{BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::sockopt::RcvBuf;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket};
use serde_json::Value;
use tests::cluster::Coordinator;
use tests::http::Head;
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{Compression, ImageBuilder, Pools, oddities};
use tests::process::{TIMEOUT, forget_peak, peak, resident, wait_until};
use tests::registry::free_port;
use tests::site::{Site, SiteSpec};

mod browsers;
mod connections;
mod hosts;
mod restricted;
mod streams;

const MIB: u64 = 1 << 20;

/// Status and body of an answer.
type Answer = (u16, Vec<u8>);

/// Sends a request with these headers besides the usual ones, and a body.
fn send(stream: &mut impl Write, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<()> {
    let mut head = Head { first: format!("{method} {path} HTTP/1.1"), headers: Vec::new() };
    head.set("Host", "localhost");
    head.set("Connection", "close");
    head.set("Content-Length", &body.len().to_string());
    headers.iter().for_each(|(name, value)| head.set(name, value));
    stream.write_all(&head.bytes())?;
    Ok(stream.write_all(body)?)
}

/// Reads a whole answer.
fn receive(stream: impl Read) -> Result<Answer> {
    let mut reader = BufReader::new(stream);
    let head = Head::read(&mut reader)?.context("the connection was closed without an answer")?;
    let mut body = Vec::new();
    match head.header("Content-Length") {
        Some(length) => reader.take(length.parse()?).read_to_end(&mut body)?,
        None => reader.read_to_end(&mut body)?,
    };
    Ok((head.word(1).parse()?, body))
}

/// Connects to `address` from the loopback address `source`.
fn connect_from(source: Ipv4Addr, address: &str) -> Result<TcpStream> {
    let target: std::net::SocketAddrV4 = address.parse()?;
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(socket.as_raw_fd(), &SockaddrIn::from(std::net::SocketAddrV4::new(source, 0)))?;
    connect(socket.as_raw_fd(), &SockaddrIn::from(target))?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(TIMEOUT))?;
    Ok(stream)
}

/// One request over TCP.
fn ask(address: &str, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Answer> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    send(&mut stream, method, path, headers, body)?;
    receive(stream)
}

/// One request over the unix socket.
fn ask_locally(socket: &Path, path: &str) -> Result<Answer> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    send(&mut stream, "GET", path, &[], b"")?;
    receive(stream)
}

/// The state of a coordinator before an attack.
struct Watch {
    socket: PathBuf,
    pid: u32,
    epoch: Value,
    resident: u64,
}

impl Watch {
    /// Records the coordinator's state and resets its memory peak.
    fn begin(coordinator: &mut Coordinator) -> Result<Watch> {
        let (socket, pid) = (coordinator.socket(), coordinator.process().pid());
        forget_peak(pid)?;
        Ok(Watch { epoch: status(&socket)?["epoch"].clone(), resident: resident(pid)?, socket, pid })
    }

    /// Checks that an administrator is answered within a second. The best of three attempts counts, because other tests run in parallel.
    fn check_answers(&self) -> Result<()> {
        let mut best = Duration::MAX;
        for _ in 0..3 {
            let start = Instant::now();
            let found = status(&self.socket)?;
            best = best.min(start.elapsed());
            ensure!(found["epoch"] == self.epoch && found["role"] == "leader", "the lease was lost: {found}");
        }
        ensure!(best < Duration::from_secs(1), "an administrator waited {best:?}");
        Ok(())
    }

    /// Checks the answers, and that the memory was never more than `growth` bytes above its value at the start.
    fn check(&self, growth: u64) -> Result<()> {
        self.check_answers()?;
        let grown = peak(self.pid)?.saturating_sub(self.resident);
        ensure!(grown < growth, "the coordinator's memory grew by {} MiB", grown / MIB);
        Ok(())
    }
}

fn status(socket: &Path) -> Result<Value> {
    let (code, body) = ask_locally(socket, "/v1/status")?;
    ensure!(code == 200, "{code}: {}", String::from_utf8_lossy(&body));
    Ok(serde_json::from_slice(&body)?)
}

/// The kinds and messages of all events.
fn events(site: &Site) -> Result<Vec<(String, String)>> {
    let list = site.ctl().json(&["events", "--since", "0", "-n", "1000"])?;
    let text = |event: &Value, name: &str| event[name].as_str().unwrap_or_default().to_owned();
    let events = list["events"].as_array().context("no events")?;
    Ok(events.iter().map(|event| (text(event, "kind"), text(event, "message"))).collect())
}

/// A site that listens on the loopback over plain HTTP, and its address. Tokens are valid there too.
fn open_site(settings: &str) -> Result<(Site, String)> {
    let address = format!("127.0.0.1:{}", free_port()?);
    let spec = SiteSpec { listen: Some(address.clone()), settings: settings.to_owned(), ..SiteSpec::default() };
    Ok((Site::start_with(&spec)?, address))
}

/// Creates a token and returns the header value that sends it.
fn token(site: &Site, name: &str, role: &str, more: &[&str]) -> Result<String> {
    let created = site.ctl().json(&[&["token", "create", name, "--role", role], more].concat())?;
    Ok(format!("Bearer {}", created["token"].as_str().context("no token was made")?))
}

/// Loads an image with one layer, which holds a file of noise, into the store.
fn load_noise(site: &Site, name: &str, size: usize) -> Result<Vec<u8>> {
    let mut tar = Archive::new(Vec::new());
    tar.add(&Header::new(Kind::File, "noise"), oddities::noise(7, size))?;
    load_tar(site, name, tar.finish()?)
}

/// Loads an image with this one layer into the store and returns the layer.
fn load_tar(site: &Site, name: &str, tar: Vec<u8>) -> Result<Vec<u8>> {
    let directory = tempfile::tempdir()?;
    let pools = Pools::open(directory.path())?;
    let image = ImageBuilder::new(name).layer(pools.layer(&tar, Compression::None)?);
    let image = image.build(&pools, &directory.path().join(name))?;
    tests::hosts::load(site, &image)?;
    Ok(tar)
}

/// Raises the limit on open files of the test process, which plays many peers.
fn allow_many_descriptors() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

/// Waits until the leader has renewed its lease twice.
fn wait_for_renewals(site: &Site, epoch: &Value) -> Result<()> {
    let beat = site.store().join("lease").join(format!("{:016x}.beat", epoch.as_u64().context("no epoch")?));
    let read = || Ok::<_, anyhow::Error>(std::fs::read_to_string(&beat)?.parse::<u64>()?);
    let first = read()?;
    wait_until("two renewals of the lease", TIMEOUT, || Ok(read()? >= first + 2))
}
