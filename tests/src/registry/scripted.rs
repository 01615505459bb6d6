//! A server that answers as a test's handler says, over plain HTTP or TLS, at any pace. It records every request with all its headers.

use std::io::{BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::http::{Head, read_chunks};
use crate::images::ImageFiles;

/// A request as it arrived.
#[derive(Debug, Clone)]
pub struct Seen {
    /// First line and headers.
    pub head: Head,
    /// The body.
    pub body: Vec<u8>,
}

impl Seen {
    /// The method.
    pub fn method(&self) -> &str {
        self.head.word(0)
    }

    /// The path with its query.
    pub fn path(&self) -> &str {
        self.head.word(1)
    }

    /// The `Authorization` header.
    pub fn authorization(&self) -> Option<&str> {
        self.head.header("Authorization")
    }
}

/// How a body is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// All at once.
    Whole,
    /// One byte at a time, with this pause after each.
    Trickle(Duration),
}

/// How the end of a body is marked, and whether the mark is correct.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// By its length.
    Length,
    /// In chunks.
    Chunked,
    /// By closing the connection, as HTTP/1.0 has it.
    UntilClose,
    /// By its length, but the connection is closed after this many bytes.
    Cut(usize),
    /// By its length, but this many extra bytes follow.
    Longer(usize),
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The status.
    pub status: u16,
    /// Headers, written as they are.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
    /// How it is sent.
    pub pace: Pace,
    /// How its end is marked.
    pub framing: Framing,
}

impl Reply {
    /// An answer without a body.
    pub fn status(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new(), pace: Pace::Whole, framing: Framing::Length }
    }

    /// 200 with a body of this media type.
    pub fn body(media_type: &str, body: impl Into<Vec<u8>>) -> Self {
        Self { body: body.into(), ..Self::status(200) }.with("Content-Type", media_type)
    }

    /// A 307 redirect to `to`.
    pub fn redirect(to: &str) -> Self {
        Self::status(307).with("Location", to)
    }

    /// A 401 answer with this challenge.
    pub fn challenge(challenge: &str) -> Self {
        Self::status(401).with("WWW-Authenticate", challenge)
    }

    /// The same reply with one more header.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The same reply with its end marked in this way.
    pub fn framed(self, framing: Framing) -> Self {
        Self { framing, ..self }
    }

    /// The same reply, sent byte by byte.
    pub fn trickled(self, pause: Duration) -> Self {
        Self { pace: Pace::Trickle(pause), ..self }
    }
}

/// The answer of a registry that has only this image, as `NAME`, to a path. `None` if it has no such document.
pub fn content_of(image: &ImageFiles, name: &str, path: &str) -> Option<Reply> {
    let rest = path.strip_prefix("/v2/")?.strip_prefix(name)?.strip_prefix('/')?;
    let (kind, what) = rest.split_once('/')?;
    if kind == "blobs" {
        return Some(Reply::body("application/octet-stream", image.blob(what).ok()?));
    }
    let is_tag = !what.starts_with("sha256:");
    let manifest = image.blob(if is_tag { &image.manifest.digest } else { what }).ok()?;
    Some(Reply::body(&image.manifest.media_type, manifest))
}

type Handler = Box<dyn Fn(&Seen) -> Reply + Send + Sync>;

struct Shared {
    handler: Handler,
    tls: Option<Arc<ServerConfig>>,
    ending: AtomicBool,
    /// Guards the recorded requests.
    seen: Mutex<Vec<Seen>>,
    connections: Mutex<usize>,
}

/// A server with its own threads; ends when dropped.
pub struct ScriptedRegistry {
    host: String,
    port: u16,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for ScriptedRegistry {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "ScriptedRegistry({}:{})", self.host, self.port)
    }
}

impl ScriptedRegistry {
    /// Starts a server on a free port of 127.0.0.1.
    pub fn start(handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Result<Self> {
        Self::start_at("127.0.0.1:0", None, handler)
    }

    /// Starts a server at `address` (`IP:PORT`; port 0 takes any). With a certificate and key it speaks TLS.
    pub fn start_at(
        address: &str,
        tls: Option<(&Path, &Path)>,
        handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) -> Result<Self> {
        let listener = TcpListener::bind(address).with_context(|| format!("cannot listen at {address}"))?;
        let local = listener.local_addr()?;
        let shared = Arc::new(Shared {
            handler: Box::new(handler),
            tls: tls.map(|(certificate, key)| server_config(certificate, key)).transpose()?,
            ending: AtomicBool::new(false),
            seen: Mutex::default(),
            connections: Mutex::default(),
        });
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if serving.ending.load(Ordering::Relaxed) {
                    return;
                }
                *serving.connections.lock().unwrap_or_else(PoisonError::into_inner) += 1;
                let serving = Arc::clone(&serving);
                std::thread::spawn(move || serving.serve(stream));
            }
        });
        Ok(Self { host: local.ip().to_string(), port: local.port(), shared })
    }

    /// `IP:PORT`.
    pub fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The reference of an image on this server.
    pub fn reference(&self, name: &str, tag: &str) -> String {
        format!("{}/{name}:{tag}", self.address())
    }

    /// Every request so far, oldest first.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The requests whose path contains this text.
    pub fn seen_at(&self, text: &str) -> Vec<Seen> {
        self.seen().into_iter().filter(|seen| seen.path().contains(text)).collect()
    }

    /// The number of connections so far, with or without a request.
    pub fn connections(&self) -> usize {
        *self.shared.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ScriptedRegistry {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts connections.
        let _ = TcpStream::connect((self.host.as_str(), self.port));
    }
}

fn server_config(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>> {
    // The process needs one crypto provider. Whoever installs it first installs the same one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let chain = CertificateDer::pem_file_iter(certificate)?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(key)?;
    Ok(Arc::new(ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key)?))
}

/// The bytes that follow the headers.
fn on_the_wire(body: &[u8], framing: Framing) -> Vec<u8> {
    match framing {
        Framing::Length | Framing::UntilClose => body.to_vec(),
        Framing::Cut(after) => body[..after.min(body.len())].to_vec(),
        Framing::Longer(more) => [body, &vec![b'x'; more]].concat(),
        Framing::Chunked => {
            let mut wire = Vec::new();
            for chunk in body.chunks(1000) {
                wire.extend(format!("{:x}\r\n", chunk.len()).into_bytes());
                wire.extend([chunk, b"\r\n"].concat());
            }
            wire.extend(b"0\r\n\r\n");
            wire
        }
    }
}

impl Shared {
    /// Serves one connection, which carries one request.
    fn serve(&self, stream: TcpStream) {
        // Limits how long a silent peer can hold the thread.
        let _ = stream.set_read_timeout(Some(Duration::from_secs(30)));
        let _ = match &self.tls {
            Some(config) => ServerConnection::new(Arc::clone(config))
                .map_err(anyhow::Error::from)
                .and_then(|connection| self.answer(StreamOwned::new(connection, stream))),
            None => self.answer(stream),
        };
    }

    fn answer(&self, stream: impl Read + Write) -> Result<()> {
        let mut reader = BufReader::new(stream);
        let Some(head) = Head::read(&mut reader)? else { return Ok(()) };
        let length: u64 = head.header("Content-Length").map_or(Ok(0), str::parse)?;
        let mut body = Vec::new();
        (&mut reader).take(length).read_to_end(&mut body)?;
        if head.header("Transfer-Encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
            read_chunks(&mut reader, &mut body)?;
        }
        let seen = Seen { head, body };
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).push(seen.clone());
        let reply = (self.handler)(&seen);
        let version = if reply.framing == Framing::UntilClose { "1.0" } else { "1.1" };
        let mut head = Head { first: format!("HTTP/{version} {} Scripted", reply.status), headers: reply.headers };
        match reply.framing {
            Framing::UntilClose => {}
            Framing::Chunked => head.set("Transfer-Encoding", "chunked"),
            _ => head.headers.push(("Content-Length".to_owned(), reply.body.len().to_string())),
        }
        head.headers.push(("Connection".to_owned(), "close".to_owned()));
        let stream = reader.get_mut();
        stream.write_all(&head.bytes())?;
        if seen.method() == "HEAD" {
            return Ok(stream.flush()?);
        }
        match reply.pace {
            Pace::Whole => stream.write_all(&on_the_wire(&reply.body, reply.framing))?,
            Pace::Trickle(pause) => {
                for byte in reply.body.chunks(1) {
                    if self.ending.load(Ordering::Relaxed) {
                        break;
                    }
                    stream.write_all(byte)?;
                    stream.flush()?;
                    std::thread::sleep(pause);
                }
            }
        }
        Ok(stream.flush()?)
    }
}
