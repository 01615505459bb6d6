//! Brings traces to the coordinator. They wait in the spool while it does not answer; a host reads on without it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use coordinator_api::client::{Client, ClientError};
use coordinator_api::error::ErrorCode;

use super::Recorder;

/// How often starts are looked at.
const TICK: Duration = Duration::from_millis(250);
/// A coordinator that takes longer to accept a trace is asked again later.
const PATIENCE: Duration = Duration::from_secs(20);
/// The first pause after the coordinator did not answer; it doubles up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// The traces in a spool, oldest first.
pub(super) fn waiting(spool: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(spool).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "trace"));
    paths.sort_unstable();
    paths
}

/// Ends starts and delivers their traces; never returns. Without a coordinator they stay in the spool, a bounded number.
pub fn run(recorder: &Arc<Recorder>, coordinator: Option<Client>) {
    let runtime = coordinator.and_then(|client| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.inspect_err(|error| tracing::error!("traces are not delivered: {error}")).ok()?;
        Some((runtime, client))
    });
    let (mut pause, mut not_before) = (PAUSE, Instant::now());
    loop {
        std::thread::sleep(TICK);
        recorder.tick(Instant::now());
        let Some((runtime, client)) = &runtime else { continue };
        if Instant::now() < not_before {
            continue;
        }
        match runtime.block_on(deliver(client, recorder.spool())) {
            Ok(()) => pause = PAUSE,
            Err(error) => {
                tracing::debug!("traces wait for the coordinator: {error}");
                not_before = Instant::now() + pause;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}

/// Sends what waits; the first trace that the coordinator cannot take now ends the round.
async fn deliver(client: &Client, spool: &Path) -> Result<(), String> {
    for path in waiting(spool) {
        let Ok(trace) = std::fs::read(&path) else { continue };
        let sent = tokio::time::timeout(PATIENCE, client.send_trace(trace)).await;
        match sent.map_err(|_| "it takes too long to accept a trace".to_owned())? {
            Ok(_) => {}
            Err(error) if is_final(&error) => {
                tracing::warn!("the coordinator refuses a trace, which is dropped: {error}")
            }
            Err(error) => return Err(error.to_string()),
        }
        std::fs::remove_file(&path).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Whether the same trace would be refused again: the image is gone, or the trace is not valid.
fn is_final(error: &ClientError) -> bool {
    error.code().is_some_and(|code| {
        // A token that is not good now may be replaced by one that is.
        !matches!(
            code,
            ErrorCode::Busy | ErrorCode::Standby | ErrorCode::Internal | ErrorCode::Full | ErrorCode::Unauthorized
        )
    })
}
