//! Signals that ask for an end: SIGINT from the keyboard, SIGTERM from whoever started this.
//!
//! Only commands that have something to clean up or to report watch for them; all others just end. SIGHUP is not watched for:
//! `nohup` makes the process ignore it, and a handler would undo that.

use coordinator_api::report::{EXIT_INTERRUPTED, EXIT_TERMINATED};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The error of a command that a signal ended.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Interrupted {
    message: String,
    /// The exit code by which shells know the signal.
    pub(crate) exit: u8,
}

impl Interrupted {
    /// An interruption with its exit code and message.
    pub(crate) fn new(exit: u8, message: String) -> Interrupted {
        Interrupted { message, exit }
    }
}

/// Watches for both signals from its creation on.
#[derive(Debug)]
pub(crate) struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupts {
    /// Starts watching. From now on, neither signal ends the process.
    pub(crate) fn watch() -> std::io::Result<Interrupts> {
        Ok(Interrupts { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for a signal. Returns the exit code by which shells know it.
    pub(crate) async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => EXIT_INTERRUPTED,
            _ = self.terminate.recv() => EXIT_TERMINATED,
        }
    }
}
