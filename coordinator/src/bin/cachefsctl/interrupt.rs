//! Ends that are asked for from outside: SIGINT from the keyboard, SIGTERM from whoever started this.
//!
//! A command that has something to leave in order watches for them; all others just end. SIGHUP is not watched for: `nohup` has it
//! ignored, which a handler would undo.

use coordinator_api::report::{EXIT_INTERRUPTED, EXIT_TERMINATED};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The command ended because somebody wanted it to.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Interrupted {
    message: String,
    /// The exit code that shells know the signal by.
    pub(crate) exit: u8,
}

impl Interrupted {
    /// What to say about it.
    pub(crate) fn new(exit: u8, message: String) -> Interrupted {
        Interrupted { message, exit }
    }
}

/// Watches for both signals from when it is made.
#[derive(Debug)]
pub(crate) struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupts {
    /// Begins to watch; from now on neither signal ends the process.
    pub(crate) fn watch() -> std::io::Result<Interrupts> {
        Ok(Interrupts { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for one; gives the exit code that shells know it by.
    pub(crate) async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => EXIT_INTERRUPTED,
            _ = self.terminate.recv() => EXIT_TERMINATED,
        }
    }
}
