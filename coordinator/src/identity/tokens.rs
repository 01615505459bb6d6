//! Tokens: who holds one may do what it says, until it expires or is revoked.
//!
//! A token is `cfs_<id>_<secret>`: 48 and 256 random bits in hexadecimal. The id finds its record; of the secret only the
//! BLAKE3 digest is kept (256 random bits need no slow hash: they cannot be guessed), and compared in constant time. A
//! token is shown once, when it is made.
//!
//! `kept` guards the records and is not held during I/O. Creation and revocation are on disk before they are answered. When a token was
//! last used is written down at most every [`USE_WRITTEN`].

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use coordinator_api::access::{NewToken, Role, TokenCreated, TokenInfo};
use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::identity::caller::{Caller, Images, Proof};
use crate::identity::image_pattern::BadPattern;
use crate::state::state_db::{Durability, StateDb, StateError, Table};

/// The beginning of every token: tools that look for leaked secrets know such marks.
const MARK: &str = "cfs_";
/// Random bytes of an id.
const ID_BYTES: usize = 6;
/// Random bytes of a secret.
const SECRET_BYTES: usize = 32;
/// The longest name, in bytes.
const NAME_MAX: usize = 64;
/// How often the use of a token is noted in memory.
const USE_NOTED: SignedDuration = SignedDuration::from_secs(60);
/// How often the use of a token is written to the database.
const USE_WRITTEN: SignedDuration = SignedDuration::from_mins(10);

/// Why a token operation fails.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// The name is not valid.
    #[error("{0:?} is no name for a token: use 1 to {NAME_MAX} letters, digits, dots, dashes and underscores")]
    BadName(String),
    /// The name is taken.
    #[error("there is a token {0} already: choose another name, or revoke it first")]
    Exists(String),
    /// There is no token of this name.
    #[error("there is no token {0}: cachefsctl token list shows those there are")]
    Unknown(String),
    /// A pattern is not valid.
    #[error(transparent)]
    Pattern(#[from] BadPattern),
    /// The patterns would restrict nobody.
    #[error("an admin's token cannot be limited to images: an admin could make another one; leave --images out")]
    RestrictedAdmin,
    /// The lifetime is not valid.
    #[error("a token must live for at least a second and at most 100 years")]
    BadLife,
    /// The machine gives no random numbers.
    #[error("this machine gives no random numbers: {0}")]
    Random(String),
    /// The database failed.
    #[error(transparent)]
    StateDb(#[from] StateError),
}

/// Why a token is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// Mistyped, revoked, or made for another store.
    #[error("the token is not known here: it was revoked, mistyped, or made for another store; ask an admin for one")]
    Unknown,
    /// The token has expired.
    #[error("token {0} has expired: ask an admin for a new one")]
    Expired(String),
}

/// What is kept of a token.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct TokenRecord {
    id: String,
    name: String,
    role: Role,
    images: Images,
    /// BLAKE3 of the secret, in hexadecimal.
    digest: String,
    created_at: Timestamp,
    created_by: String,
    expires_at: Option<Timestamp>,
    last_used_at: Option<Timestamp>,
    /// The last use that was written down.
    #[serde(default, skip)]
    written: Option<Timestamp>,
}

impl TokenRecord {
    fn info(&self) -> TokenInfo {
        TokenInfo {
            name: self.name.clone(),
            id: self.id.clone(),
            role: self.role,
            images: self.images.patterns(),
            created_at: self.created_at,
            created_by: self.created_by.clone(),
            expires_at: self.expires_at,
            last_used_at: self.last_used_at,
        }
    }

    fn is_expired(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|expires| expires <= now)
    }
}

/// A caller who presented a good token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The caller.
    pub caller: Caller,
    /// The token's id, if its use is to be written down ([`Tokens::write_use`]).
    pub to_write: Option<String>,
}

/// All tokens.
pub struct Tokens {
    state_db: Arc<dyn StateDb>,
    kept: Mutex<HashMap<String, TokenRecord>>,
}

/// Whether a text may be the name of a token or a host. Names appear in messages, tables and paths.
pub fn is_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=NAME_MAX).contains(&name.len()) && name.bytes().all(fits)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn random<const N: usize>() -> Result<String, TokenError> {
    let mut bytes = [0; N];
    rand::TryRng::try_fill_bytes(&mut rand::rngs::SysRng, &mut bytes)
        .map_err(|error| TokenError::Random(error.to_string()))?;
    Ok(hex(&bytes))
}

/// When a token that lives for `seconds` expires.
fn expiry(seconds: Option<u64>, now: Timestamp) -> Result<Option<Timestamp>, TokenError> {
    const CENTURY: u64 = 100 * 366 * 86_400;
    let Some(seconds) = seconds else { return Ok(None) };
    let life = (1..=CENTURY).contains(&seconds).then(|| Duration::from_secs(seconds)).ok_or(TokenError::BadLife)?;
    now.checked_add(life).map(Some).map_err(|_| TokenError::BadLife)
}

impl Tokens {
    /// Reads the tokens that the database keeps.
    pub fn open(state_db: Arc<dyn StateDb>) -> Result<Tokens, StateError> {
        let tokens = Tokens { state_db, kept: Mutex::default() };
        tokens.reload()?;
        Ok(tokens)
    }

    /// Reads the tokens again: another coordinator may have changed them.
    pub fn reload(&self) -> Result<(), StateError> {
        let mut kept = HashMap::new();
        for (key, json) in self.state_db.records(Table::Tokens)? {
            match serde_json::from_slice::<TokenRecord>(&json) {
                Ok(mut record) => {
                    record.written = record.last_used_at;
                    kept.insert(record.id.clone(), record);
                }
                Err(error) => tracing::warn!("token {} in the database is left out: {error}", hex(&key)),
            }
        }
        *self.kept.lock() = kept;
        Ok(())
    }

    /// For a standby: when this returns, everything that the leader has made and revoked by now is known. Blocks on the shared disk.
    pub fn follow_leader(&self) -> Result<(), StateError> {
        self.state_db.follow_leader(&|| self.reload())
    }

    /// Makes a token on behalf of `creator`. Blocks on the database.
    pub fn create(&self, new: NewToken, creator: &Caller, now: Timestamp) -> Result<TokenCreated, TokenError> {
        if !is_name(&new.name) {
            return Err(TokenError::BadName(new.name));
        }
        let images = Images::new(new.images)?;
        if new.role == Role::Admin && images.is_restricted() {
            return Err(TokenError::RestrictedAdmin);
        }
        let (id, secret) = (random::<ID_BYTES>()?, random::<SECRET_BYTES>()?);
        let record = TokenRecord {
            id: id.clone(),
            name: new.name,
            role: new.role,
            images,
            digest: blake3::hash(secret.as_bytes()).to_hex().to_string(),
            created_at: now,
            created_by: creator.actor(),
            expires_at: expiry(new.expires_seconds, now)?,
            last_used_at: None,
            written: None,
        };
        let info = record.info();
        {
            let mut kept = self.kept.lock();
            if kept.values().any(|other| other.name == record.name) {
                return Err(TokenError::Exists(record.name));
            }
            kept.insert(id.clone(), record.clone());
        }
        if let Err(error) = self.write(&record, Durability::Synced) {
            self.kept.lock().remove(&id);
            return Err(error.into());
        }
        Ok(TokenCreated { info, token: format!("{MARK}{id}_{secret}") })
    }

    fn write(&self, record: &TokenRecord, durability: Durability) -> Result<(), StateError> {
        // A record is made of texts and numbers only: it can always be written as JSON.
        let json = serde_json::to_vec(record).unwrap_or_default();
        self.state_db.change_records(Table::Tokens, &[(record.id.as_bytes(), Some(&json))], durability)
    }

    /// The tokens, sorted by name.
    pub fn list(&self) -> Vec<TokenInfo> {
        let mut list: Vec<_> = self.kept.lock().values().map(TokenRecord::info).collect();
        list.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        list
    }

    /// Whether there is a token of that name which is still good.
    pub fn is_good(&self, name: &str, now: Timestamp) -> bool {
        self.kept.lock().values().any(|record| record.name == name && !record.is_expired(now))
    }

    /// The names of the tokens that are still good.
    pub fn good_names(&self, now: Timestamp) -> HashSet<String> {
        let kept = self.kept.lock();
        kept.values().filter(|record| !record.is_expired(now)).map(|record| record.name.clone()).collect()
    }

    /// Revokes a token: from now on it is refused. Blocks on the database.
    pub fn revoke(&self, name: &str) -> Result<TokenInfo, TokenError> {
        let removed = {
            let mut kept = self.kept.lock();
            let id = kept.values().find(|record| record.name == name).map(|record| record.id.clone());
            id.and_then(|id| kept.remove(&id))
        };
        let record = removed.ok_or_else(|| TokenError::Unknown(name.to_owned()))?;
        let gone = self.state_db.change_records(Table::Tokens, &[(record.id.as_bytes(), None)], Durability::Synced);
        if let Err(error) = gone {
            // The token would be back after a restart: better to say so, and to have it back now.
            self.kept.lock().insert(record.id.clone(), record);
            return Err(error.into());
        }
        Ok(record.info())
    }

    /// The caller who holds this token.
    pub fn verify(&self, token: &str, now: Timestamp) -> Result<Verified, Rejected> {
        let (id, secret) = token.strip_prefix(MARK).and_then(|rest| rest.split_once('_')).ok_or(Rejected::Unknown)?;
        let shown = blake3::hash(secret.as_bytes());
        let mut kept = self.kept.lock();
        let record = kept.get_mut(id).ok_or(Rejected::Unknown)?;
        // Digests of this crate compare in constant time.
        if !blake3::Hash::from_hex(&record.digest).is_ok_and(|known| known == shown) {
            return Err(Rejected::Unknown);
        }
        if record.is_expired(now) {
            return Err(Rejected::Expired(record.name.clone()));
        }
        let since = |then: Option<Timestamp>| then.map_or(SignedDuration::MAX, |then| now.duration_since(then));
        if since(record.last_used_at) >= USE_NOTED {
            record.last_used_at = Some(now);
        }
        let to_write = (since(record.written) >= USE_WRITTEN).then(|| {
            record.written = Some(now);
            record.id.clone()
        });
        let proof = Proof::Token { name: record.name.clone() };
        Ok(Verified { caller: Caller { proof, role: record.role, images: record.images.clone() }, to_write })
    }

    /// Writes down when a token was last used. Blocks on the database.
    pub fn write_use(&self, id: &str) {
        let Some(record) = self.kept.lock().get(id).cloned() else { return };
        if let Err(error) = self.write(&record, Durability::Eventual) {
            tracing::warn!("when token {} was last used is not written down: {error}", record.name);
        }
        // A token that was revoked meanwhile must not come back.
        if !self.kept.lock().contains_key(id) {
            let gone = self.state_db.change_records(Table::Tokens, &[(id.as_bytes(), None)], Durability::Synced);
            if let Err(error) = gone {
                tracing::error!("token {} was revoked but may be back after a restart: {error}", record.name);
            }
        }
    }
}

#[cfg(test)]
mod tests;
