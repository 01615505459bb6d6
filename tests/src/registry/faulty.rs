//! A proxy in front of a registry that causes the faults that it is told to cause, and records every request.

use std::collections::VecDeque;
use std::io::{BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::Linger;

use crate::http::Head;
use crate::process::wait_until;
use crate::registry::acceptor::Acceptor;

/// Which requests a fault applies to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Match {
    /// Every request.
    All,
    /// Every GET of a blob.
    Blobs,
    /// GET of the blob with this digest.
    Blob(String),
    /// GET or HEAD of any manifest.
    Manifests,
    /// Every request whose path holds this text.
    Path(String),
}

impl Match {
    fn hits(&self, request: &Request) -> bool {
        let read = request.method == "GET";
        match self {
            Self::All => true,
            Self::Blobs => read && request.path.contains("/blobs/sha256:"),
            Self::Blob(digest) => read && request.path.ends_with(&format!("/blobs/{digest}")),
            Self::Manifests => request.path.contains("/manifests/"),
            Self::Path(text) => request.path.contains(text),
        }
    }
}

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The connection is closed in an orderly way after exactly this many bytes of the body.
    Truncate(u64),
    /// The connection is reset after at most this many bytes of the body. With 0 it is reset before any answer.
    Reset(u64),
    /// The byte of the body at this offset is inverted. The offset counts from the start of the body, also in a partial answer.
    Corrupt(u64),
    /// Like `Corrupt`, but nothing is answered before a request has arrived that the other part matches.
    CorruptAfter(u64, Box<Match>),
    /// The registry is not contacted. The answer has this status and these headers.
    Status(u16, Vec<(String, String)>),
    /// The registry is not contacted. The answer is 200 with a body of this media type.
    Answer(String, Vec<u8>),
    /// The Range header is not forwarded, so the whole blob arrives with 200.
    IgnoreRange,
    /// After this many bytes of the body no more are sent, and the connection stays open.
    Hang(u64),
    /// The body is sent slowly: this many bytes, then this pause, and so on.
    Slow(u64, Duration),
}

/// A request as it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The method.
    pub method: String,
    /// The path with its query.
    pub path: String,
    /// The Range header.
    pub range: Option<String>,
    /// The Authorization header.
    pub authorization: Option<String>,
    /// The fault that was applied to it.
    pub fault: Option<Fault>,
}

/// A registry that fails on demand. Rules are tried in the order in which they were added.
#[derive(Debug)]
pub struct FaultyRegistry {
    acceptor: Acceptor,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    upstream: String,
    ending: AtomicBool,
    /// Guards the rules and the recorded requests together, so that a rule for one request applies to exactly one.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    rules: VecDeque<Rule>,
    requests: Vec<Request>,
    open: usize,
    most_open: usize,
}

#[derive(Debug)]
struct Rule {
    matches: Match,
    fault: Fault,
    left: usize,
}

impl FaultyRegistry {
    /// Starts a proxy to the plain HTTP registry at `upstream` (`host:port`).
    pub fn start(upstream: &str) -> Result<Self> {
        let shared =
            Arc::new(Shared { upstream: upstream.to_owned(), ending: AtomicBool::new(false), state: Mutex::default() });
        let serving = Arc::clone(&shared);
        let acceptor = Acceptor::start("the faulty registry", move |stream| {
            serving.count(1);
            let _ = serving.serve(stream);
            serving.count(-1);
        })?;
        Ok(Self { acceptor, shared })
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.acceptor.port())
    }

    /// The reference of an image through this proxy.
    pub fn reference(&self, name: &str, tag: &str) -> String {
        format!("{}/{name}:{tag}", self.address())
    }

    /// Applies `fault` to the next `times` requests that `matches` selects.
    pub fn inject(&self, matches: Match, fault: Fault, times: usize) {
        self.shared.state().rules.push_back(Rule { matches, fault, left: times });
    }

    /// Removes all rules. Connections that hang are reset.
    pub fn heal(&self) {
        self.shared.state().rules.clear();
    }

    /// Removes the rules that slow bodies down. Other faults stay.
    pub fn hurry(&self) {
        self.shared.state().rules.retain(|rule| !matches!(rule.fault, Fault::Slow(..)));
    }

    /// Every request so far, oldest first.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.state().requests.clone()
    }

    /// How many requests so far `matches` selects.
    pub fn count(&self, matches: &Match) -> usize {
        self.shared.state().requests.iter().filter(|request| matches.hits(request)).count()
    }

    /// The largest number of connections that were open at the same time.
    pub fn most_connections(&self) -> usize {
        self.shared.state().most_open
    }

    /// Waits until `matches` has selected `times` requests.
    pub fn wait_for(&self, matches: &Match, times: usize, limit: Duration) -> Result<()> {
        wait_until(&format!("{times} requests for {matches:?}"), limit, || Ok(self.count(matches) >= times))
    }
}

impl Drop for FaultyRegistry {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Relaxed);
        self.heal();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, change: isize) {
        let mut state = self.state();
        state.open = state.open.saturating_add_signed(change);
        state.most_open = state.most_open.max(state.open);
    }

    /// Whether any rule still exists. Connections that hang do so until then.
    fn unhealed(&self) -> bool {
        !self.ending.load(Ordering::Relaxed) && !self.state().rules.is_empty()
    }

    /// Whether a rule that slows bodies down still exists.
    fn slows(&self) -> bool {
        !self.ending.load(Ordering::Relaxed)
            && self.state().rules.iter().any(|rule| matches!(rule.fault, Fault::Slow(..)))
    }

    /// Records the request and returns the fault to apply to it.
    fn admit(&self, head: &Head) -> Option<Fault> {
        let mut request = Request {
            method: head.word(0).to_owned(),
            path: head.word(1).to_owned(),
            range: head.header("Range").map(str::to_owned),
            authorization: head.header("Authorization").map(str::to_owned),
            fault: None,
        };
        let mut state = self.state();
        let rule = state.rules.iter_mut().find(|rule| rule.left > 0 && rule.matches.hits(&request));
        request.fault = rule.map(|rule| {
            rule.left -= 1;
            rule.fault.clone()
        });
        let fault = request.fault.clone();
        state.requests.push(request);
        fault
    }

    /// Serves one connection, which carries one request.
    fn serve(&self, client: TcpStream) -> Result<()> {
        let mut from_client = BufReader::new(client.try_clone()?);
        let Some(mut head) = Head::read(&mut from_client)? else { return Ok(()) };
        let fault = self.admit(&head);
        if let Some(Fault::CorruptAfter(_, other)) = &fault {
            let came = || Ok(!self.unhealed() || self.state().requests.iter().any(|request| other.hits(request)));
            wait_until("the other request", Duration::from_secs(600), came)?;
        }
        match &fault {
            Some(Fault::Reset(0)) => return reset(&client),
            Some(Fault::Status(status, headers)) => return refuse(&client, *status, headers),
            Some(Fault::Answer(media_type, body)) => return invent(&client, media_type, body),
            Some(Fault::IgnoreRange) => head.remove("Range"),
            _ => {}
        }
        let upstream = TcpStream::connect(&self.upstream).context("the registry behind is down")?;
        head.set("Connection", "close");
        (&upstream).write_all(&head.bytes())?;
        let mut to_upstream = upstream.try_clone()?;
        std::thread::spawn(move || std::io::copy(&mut from_client, &mut to_upstream));
        let result = self.answer(&upstream, &client, fault);
        // This ends the thread above. Shutting down the client's write side would be an orderly end, so closing is left to the drop.
        let _ = upstream.shutdown(Shutdown::Both);
        let _ = client.shutdown(Shutdown::Read);
        result
    }

    fn answer(&self, upstream: &TcpStream, mut client: &TcpStream, fault: Option<Fault>) -> Result<()> {
        let mut body = BufReader::new(upstream);
        let Some(head) = Head::read(&mut body)? else { return reset(client) };
        client.write_all(&head.bytes())?;
        match fault {
            Some(Fault::Truncate(length)) => {
                std::io::copy(&mut body.take(length), &mut client)?;
                return Ok(());
            }
            Some(Fault::Reset(length)) => {
                std::io::copy(&mut body.take(length), &mut client)?;
                return reset(client);
            }
            Some(Fault::Corrupt(offset) | Fault::CorruptAfter(offset, _)) => {
                std::io::copy(&mut (&mut body).take(offset), &mut client)?;
                let mut byte = [0];
                body.read_exact(&mut byte)?;
                client.write_all(&[!byte[0]])?;
            }
            Some(Fault::Hang(length)) => {
                std::io::copy(&mut (&mut body).take(length), &mut client)?;
                let _ = wait_until("healing", Duration::from_secs(600), || Ok(!self.unhealed()));
                return reset(client);
            }
            Some(Fault::Slow(length, pause)) => {
                while std::io::copy(&mut (&mut body).take(length), &mut client)? > 0 && self.slows() {
                    std::thread::sleep(pause);
                }
            }
            _ => {}
        }
        std::io::copy(&mut body, &mut client)?;
        Ok(())
    }
}

/// Sets the socket so that closing it sends a reset and not an orderly end.
fn reset(stream: &TcpStream) -> Result<()> {
    setsockopt(stream, Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 })?;
    Ok(())
}

fn refuse(client: &TcpStream, status: u16, headers: &[(String, String)]) -> Result<()> {
    let body = format!(r#"{{"errors":[{{"code":"TEST","message":"status {status} on demand"}}]}}"#);
    let head = Head { first: format!("HTTP/1.1 {status} On Demand"), headers: headers.to_vec() };
    reply(client, head, "application/json", body.as_bytes())
}

fn invent(client: &TcpStream, media_type: &str, body: &[u8]) -> Result<()> {
    reply(client, Head { first: "HTTP/1.1 200 OK".to_owned(), headers: Vec::new() }, media_type, body)
}

fn reply(mut client: &TcpStream, mut head: Head, media_type: &str, body: &[u8]) -> Result<()> {
    head.set("Content-Type", media_type);
    head.set("Content-Length", &body.len().to_string());
    head.set("Connection", "close");
    client.write_all(&head.bytes())?;
    client.write_all(body)?;
    Ok(())
}
