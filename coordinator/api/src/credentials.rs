//! What a client shows to a coordinator, and which authorities it trusts.
//!
//! A token is a name and 256 random bits: `cfs_<id>_<secret>`. It never appears in a log, an error or debug output, and
//! it is sent only where nobody can overhear it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A bearer token.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

/// A text that cannot be a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is not one line of printable characters; copy the token as cachefsctl token create showed it")]
pub struct BadToken;

impl FromStr for Token {
    type Err = BadToken;

    /// Accepts any text that may stand in a header; only the coordinator knows whether it is a token.
    fn from_str(text: &str) -> Result<Token, BadToken> {
        let text = text.trim();
        let is_word = !text.is_empty() && text.len() <= 4096 && text.bytes().all(|byte| byte.is_ascii_graphic());
        if is_word { Ok(Token(text.to_owned())) } else { Err(BadToken) }
    }
}

impl Token {
    /// The text itself, for the one header that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// Where a token comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenSource {
    /// The token itself.
    Given(Token),
    /// A file that holds it and is read again for each request: a new token needs no restart.
    File(PathBuf),
}

/// A token that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("the token in {} cannot be used: {why}", path.display())]
pub struct TokenError {
    path: PathBuf,
    why: String,
}

impl TokenSource {
    /// The token as it is now.
    pub(crate) fn read(&self) -> Result<Token, TokenError> {
        match self {
            TokenSource::Given(token) => Ok(token.clone()),
            TokenSource::File(path) => {
                let unusable = |why: String| TokenError { path: path.clone(), why };
                let text = std::fs::read_to_string(path).map_err(|error| unusable(error.to_string()))?;
                text.parse().map_err(|error: BadToken| unusable(error.to_string()))
            }
        }
    }
}

/// What a client shows, and which authorities it trusts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    /// The token; a caller on a unix socket is known without one.
    pub token: Option<TokenSource>,
    /// A PEM file with authorities that are trusted besides the system's, or with the coordinator's own certificate.
    pub ca_certificate: Option<PathBuf>,
}

impl Credentials {
    /// A token in a file goes before a token that was given directly.
    pub fn new(file: Option<&Path>, given: Option<Token>, ca_certificate: Option<&Path>) -> Credentials {
        let file = file.map(|path| TokenSource::File(path.to_owned()));
        let token = file.or(given.map(TokenSource::Given));
        Credentials { token, ca_certificate: ca_certificate.map(Path::to_owned) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_each_time_and_nothing_shows_the_token() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        let source = Credentials::new(Some(&path), "given".parse().ok(), None).token.unwrap();
        assert!(source.read().unwrap_err().to_string().contains("/token cannot be used: "));
        for text in ["cfs_one\n", "cfs_two"] {
            std::fs::write(&path, text).unwrap();
            let token = source.read().unwrap();
            assert_eq!(token.expose(), text.trim());
            assert_eq!(format!("{token:?}"), "(secret)");
        }
        std::fs::write(&path, "two words").unwrap();
        let error = source.read().unwrap_err().to_string();
        assert!(error.contains("copy the token") && !error.contains("two words"), "{error}");
    }
}
