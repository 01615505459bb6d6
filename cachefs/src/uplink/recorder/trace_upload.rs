//! Uploads traces to the coordinator. They wait in the spool while it does not answer; a host reads on without it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coordinator_api::client::{Client, ClientError};
use coordinator_api::error::ErrorCode;

use super::Recorder;
use super::spool::waiting;
use crate::uplink::coordinator::{AskError, Coordinator};

/// How often to look which starts have ended.
const TICK: Duration = Duration::from_millis(250);
/// A coordinator that takes longer to accept a trace is asked again later.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(20);
/// The first pause after the coordinator did not answer; it doubles up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Ends starts and uploads their traces; never returns. Without a coordinator the traces stay in the spool, a bounded
/// number of them.
pub fn run(recorder: &Arc<Recorder>, client: Option<Client>) {
    let coordinator = client.and_then(|client| {
        Coordinator::new(client).inspect_err(|error| tracing::error!("traces are not delivered: {error}")).ok()
    });
    let (mut pause, mut not_before) = (PAUSE, Instant::now());
    loop {
        std::thread::sleep(TICK);
        recorder.tick(Instant::now());
        let Some(coordinator) = &coordinator else { continue };
        if Instant::now() < not_before {
            continue;
        }
        match deliver(coordinator, recorder.spool()) {
            Ok(()) => pause = PAUSE,
            Err(error) => {
                tracing::debug!("traces wait for the coordinator: {error}");
                not_before = Instant::now() + pause;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}

/// Uploads the waiting traces. One at which the coordinator fails waits for the next round, and does not hold the others up.
fn deliver(coordinator: &Coordinator, spool: &Path) -> Result<(), String> {
    let mut delivered = Ok(());
    for path in waiting(spool) {
        let Ok(trace) = std::fs::read(&path) else { continue };
        match coordinator.ask(UPLOAD_TIMEOUT, async |client| client.send_trace(trace).await) {
            Ok(_) => {}
            Err(AskError::Client(error)) if is_final(&error) => {
                tracing::warn!("the coordinator refuses a trace, which is dropped: {error}")
            }
            Err(AskError::Client(error)) if is_of_this_trace(&error) => {
                delivered = Err(error.to_string());
                continue;
            }
            Err(error) => return Err(error.to_string()),
        }
        std::fs::remove_file(&path).map_err(|error| error.to_string())?;
    }
    delivered
}

/// Whether the same trace would be refused again: the image is gone, the trace is not valid, or it is not for this host.
fn is_final(error: &ClientError) -> bool {
    use ErrorCode::{Conflict, Forbidden, InvalidRequest, NotFound, TooLarge};
    // A token that is not accepted now may be replaced by one that is, and what came too late may come in time.
    error.code().is_some_and(|code| matches!(code, Conflict | Forbidden | InvalidRequest | NotFound | TooLarge))
}

/// Whether others may be taken although this one is not now: an index that it needs may be damaged.
fn is_of_this_trace(error: &ClientError) -> bool {
    error.code() == Some(ErrorCode::Internal)
}

#[cfg(test)]
mod tests {
    use coordinator_api::error::ErrorDetail;

    use super::*;

    #[test]
    fn a_trace_is_dropped_only_where_it_would_be_refused_again() {
        let refused = |code| ClientError::Refused(ErrorDetail { code, message: String::new() });
        for code in [ErrorCode::NotFound, ErrorCode::InvalidRequest, ErrorCode::TooLarge, ErrorCode::Forbidden] {
            assert!(is_final(&refused(code)), "{code:?}");
        }
        for code in [ErrorCode::Busy, ErrorCode::Standby, ErrorCode::Timeout, ErrorCode::Unauthorized, ErrorCode::Full]
        {
            assert!(!is_final(&refused(code)) && !is_of_this_trace(&refused(code)), "{code:?}");
        }
        let failed = refused(ErrorCode::Internal);
        assert!(!is_final(&failed) && is_of_this_trace(&failed), "it waits, and the others do not");
    }
}
