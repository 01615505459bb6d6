//! A registry with its token service and its storage, each on its own port. They follow a [`Behaviour`], and record the
//! credentials that clients sent to each of them.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::behaviour::Behaviour;
use super::content::{Content, Document, dialect, other_kind, packed};
use super::scripted::{Framing, Reply, ScriptedRegistry, Seen};
use crate::images::digest_of;

mod token_service;

/// The user that the registry accepts.
const USER: &str = "eve";
const PASSWORD: &str = "Holunderbluete-1729";
/// The query of signed links.
const SIGNED: &str = "X-Amz-Signature=abc";
/// A signed query with every character that a query may contain.
const EXACT: &str = "name=UTF-8''it's!(1)*|^`{}[]\\%zz%2f&&=+;/?:@~X-Amz-Signature=abc";
const REFRESH: &str = "refresh-Holunderbluete";
/// The scope of the image's repository, and the scope that a challenge for another repository names.
const OWN: &str = "repository:app:pull";
const OTHER: &str = "repository:mirror/app:pull";

/// Credentials that a client sent: to which server, at which kind of path, and in which form.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Exposure {
    /// `registry`, `tokens` or `storage`.
    pub server: &'static str,
    /// `root`, `manifest`, `blob`, `token` or `other`.
    pub place: &'static str,
    /// `Basic`, `Bearer` or `body`.
    pub proof: &'static str,
}

/// The certificate and key of servers with TLS.
#[derive(Debug, Clone)]
pub struct Tls {
    /// PEM file.
    pub certificate: PathBuf,
    /// PEM file.
    pub key: PathBuf,
}

/// The client's login, an entry of `auths` in Docker's configuration.
fn login(behaviour: &Behaviour) -> Option<Value> {
    let auth = |password: &str| STANDARD.encode(format!("{USER}:{password}"));
    match behaviour.get("credentials") {
        "right" => Some(json!({"auth": auth(PASSWORD)})),
        "wrong" => Some(json!({"auth": auth("wrong")})),
        "identity" => Some(json!({"auth": STANDARD.encode(format!("{USER}:")), "identitytoken": REFRESH})),
        _ => None,
    }
}

/// The state that changes while the behaviour is played.
#[derive(Default)]
struct Progress {
    /// For each token: how many more times it is accepted, and its scope.
    tokens: HashMap<String, (usize, String)>,
    issued: usize,
    /// How often each fault has happened, by its name.
    faults: HashMap<&'static str, usize>,
}

struct Play {
    behaviour: Behaviour,
    content: Content,
    /// The servers' URLs, once all are running: registry, tokens, storage, storage over plain HTTP.
    places: Mutex<[String; 4]>,
    /// Guards the changing state.
    progress: Mutex<Progress>,
}

/// A registry that plays a behaviour; ends when dropped.
#[derive(Debug)]
pub struct Played {
    registry: ScriptedRegistry,
    tokens: ScriptedRegistry,
    storage: ScriptedRegistry,
    plain: ScriptedRegistry,
    is_tls: bool,
}

impl Played {
    /// Plays `behaviour` with an image that is different for each `number`.
    pub fn start(behaviour: &Behaviour, number: u64, tls: &Tls) -> Result<Self> {
        let play = Arc::new(Play {
            behaviour: behaviour.clone(),
            content: Content::new(behaviour, number)?,
            places: Mutex::default(),
            progress: Mutex::default(),
        });
        let is_tls = behaviour.is("channel", "tls");
        let files = (tls.certificate.as_path(), tls.key.as_path());
        let start = |files: Option<_>, handler: fn(&Play, &Seen) -> Reply| {
            let play = Arc::clone(&play);
            ScriptedRegistry::start_at("127.0.0.1:0", files, move |seen| handler(&play, seen))
        };
        let files = is_tls.then_some(files);
        let registry = start(files, Play::registry)?;
        let tokens = start(files, Play::tokens)?;
        let storage = start(files, Play::storage)?;
        let plain = start(None, Play::storage)?;
        let scheme = if is_tls { "https" } else { "http" };
        let at = |server: &ScriptedRegistry| format!("{scheme}://{}", server.address());
        *play.places.lock().unwrap_or_else(PoisonError::into_inner) =
            [at(&registry), at(&tokens), at(&storage), format!("http://{}", plain.address())];
        Ok(Self { registry, tokens, storage, plain, is_tls })
    }

    /// `127.0.0.1:PORT` of the registry.
    pub fn address(&self) -> String {
        self.registry.address()
    }

    /// All addresses to which a client may be directed.
    pub fn addresses(&self) -> [String; 4] {
        [&self.registry, &self.tokens, &self.storage, &self.plain].map(ScriptedRegistry::address)
    }

    /// The image's reference.
    pub fn reference(&self) -> String {
        self.registry.reference("app", "1")
    }

    /// The credentials that clients have sent so far.
    pub fn exposures(&self) -> BTreeSet<Exposure> {
        let servers = [
            ("registry", &self.registry),
            ("tokens", &self.tokens),
            ("storage", &self.storage),
            ("storage", &self.plain),
        ];
        let of = |(server, scripted): (&'static str, &ScriptedRegistry)| {
            let seen = scripted.seen();
            seen.into_iter()
                .filter_map(move |seen| Some(Exposure { server, place: place(&seen), proof: proof(&seen)? }))
        };
        servers.into_iter().flat_map(of).collect()
    }

    /// Whether a client sent credentials over plain HTTP although the registry speaks TLS.
    pub fn is_betrayed(&self) -> bool {
        self.is_tls && self.plain.seen().iter().any(|seen| proof(seen).is_some())
    }

    /// All requests to the registry, its token service and its storage, for error messages.
    pub fn log(&self) -> Vec<String> {
        let servers = [("registry", &self.registry), ("tokens", &self.tokens), ("storage", &self.storage)];
        let line = |server: &str, seen: &Seen| {
            format!("{server}: {} {} {}", seen.method(), seen.path(), proof(seen).unwrap_or("-"))
        };
        servers
            .iter()
            .flat_map(|(name, server)| server.seen().iter().map(|seen| line(name, seen)).collect::<Vec<_>>())
            .collect()
    }
}

fn place(seen: &Seen) -> &'static str {
    let path = seen.path();
    if path == "/v2/" || path == "/v2" {
        "root"
    } else if path.contains("manifests/") {
        "manifest"
    } else if path.contains("blobs/") {
        "blob"
    } else if path.starts_with("/token") {
        "token"
    } else {
        "other"
    }
}

fn proof(seen: &Seen) -> Option<&'static str> {
    let body = String::from_utf8_lossy(&seen.body);
    match seen.authorization() {
        Some(shown) if shown.starts_with("Bearer ") => Some("Bearer"),
        Some(_) => Some("Basic"),
        None => (body.contains(PASSWORD) || body.contains(REFRESH)).then_some("body"),
    }
}

impl Play {
    fn is(&self, dimension: &str, value: &str) -> bool {
        self.behaviour.is(dimension, value)
    }

    fn place(&self, number: usize) -> String {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)[number].clone()
    }

    /// Counts an attempt of this fault, and returns whether it is one of the first `times`.
    fn happens(&self, name: &'static str, times: usize) -> bool {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let count = progress.faults.entry(name).or_default();
        *count += 1;
        *count <= times
    }

    /// Whether the request's credentials are accepted.
    fn admits(&self, seen: &Seen) -> bool {
        let challenge = self.behaviour.get("challenge");
        if challenge == "open" {
            return true;
        }
        let shown = seen.authorization().unwrap_or_default();
        let basic = format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")));
        if shown == basic {
            return challenge.contains("basic");
        }
        let Some(token) = shown.strip_prefix("Bearer ").filter(|_| challenge.contains("bearer")) else { return false };
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((left, scope)) = progress.tokens.get_mut(token) else { return false };
        let wanted = if challenge == "bearer with another scope" { OTHER } else { OWN };
        if *left == 0 || !scope.contains(wanted) {
            return false;
        }
        *left -= 1;
        true
    }

    /// The 401 answer with the challenge.
    fn challenged(&self) -> Reply {
        let realm = format!("{}/token", self.place(1));
        let bearer = format!("Bearer realm=\"{realm}\",service=\"s\",scope=\"{OWN}\"");
        let basic = "Basic realm=\"r\"";
        let headers: Vec<String> = match self.behaviour.get("challenge") {
            "basic" => vec![basic.to_owned()],
            "basic, bearer" => vec![format!("{basic}, {bearer}")],
            "bearer; basic" => vec![bearer, basic.to_owned()],
            "bearer oddly written" => vec![format!("BEARER  Realm = \"{realm}\" , SERVICE=s,scope=\"{OWN}\"")],
            "negotiate, bearer" => vec![format!("Negotiate, {bearer}")],
            "negotiate; basic" => vec!["Negotiate".to_owned(), "NTLM TlRMTQ==".to_owned(), basic.to_owned()],
            "basic without realm" => vec!["Basic".to_owned()],
            "bearer without realm" => vec![format!("Bearer service=\"s\",scope=\"{OWN}\"")],
            "bearer with relative realm" => vec![format!("Bearer realm=\"/token\",service=\"s\",scope=\"{OWN}\"")],
            "bearer without scope" => vec![format!("Bearer realm=\"{realm}\",service=\"s\"")],
            "bearer with several scopes" => {
                vec![format!("Bearer realm=\"{realm}\",service=\"s\",scope=\"{OWN} repository:base:pull\"")]
            }
            "bearer with another scope" => vec![format!("Bearer realm=\"{realm}\",service=\"s\",scope=\"{OTHER}\"")],
            "negotiate" => vec!["Negotiate".to_owned()],
            "nothing" => Vec::new(),
            _ => vec![bearer],
        };
        let body = r#"{"errors":[{"code":"UNAUTHORIZED","message":"log in"}]}"#;
        let reply = Reply { status: 401, ..Reply::body("application/json", body) };
        headers.iter().fold(reply, |reply, challenge| reply.with("WWW-Authenticate", challenge))
    }

    /// The answer to a request without accepted credentials at this kind of path; `None` if the path is open to everybody.
    fn refusal(&self, kind: &str) -> Option<Reply> {
        match (self.behaviour.get("place"), kind) {
            ("root, hidden 404" | "root, hidden 403", "root") => Some(self.challenged()),
            ("root, hidden 404", _) => Some(Reply::status(404)),
            ("root, hidden 403", _) => Some(Reply::status(403)),
            ("repository", "root") => None,
            ("repository, no root", "root") => Some(Reply::status(404)),
            ("manifest", "manifests") | ("blob", "blobs") => Some(self.challenged()),
            ("manifest" | "blob", _) => None,
            _ => Some(self.challenged()),
        }
    }

    fn registry(&self, seen: &Seen) -> Reply {
        let path = seen.path().split('?').next().unwrap_or_default().to_owned();
        if path == "/v2/" || path == "/v2" {
            let is_in = self.admits(seen) && !self.is("place", "repository, no root");
            let refusal = if is_in { None } else { self.refusal("root") };
            return refusal.unwrap_or_else(|| Reply::body("application/json", "{}"));
        }
        if path.starts_with("/storage/") {
            return self.storage(seen);
        }
        let inner = path.strip_prefix("/v2/inner/").or_else(|| path.strip_prefix("/inner/"));
        let Some((kind, name)) = inner.or_else(|| path.strip_prefix("/v2/app/")).and_then(|rest| rest.split_once('/'))
        else {
            return Reply::status(404);
        };
        if let Some(fault) = self.fault(kind) {
            return fault;
        }
        if let (false, Some(refusal)) = (self.admits(seen), self.refusal(kind)) {
            return refusal;
        }
        let is_led = inner.is_none() && kind == self.behaviour.get("redirected") && !self.is("redirect", "none");
        if is_led { self.redirect(&path, kind, name) } else { self.serve(seen, kind, name) }
    }

    fn fault(&self, kind: &str) -> Option<Reply> {
        let fault = self.behaviour.get("fault");
        let singular = kind.trim_end_matches('s');
        if !fault.starts_with(singular) {
            return None;
        }
        let html = |status| Reply { status, ..Reply::body("text/html", "<html>no</html>") };
        // The date is in the past, so the client may retry at once.
        let date = "Sun, 01 Nov 2020 10:00:00 GMT";
        match fault.trim_start_matches(singular).trim() {
            "429" => self.happens("429", 1).then(|| html(429).with("Retry-After", "1")),
            "429 by date" => self.happens("429", 1).then(|| html(429).with("Retry-After", date)),
            "503" => self.happens("503", 1).then(|| html(503)),
            _ => Some(html(500)),
        }
    }

    fn redirect(&self, path: &str, kind: &str, name: &str) -> Reply {
        let signed = if self.is("redirect", "signed exactly") { EXACT } else { SIGNED };
        let tail = format!("/storage/{kind}/{name}?{signed}");
        let storage = self.place(2);
        let (status, location) = match self.behaviour.get("redirect") {
            "signed here" => (307, tail),
            "relative" => (307, format!("../../..{tail}")),
            "protocol-relative" => (307, format!("//{}{tail}", storage.split("//").nth(1).unwrap_or_default())),
            "api" => (307, format!("/v2/inner/{kind}/{name}")),
            "place of its own" => (307, format!("/inner/{kind}/{name}")),
            "circle" => (307, path.to_owned()),
            "nowhere" => return Reply::status(307),
            "downgrade" => (307, format!("{}{tail}", self.place(3))),
            status => (status.parse().unwrap_or(307), format!("{storage}{tail}")),
        };
        Reply { status, ..Reply::redirect(&location) }
    }

    /// The signed storage. It refuses requests with an `Authorization` header as well, and requests whose signed query was changed.
    fn storage(&self, seen: &Seen) -> Reply {
        if seen.authorization().is_some() {
            return Reply { status: 400, ..Reply::body("application/xml", "<Error>InvalidArgument</Error>") };
        }
        let (path, query) = seen.path().split_once('?').unwrap_or_default();
        if ![SIGNED, EXACT].contains(&query) {
            return Reply { status: 403, ..Reply::body("application/xml", "<Error>SignatureDoesNotMatch</Error>") };
        }
        match path.strip_prefix("/storage/").and_then(|rest| rest.split_once('/')) {
            Some((kind, name)) => self.serve(seen, kind, name),
            None => Reply::status(404),
        }
    }

    fn serve(&self, seen: &Seen, kind: &str, name: &str) -> Reply {
        let unknown =
            || Reply { status: 404, ..Reply::body("application/json", r#"{"errors":[{"code":"MANIFEST_UNKNOWN"}]}"#) };
        if kind == "manifests" {
            return self.content.manifests.get(name).map_or_else(unknown, |document| self.manifest(seen, document));
        }
        self.content.blobs.get(name).map_or_else(unknown, |blob| self.blob(seen, name, blob))
    }

    fn manifest(&self, seen: &Seen, document: &Document) -> Reply {
        let is_head = seen.method() == "HEAD";
        let head = self.behaviour.get("head");
        if let (true, Ok(status)) = (is_head, head.parse()) {
            return Reply::status(status);
        }
        let right = document.media_type;
        let media_type = match self.behaviour.get("type") {
            "charset" => format!("{right}; charset=utf-8"),
            "upper case" => right.to_ascii_uppercase(),
            "text" => "text/plain; charset=utf-8".to_owned(),
            "json" => "application/json".to_owned(),
            "octet-stream" => "application/octet-stream".to_owned(),
            "dialect" => dialect(right).to_owned(),
            "kind" => other_kind(right).to_owned(),
            _ => right.to_owned(),
        };
        let (bytes, coding) = match self.behaviour.get("coding") {
            "manifest gzip" => (packed(&document.bytes), Some("gzip")),
            "manifest x-gzip" => (packed(&document.bytes), Some("x-gzip")),
            "manifest twice" => (packed(&packed(&document.bytes)), Some("gzip, gzip")),
            "manifest identity" => (document.bytes.clone(), Some("identity")),
            "manifest br" => (document.bytes.clone(), Some("br")),
            "manifest said to be gzip" => (document.bytes.clone(), Some("gzip")),
            _ => (document.bytes.clone(), None),
        };
        let mut reply = Reply { body: bytes, ..Reply::status(200) };
        if !self.is("type", "absent") {
            reply = reply.with("Content-Type", &media_type);
        }
        if let Some(coding) = coding {
            reply = reply.with("Content-Encoding", coding);
        }
        let digest = digest_of(&document.bytes);
        let stated = if is_head { head.trim_end_matches(" digest") } else { self.behaviour.get("stated") };
        let reply = match stated {
            "no" | "absent" => reply,
            "weak" => reply.with("Docker-Content-Digest", &format!("W/\"{digest}\"")),
            "wrong" => reply.with("Docker-Content-Digest", &digest_of(b"wrong")),
            _ => reply.with("Docker-Content-Digest", &digest),
        };
        self.framed(reply)
    }

    fn framed(&self, reply: Reply) -> Reply {
        let framing = match self.behaviour.get("framing") {
            "chunked" => Framing::Chunked,
            "until close" => Framing::UntilClose,
            "longer" => Framing::Longer(10),
            _ => Framing::Length,
        };
        reply.framed(framing)
    }

    fn blob(&self, seen: &Seen, digest: &str, blob: &[u8]) -> Reply {
        let (bytes, coding) = match self.behaviour.get("coding") {
            "blob gzip" => (packed(blob), Some("gzip")),
            "blob said to be gzip" => (blob.to_vec(), Some("gzip")),
            "blob identity" => (blob.to_vec(), Some("identity")),
            _ => (blob.to_vec(), None),
        };
        let mut reply = Reply::body("application/octet-stream", bytes);
        if let Some(coding) = coding {
            reply = reply.with("Content-Encoding", coding);
        }
        let from = seen
            .head
            .header("Range")
            .and_then(|range| range.strip_prefix("bytes=")?.trim_end_matches('-').parse().ok());
        if let Some(from) = from.filter(|_| !self.is("range", "ignored")) {
            return self.part(reply, blob, from);
        }
        if self.is("framing", "cut") && digest == self.content.layer && self.happens("cut", 1) {
            let half = reply.body.len() / 2;
            return reply.framed(Framing::Cut(half));
        }
        self.framed(reply)
    }

    /// The answer to a range request for a blob, which depends on the behaviour.
    fn part(&self, reply: Reply, blob: &[u8], from: usize) -> Reply {
        let from = from.min(blob.len());
        let (total, last) = (blob.len(), blob.len().saturating_sub(1));
        let partial = Reply { status: 206, body: blob[from..].to_vec(), ..Reply::status(206) };
        match self.behaviour.get("range") {
            "416" => Reply::status(416).with("Content-Range", &format!("bytes */{total}")),
            "elsewhere" => partial.with("Content-Range", &format!("bytes {}-{last}/{total}", from + 7)),
            "multipart" => {
                let body = [b"--x\r\nContent-Range: bytes\r\n\r\n", &blob[from..], b"\r\n--x--\r\n"].concat();
                Reply { body, ..partial }.with("Content-Type", "multipart/byteranges; boundary=x")
            }
            _ if reply.headers.iter().any(|(name, _)| name == "Content-Encoding") => reply,
            _ => partial.with("Content-Range", &format!("bytes {from}-{last}/{total}")),
        }
    }
}

impl std::fmt::Debug for Play {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Play({})", self.behaviour)
    }
}

/// Writes a Docker configuration with the logins that the behaviours require, each for its registry.
pub fn write_logins(path: &std::path::Path, logins: &[(String, &Behaviour)]) -> Result<()> {
    let auths: serde_json::Map<String, Value> =
        logins.iter().filter_map(|(address, behaviour)| Some((address.clone(), login(behaviour)?))).collect();
    std::fs::write(path, json!({"auths": auths}).to_string())
        .with_context(|| format!("cannot write {}", path.display()))
}
