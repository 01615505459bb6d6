//! The token service of a played registry.

use std::sync::PoisonError;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

use super::{PASSWORD, Play, REFRESH, USER};
use crate::registry::scripted::{Reply, Seen};

/// `text` with each `%XX` decoded.
fn decoded(text: &str) -> String {
    let mut parts = text.split('%');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.get(..2).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => out.extend([byte as char].iter().copied().chain(part[2..].chars())),
            None => out.extend(["%", part]),
        }
    }
    out
}

impl Play {
    pub(super) fn tokens(&self, seen: &Seen) -> Reply {
        let kind = self.behaviour.get("token");
        let path = seen.path();
        let refused = |status| Reply { status, ..Reply::body("application/json", r#"{"errors":[{"code":"DENIED"}]}"#) };
        match kind {
            "401" | "403" | "404" | "503" => return refused(kind.parse().unwrap_or(403)),
            "503 once" if self.happens("503", 1) => return refused(503),
            "429 once" if self.happens("429", 1) => return refused(429).with("Retry-After", "1"),
            "html" => return Reply::body("text/html", "<html>log in</html>"),
            "redirect here" if !path.starts_with("/token/") => {
                return Reply::redirect(&path.replacen("/token", "/token/", 1)).with("Set-Cookie", "a=b");
            }
            "redirect elsewhere" => return Reply::redirect(&format!("{}/token", self.place(2))),
            "post only" if seen.method() != "POST" => return refused(405),
            _ => {}
        }
        let body = String::from_utf8_lossy(&seen.body).into_owned();
        let basic = format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")));
        let shown = seen.authorization();
        let knows = shown == Some(&basic) || body.contains(PASSWORD) || body.contains(REFRESH);
        let is_nobody = shown.is_none() && body.is_empty();
        if !knows && !is_nobody {
            return refused(401);
        }
        let is_good = knows || self.is("credentials", "public");
        let scopes = decoded(&format!("{path}&{body}").replace('+', " "));
        self.issue(kind, if is_good { &scopes } else { "" })
    }

    fn issue(&self, kind: &str, scopes: &str) -> Reply {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.issued += 1;
        let token = format!("token-{}", progress.issued);
        let uses = if kind == "two requests long" { 2 } else { usize::MAX };
        progress.tokens.insert(token.clone(), (uses, scopes.to_owned()));
        let answer = match kind {
            "access_token" => json!({"access_token": token, "expires_in": 300}),
            "both" => {
                json!({"token": token, "access_token": token, "expires_in": 300, "issued_at": "2020-01-01T00:00:00Z"})
            }
            "empty token and access_token" => json!({"token": "", "access_token": token, "expires_in": 300}),
            "expires absent" => json!({"token": token}),
            "expires 0" => json!({"token": token, "expires_in": 0}),
            "expires as text" => json!({"token": token, "expires_in": "300"}),
            "expires in 1" => json!({"token": token, "expires_in": 1}),
            "none" => json!({"expires_in": 300}),
            _ => json!({"token": token, "expires_in": 300}),
        };
        Reply::body("application/json", answer.to_string())
    }
}
