//! A forward proxy for clients: `CONNECT`, requests in absolute form, and SOCKS 5, on one port. Only the proxy can
//! resolve the names that it is asked for, and it records what it is asked.

use std::collections::BTreeMap;
use std::io::{BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};

use crate::http::Head;

/// A request to the proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// `CONNECT`, `SOCKS`, or the method of a request in absolute form.
    pub how: String,
    /// `host:port` of the server, or the URL.
    pub what: String,
    /// The credentials that the client sent: the `Proxy-Authorization` header, or `user:password` of SOCKS.
    pub who: Option<String>,
}

struct Shared {
    routes: BTreeMap<String, String>,
    ending: AtomicBool,
    /// Guards the recorded requests.
    asked: Mutex<Vec<Asked>>,
    /// The status of every answer, if the proxy refuses all requests.
    refusal: Option<u16>,
}

/// A forward proxy with its own threads; ends when dropped.
pub struct ForwardProxy {
    port: u16,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for ForwardProxy {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "ForwardProxy({})", self.port)
    }
}

impl ForwardProxy {
    /// Starts a proxy that knows these servers. A route is the `host:port` that clients ask for, and the address that it leads to.
    pub fn start(routes: &[(&str, &str)]) -> Result<Self> {
        Self::start_refusing(routes, None)
    }

    /// Starts a proxy that answers every request with this status, if one is given.
    pub fn start_refusing(routes: &[(&str, &str)], refusal: Option<u16>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("no port is free for the proxy")?;
        let port = listener.local_addr()?.port();
        let routes = routes.iter().map(|(from, to)| ((*from).to_owned(), (*to).to_owned())).collect();
        let shared = Arc::new(Shared { routes, ending: AtomicBool::new(false), asked: Mutex::default(), refusal });
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if serving.ending.load(Ordering::Relaxed) {
                    return;
                }
                let serving = Arc::clone(&serving);
                // If a client disconnects, the error is ignored.
                std::thread::spawn(move || serving.serve(&stream));
            }
        });
        Ok(Self { port, shared })
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The requests since the last call, oldest first. Of equal requests in a row only one is listed.
    pub fn take(&self) -> Vec<Asked> {
        let mut asked = std::mem::take(&mut *self.shared.asked.lock().unwrap_or_else(PoisonError::into_inner));
        asked.dedup();
        asked
    }
}

impl Drop for ForwardProxy {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts connections.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl Shared {
    fn note(&self, how: &str, what: &str, who: Option<String>) {
        let asked = Asked { how: how.to_owned(), what: what.to_owned(), who };
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).push(asked);
    }

    /// Connects to the address that `server` leads to.
    fn connect(&self, server: &str) -> Result<TcpStream> {
        let to = self.routes.get(server).with_context(|| format!("nobody knows {server}"))?;
        Ok(TcpStream::connect(to)?)
    }

    fn serve(&self, stream: &TcpStream) -> Result<()> {
        let mut first = [0];
        stream.peek(&mut first)?;
        if first == [5] {
            return self.socks(stream);
        }
        let mut reader = BufReader::new(stream);
        let Some(mut head) = Head::read(&mut reader)? else { return Ok(()) };
        let (how, what) = (head.word(0).to_owned(), head.word(1).to_owned());
        self.note(&how, &what, head.header("Proxy-Authorization").map(str::to_owned));
        let refuse = |status: u16| {
            (&*stream).write_all(format!("HTTP/1.1 {status} Proxy\r\nContent-Length: 0\r\n\r\n").as_bytes())
        };
        if let Some(status) = self.refusal {
            return Ok(refuse(status)?);
        }
        if how == "CONNECT" {
            let Ok(server) = self.connect(&what) else { return Ok(refuse(502)?) };
            (&*stream).write_all(b"HTTP/1.1 200 Connected\r\n\r\n")?;
            return pump(stream, &server);
        }
        let bare = what.strip_prefix("http://").context("the request is not in absolute form")?;
        let (server, path) = bare.split_once('/').unwrap_or((bare, ""));
        let named = if server.contains(':') { server.to_owned() } else { format!("{server}:80") };
        let Ok(server) = self.connect(&named) else { return Ok(refuse(502)?) };
        head.first = format!("{how} /{path} HTTP/1.1");
        head.remove("Proxy-Authorization");
        head.set("Connection", "close");
        (&server).write_all(&head.bytes())?;
        std::io::copy(&mut &server, &mut &*stream)?;
        Ok(stream.shutdown(Shutdown::Both)?)
    }

    /// The part of RFC 1928 that clients of registries need: names and IPv4 addresses, with or without a user and password.
    fn socks(&self, mut stream: &TcpStream) -> Result<()> {
        let methods = take(stream, 1).and_then(|_| counted(stream))?;
        let wants_user = methods.contains(&2);
        stream.write_all(&[5, if wants_user { 2 } else { 0 }])?;
        let who = if wants_user {
            take(stream, 1)?;
            let (user, password) = (counted(stream)?, counted(stream)?);
            stream.write_all(&[1, 0])?;
            Some(format!("{}:{}", String::from_utf8_lossy(&user), String::from_utf8_lossy(&password)))
        } else {
            None
        };
        let head = take(stream, 4)?;
        ensure!(head[..2] == [5, 1], "{head:?} is not a connection");
        let host = match head[3] {
            3 => String::from_utf8_lossy(&counted(stream)?).into_owned(),
            1 => take(stream, 4)?.iter().map(u8::to_string).collect::<Vec<_>>().join("."),
            other => bail!("addresses of kind {other} are not for this proxy"),
        };
        let port = take(stream, 2)?;
        let server = format!("{host}:{}", u16::from_be_bytes([port[0], port[1]]));
        self.note("SOCKS", &server, who);
        let Ok(server) = self.connect(&server) else { return Ok(stream.write_all(&[5, 4, 0, 1, 0, 0, 0, 0, 0, 0])?) };
        stream.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0])?;
        pump(stream, &server)
    }
}

fn take(mut stream: &TcpStream, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Reads a length byte and as many bytes after it.
fn counted(stream: &TcpStream) -> Result<Vec<u8>> {
    let len = take(stream, 1)?[0];
    take(stream, usize::from(len))
}

/// Copies bytes in both directions until the server's side has ended.
fn pump(client: &TcpStream, server: &TcpStream) -> Result<()> {
    let (upward, downward) = ((client.try_clone()?, server.try_clone()?), (server, client));
    let thread = std::thread::spawn(move || {
        let _ = std::io::copy(&mut &upward.0, &mut &upward.1);
        let _ = upward.1.shutdown(Shutdown::Write);
    });
    let copied = std::io::copy(&mut &*downward.0, &mut &*downward.1);
    let _ = client.shutdown(Shutdown::Both);
    let _ = server.shutdown(Shutdown::Both);
    let _ = thread.join();
    copied.map(drop).context("the server's side broke")
}
