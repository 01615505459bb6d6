//! The one shape of a refusal: `{"error": {"code", "message"}}`.
//!
//! Every answer outside 2xx has this body. `code` is for programs and stable within `/v1`; `message` is one sentence
//! for people, which names the object and the remedy.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The body of every answer outside 2xx.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong, for a program and for a person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// The kind of refusal.
    pub code: ErrorCode,
    /// One sentence that names the object and the remedy.
    pub message: String,
}

/// The kinds of refusal, named for what the caller can do about them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request itself is wrong; sending it again will not help.
    InvalidRequest,
    /// The named image or job does not exist.
    NotFound,
    /// The caller is unknown: show a valid token.
    Unauthorized,
    /// The caller is known, but may not do this.
    Forbidden,
    /// The object is in a state that does not allow this.
    Conflict,
    /// The wanted state was not reached within the time given.
    Timeout,
    /// This coordinator is a standby; another one leads the store.
    Standby,
    /// Too many such requests at once: send it again after the seconds in `Retry-After`.
    Busy,
    /// The request's body is too long.
    TooLarge,
    /// The shared store or the coordinator's own disk has no space left.
    Full,
    /// Anything else: the coordinator's log says more.
    #[serde(other)]
    Internal,
}
