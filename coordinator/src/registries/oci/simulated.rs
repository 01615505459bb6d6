//! A registry without sockets, for tests in simulated time: tokens, conditional requests, ranges, pages, and every fault.
//!
//! It answers in place of the HTTP client ([`StandIn`]), so that everything above (authorization, retries, limits, resumed downloads) is
//! the product's own. Bodies take their time on tokio's clock. Faults come from a seeded generator.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, stream};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use reqwest::{Body, Request, Response};
use store::Digest;
use tokio::time::Instant;

use crate::registries::oci::transport::StandIn;

/// The registry's host.
pub(crate) const HOST: &str = "hub.example";
/// Its token service.
const TOKENS: &str = "tokens.example";
/// How long a token is said to live.
const TOKEN_LIFE: Duration = Duration::from_secs(300);
/// Bytes of a body that are sent at once.
const PIECE: usize = 8 << 10;

/// How many of 1,000 requests suffer each fault.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Faults {
    /// 429 with `Retry-After`.
    pub(crate) limited: u32,
    /// 500.
    pub(crate) failing: u32,
    /// The token is refused although it has not expired.
    pub(crate) expired: u32,
    /// A body ends early.
    pub(crate) truncated: u32,
    /// A byte of a body is wrong.
    pub(crate) corrupt: u32,
    /// A body trickles.
    pub(crate) slow: u32,
    /// A body stops without ending.
    pub(crate) silent: u32,
    /// In addition, every n-th body suffers the next of the last four faults in turn; 0 means none does.
    pub(crate) turns: u64,
}

/// What happened to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Fate {
    Good,
    Limited,
    Failing,
    Expired,
    Down,
    Truncated,
    Corrupt,
    Slow,
    Silent,
}

#[derive(Debug)]
struct State {
    random: StdRng,
    faults: Faults,
    /// Repositories of which everything fails with 500.
    broken: HashSet<String>,
    /// Requests fail with 503 until then.
    down_until: Instant,
    /// Bytes a second of one connection.
    speed: f64,
    blobs: HashMap<Digest, Bytes>,
    /// Repository -> tag -> manifest.
    tags: BTreeMap<String, BTreeMap<String, Digest>>,
    manifests: HashMap<Digest, Bytes>,
    tokens: HashMap<String, Instant>,
    issued: u64,
    fates: BTreeMap<Fate, u64>,
    /// Bodies of blobs that were sent to their end without a fault.
    delivered: HashMap<Digest, u64>,
    /// Bodies of blobs that were begun.
    begun: u64,
    requests: Vec<String>,
}

/// The registry.
#[derive(Debug, Clone)]
pub(crate) struct Simulated(Arc<Mutex<State>>);

/// An image's layer: its tar, which is also its blob.
pub(crate) fn layer(seed: u64, size: usize) -> Bytes {
    let mut content = vec![0; size];
    StdRng::seed_from_u64(seed).fill(&mut content[..]);
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size as u64);
    builder.append_data(&mut header, format!("file-{seed}"), content.as_slice()).unwrap();
    Bytes::from(builder.into_inner().unwrap())
}

impl Simulated {
    pub(crate) fn new(seed: u64, speed: f64) -> Simulated {
        Simulated(Arc::new(Mutex::new(State {
            random: StdRng::seed_from_u64(seed),
            faults: Faults::default(),
            broken: HashSet::new(),
            down_until: Instant::now(),
            speed,
            blobs: HashMap::new(),
            tags: BTreeMap::new(),
            manifests: HashMap::new(),
            tokens: HashMap::new(),
            issued: 0,
            fates: BTreeMap::new(),
            delivered: HashMap::new(),
            begun: 0,
            requests: Vec::new(),
        })))
    }

    pub(crate) fn set_faults(&self, faults: Faults) {
        self.0.lock().faults = faults;
    }

    /// Answers 500 to whatever is asked of these repositories, and of no others.
    pub(crate) fn break_repositories(&self, names: &[String]) {
        self.0.lock().broken = names.iter().cloned().collect();
    }

    /// Answers nothing but 503 for this time.
    pub(crate) fn go_down(&self, lasts: Duration) {
        self.0.lock().down_until = Instant::now() + lasts;
    }

    /// Points a tag at an image of these layers. Returns the manifest's digest.
    pub(crate) fn push(&self, repository: &str, tag: &str, layers: &[Bytes]) -> Digest {
        let diff_ids: Vec<String> = layers.iter().map(|layer| Digest::of(layer).to_string()).collect();
        let platform = store::image::Platform::host();
        let config = serde_json::json!({"os": "linux", "architecture": platform.architecture,
            "rootfs": {"type": "layers", "diff_ids": diff_ids}, "comment": format!("{repository}:{tag}")});
        let config = Bytes::from(config.to_string());
        let descriptor = |media_type: &str, bytes: &Bytes| serde_json::json!({"mediaType": media_type, "digest": Digest::of(bytes).to_string(), "size": bytes.len()});
        let described: Vec<_> =
            layers.iter().map(|layer| descriptor("application/vnd.oci.image.layer.v1.tar", layer)).collect();
        let manifest = serde_json::json!({"schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config), "layers": described});
        let manifest = Bytes::from(manifest.to_string());
        let digest = Digest::of(&manifest);
        let mut state = self.0.lock();
        for blob in layers.iter().chain([&config]) {
            state.blobs.insert(Digest::of(blob), blob.clone());
        }
        state.manifests.insert(digest, manifest);
        state.tags.entry(repository.to_owned()).or_default().insert(tag.to_owned(), digest);
        digest
    }

    /// What a tag points to.
    pub(crate) fn target(&self, repository: &str, tag: &str) -> Option<Digest> {
        self.0.lock().tags.get(repository)?.get(tag).copied()
    }

    /// How requests ended.
    pub(crate) fn fates(&self) -> BTreeMap<Fate, u64> {
        self.0.lock().fates.clone()
    }

    /// How often each blob was sent to its end without a fault.
    pub(crate) fn delivered(&self) -> HashMap<Digest, u64> {
        self.0.lock().delivered.clone()
    }

    /// The number of requests so far whose method and path start with `begin`.
    pub(crate) fn asked(&self, begin: &str) -> usize {
        self.0.lock().requests.iter().filter(|request| request.starts_with(begin)).count()
    }

    fn answer_now(&self, request: &Request) -> http::Response<Body> {
        let mut state = self.0.lock();
        let path = request.url().path().to_owned();
        state.requests.push(format!("{} {path}", request.method()));
        if request.url().host_str() == Some(TOKENS) {
            return state.issue();
        }
        if let Some(answer) = state.refuse(request) {
            return answer;
        }
        let Some((repository, kind, name)) = split(&path) else { return status(404) };
        match kind {
            "tags" => state.list(repository, request),
            "manifests" => state.manifest(repository, name, request),
            _ => self.blob(&mut state, name, request),
        }
    }

    /// A blob, from the byte that was asked for, at the registry's speed, with whatever fault befalls it.
    fn blob(&self, state: &mut State, name: &str, request: &Request) -> http::Response<Body> {
        let Some((digest, blob)) =
            name.parse::<Digest>().ok().and_then(|digest| Some((digest, state.blobs.get(&digest)?.clone())))
        else {
            return status(404);
        };
        if request.method() == http::Method::HEAD {
            return status(200);
        }
        let range = request.headers().get("range").and_then(|value| value.to_str().ok());
        let offset: usize = range.and_then(|range| range[6..].trim_end_matches('-').parse().ok()).unwrap_or(0);
        let mut bytes = blob.slice(offset.min(blob.len())..).to_vec();
        let faults = state.faults;
        let fates = [
            (faults.truncated, Fate::Truncated),
            (faults.corrupt, Fate::Corrupt),
            (faults.slow, Fate::Slow),
            (faults.silent, Fate::Silent),
        ];
        state.begun += 1;
        let fate = match state.begun.checked_rem(faults.turns) {
            Some(0) => state.count(fates[(state.begun / faults.turns) as usize % fates.len()].1),
            _ => state.fate(&fates),
        };
        let at = state.random.random_range(0..bytes.len().max(1));
        match fate {
            Fate::Truncated | Fate::Silent => bytes.truncate(at),
            Fate::Corrupt => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 0xff),
            _ => {}
        }
        let answer = http::Response::builder().status(if offset > 0 { 206 } else { 200 });
        let last = blob.len().saturating_sub(1);
        let answer = answer.header("content-range", format!("bytes {offset}-{last}/{}", blob.len()));
        answer.body(self.body(digest, bytes, fate, state.speed)).unwrap()
    }

    fn body(&self, digest: Digest, bytes: Vec<u8>, fate: Fate, speed: f64) -> Body {
        // A trickle brings far less than what counts as progress.
        let speed = if fate == Fate::Slow { 100.0 } else { speed };
        let piece = if fate == Fate::Slow { 1 << 10 } else { PIECE };
        let pieces: Vec<Bytes> = bytes.chunks(piece).map(Bytes::copy_from_slice).collect();
        let hub = self.clone();
        let sent = stream::iter(pieces).then(move |piece| async move {
            tokio::time::sleep(Duration::from_secs_f64(piece.len() as f64 / speed)).await;
            Ok::<_, std::io::Error>(piece)
        });
        let end = stream::once(async move {
            match fate {
                Fate::Silent => std::future::pending().await,
                Fate::Good | Fate::Slow => *hub.0.lock().delivered.entry(digest).or_default() += 1,
                _ => {}
            }
            Ok(Bytes::new())
        });
        Body::wrap_stream(sent.chain(end))
    }
}

/// `/v2/REPOSITORY/KIND/NAME`.
fn split(path: &str) -> Option<(&str, &str, &str)> {
    let (rest, name) = path.strip_prefix("/v2/")?.rsplit_once('/')?;
    let (repository, kind) = rest.rsplit_once('/')?;
    Some((repository, kind, name))
}

fn status(code: u16) -> http::Response<Body> {
    http::Response::builder().status(code).body(Body::default()).unwrap()
}

impl State {
    /// Draws one of these fates, each with its chance out of 1,000, and counts it.
    fn fate(&mut self, fates: &[(u32, Fate)]) -> Fate {
        let mut drawn = self.random.random_range(0..1000);
        let mut fate = Fate::Good;
        for (often, candidate) in fates {
            if drawn < *often {
                fate = *candidate;
                break;
            }
            drawn -= often;
        }
        self.count(fate)
    }

    fn count(&mut self, fate: Fate) -> Fate {
        *self.fates.entry(fate).or_default() += 1;
        fate
    }

    fn issue(&mut self) -> http::Response<Body> {
        self.issued += 1;
        let token = format!("token-{}", self.issued);
        self.tokens.insert(token.clone(), Instant::now() + TOKEN_LIFE);
        let text = format!("{{\"token\": \"{token}\", \"expires_in\": {}}}", TOKEN_LIFE.as_secs());
        http::Response::new(Body::from(text))
    }

    /// The answer to a request that is refused; `None` if it is let in.
    fn refuse(&mut self, request: &Request) -> Option<http::Response<Body>> {
        if Instant::now() < self.down_until {
            *self.fates.entry(Fate::Down).or_default() += 1;
            return Some(status(503));
        }
        if split(request.url().path()).is_some_and(|(repository, ..)| self.broken.contains(repository)) {
            return Some(status(500));
        }
        let faults = self.faults;
        let fates = [(faults.limited, Fate::Limited), (faults.failing, Fate::Failing), (faults.expired, Fate::Expired)];
        let fate = self.fate(&fates);
        if fate == Fate::Limited {
            let answer = http::Response::builder().status(429).header("retry-after", "20");
            return Some(answer.body(Body::default()).unwrap());
        }
        if fate == Fate::Failing {
            return Some(status(500));
        }
        let shown = request.headers().get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let shown = shown.trim_start_matches("Bearer ").to_owned();
        if fate == Fate::Expired {
            self.tokens.remove(&shown);
        }
        let good = self.tokens.get(&shown).is_some_and(|expires| Instant::now() < *expires);
        (!good).then(|| {
            let challenge = format!("Bearer realm=\"https://{TOKENS}/token\",service=\"{HOST}\"");
            let answer = http::Response::builder().status(401).header("www-authenticate", challenge);
            answer.body(Body::default()).unwrap()
        })
    }

    /// Tags, two a page.
    fn list(&self, repository: &str, request: &Request) -> http::Response<Body> {
        let Some(tags) = self.tags.get(repository) else { return status(404) };
        let last = request.url().query_pairs().find(|(key, _)| key == "last").map(|(_, value)| value.into_owned());
        let mut rest = tags.keys().filter(|tag| last.as_ref().is_none_or(|last| *tag > last));
        let page: Vec<&String> = rest.by_ref().take(2).collect();
        let mut answer = http::Response::builder();
        if let (Some(last), Some(_)) = (page.last(), rest.next()) {
            answer = answer.header("link", format!("</v2/{repository}/tags/list?last={last}&n=2>; rel=\"next\""));
        }
        answer.body(Body::from(serde_json::json!({"name": repository, "tags": page}).to_string())).unwrap()
    }

    fn manifest(&self, repository: &str, name: &str, request: &Request) -> http::Response<Body> {
        let tagged = self.tags.get(repository).and_then(|tags| tags.get(name)).copied();
        let Some(digest) = tagged.or_else(|| name.parse().ok()) else { return status(404) };
        let Some(bytes) = self.manifests.get(&digest) else { return status(404) };
        let etag = format!("\"{digest}\"");
        if request.headers().get("if-none-match").is_some_and(|known| known.as_bytes() == etag.as_bytes()) {
            return status(304);
        }
        let body = if request.method() == http::Method::HEAD { Body::default() } else { Body::from(bytes.clone()) };
        let answer = http::Response::builder()
            .header("docker-content-digest", digest.to_string())
            .header("etag", etag)
            .header("content-type", "application/vnd.oci.image.manifest.v1+json");
        answer.body(body).unwrap()
    }
}

impl StandIn for Simulated {
    fn answer(&self, request: Request) -> BoxFuture<'static, reqwest::Result<Response>> {
        let hub = self.clone();
        async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            Ok(Response::from(hub.answer_now(&request)))
        }
        .boxed()
    }
}
