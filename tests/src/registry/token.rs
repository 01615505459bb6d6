//! A token server after Docker's specification. It signs bearer tokens that docker-registry accepts.

use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use rcgen::{CertificateParams, KeyPair};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::{Value, json};

use crate::http::Head;
use crate::registry::acceptor::Acceptor;

/// The issuer that the registry expects.
pub(super) const ISSUER: &str = "test-issuer";

/// A token server with its own threads; ends when dropped.
#[derive(Debug)]
pub struct TokenServer {
    acceptor: Acceptor,
    certificate: String,
    shared: Arc<Shared>,
}

struct Shared {
    key: EcdsaKeyPair,
    /// The key's certificate as base64 of its DER, as the `x5c` header requires it.
    chain: String,
    authorization: Option<String>,
    lifetime: AtomicU64,
    issued: AtomicUsize,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Shared")
    }
}

impl TokenServer {
    /// Starts a token server that issues tokens to this user, or to everybody if the name is empty.
    pub(super) fn start(user: &str, password: &str) -> Result<Self> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::new(vec!["test-token-server".to_owned()])?;
        params.distinguished_name.push(rcgen::DnType::CommonName, "test token server");
        let certificate = params.self_signed(&key)?;
        let signing =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &key.serialize_der(), &SystemRandom::new());
        let basic = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
        let shared = Arc::new(Shared {
            key: signing.ok().context("the token server's key is refused")?,
            chain: STANDARD.encode(certificate.der()),
            authorization: (!user.is_empty()).then_some(basic),
            lifetime: AtomicU64::new(300),
            issued: AtomicUsize::new(0),
        });
        let serving = Arc::clone(&shared);
        let acceptor = Acceptor::start("the token server", move |stream| _ = serving.serve(&stream))?;
        Ok(Self { acceptor, certificate: certificate.pem(), shared })
    }

    /// The URL that issues tokens.
    pub fn realm(&self) -> String {
        format!("http://127.0.0.1:{}/token", self.acceptor.port())
    }

    /// The number of tokens issued so far.
    pub fn issued(&self) -> usize {
        self.shared.issued.load(Ordering::Relaxed)
    }

    /// Sets the lifetime of new tokens in seconds (initially 300). The registry grants 60 seconds of grace.
    pub fn set_lifetime(&self, seconds: u64) {
        self.shared.lifetime.store(seconds, Ordering::Relaxed);
    }

    pub(super) fn certificate(&self) -> &str {
        &self.certificate
    }
}

impl Shared {
    fn serve(&self, mut stream: &TcpStream) -> Option<()> {
        let head = Head::read(&mut BufReader::new(stream)).ok()??;
        let known = self.authorization.is_none() || head.header("Authorization") == self.authorization.as_deref();
        let (status, body) = if known {
            self.issued.fetch_add(1, Ordering::Relaxed);
            let lifetime = self.lifetime.load(Ordering::Relaxed);
            ("200 OK", json!({"token": self.token(head.word(1), lifetime)?, "expires_in": lifetime}))
        } else {
            ("401 Unauthorized", json!({"details": "incorrect username or password"}))
        };
        let body = body.to_string();
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(answer.as_bytes()).ok()
    }

    /// A token that grants exactly what the query requests.
    fn token(&self, target: &str, lifetime: u64) -> Option<String> {
        let query = target.split_once('?').map_or("", |(_, query)| query);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs();
        let mut service = String::new();
        let mut access = Vec::new();
        for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            let value = percent_decoded(value);
            match name {
                "service" => service = value,
                "scope" => access.extend(value.split(' ').filter_map(grant)),
                _ => {}
            }
        }
        let header = json!({"typ": "JWT", "alg": "ES256", "x5c": [self.chain]});
        let claims = json!({
            "iss": ISSUER, "sub": "", "aud": service, "iat": now, "nbf": now.saturating_sub(10), "exp": now + lifetime,
            "jti": self.issued.load(Ordering::Relaxed).to_string(), "access": access,
        });
        let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", encode(&header), encode(&claims));
        let signature = self.key.sign(&SystemRandom::new(), signed.as_bytes()).ok()?;
        Some(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }
}

/// Converts a scope such as `repository:name:pull,push` to an entry of the `access` claim.
fn grant(scope: &str) -> Option<Value> {
    let (kind, rest) = scope.split_once(':')?;
    let (name, actions) = rest.rsplit_once(':')?;
    Some(json!({"type": kind, "name": name, "actions": actions.split(',').collect::<Vec<_>>()}))
}

fn percent_decoded(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'+' => out.push(b' '),
            b'%' => {
                let digits: String = bytes.by_ref().take(2).map(char::from).collect();
                out.push(u8::from_str_radix(&digits, 16).unwrap_or(b'?'));
            }
            _ => out.push(byte),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
