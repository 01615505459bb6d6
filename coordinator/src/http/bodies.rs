//! Request bodies that are read into memory as a whole.
//!
//! No body is read before its sender is known and authorised. A body is limited in length and in time, and the memory of all
//! bodies together is limited, too ([`Quota`]).

use std::time::Duration;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use coordinator_api::error::ErrorCode;
use futures::StreamExt;

use crate::http::error::ApiError;
use crate::http::quota::{Holder, Quota, Share};

/// Memory for the bodies of all callers, and of one caller, in bytes.
const ALL: u64 = 64 << 20;
const OF_ONE: u64 = 32 << 20;
/// How long a request waits for memory.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long a body may take to arrive. It holds its memory all that time.
const ARRIVAL: Duration = Duration::from_secs(30);
/// A body that is too long is read up to this many times its limit, so that the client gets to read the refusal.
const DRAIN: usize = 4;

/// A quota for bodies.
pub fn room() -> Quota {
    Quota::new(ALL, OF_ONE, TIMEOUT)
}

/// A body, with its share of the quota.
pub struct Gathered {
    /// Its bytes.
    pub bytes: Bytes,
    _share: Share,
}

/// Reads a body of at most `limit` bytes. `what` names it in error messages.
pub async fn gather(room: &Quota, holder: &Holder, body: Body, limit: usize, what: &str) -> Result<Gathered, ApiError> {
    let announced = hyper::body::Body::size_hint(&body).upper();
    let weight = announced.unwrap_or(u64::MAX).min(limit as u64);
    let share = room.take(holder, weight).await?;
    let late = |_| ApiError::new(ErrorCode::Timeout, format!("{what} must arrive within 30 seconds: send it again"));
    let bytes = tokio::time::timeout(ARRIVAL, receive(body, limit, what)).await.map_err(late)??;
    Ok(Gathered { bytes, _share: share })
}

async fn receive(body: Body, limit: usize, what: &str) -> Result<Bytes, ApiError> {
    let (mut bytes, mut received) = (BytesMut::new(), 0);
    let mut parts = body.into_data_stream();
    while let Some(part) = parts.next().await {
        let part = part.map_err(|error| ApiError::invalid(format!("{what} broke off ({error}): send it again")))?;
        received += part.len();
        if received <= limit {
            bytes.extend_from_slice(&part);
        } else if received > limit.saturating_mul(DRAIN) {
            break;
        }
    }
    if received <= limit {
        Ok(bytes.freeze())
    } else {
        Err(ApiError::new(ErrorCode::TooLarge, format!("{what} is at most {limit} bytes long: this one is refused")))
    }
}
