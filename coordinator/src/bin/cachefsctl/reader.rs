//! Detects that the output has no reader any more. A command that writes only now and then must not outlive its reader
//! (`events --follow | head -1`).

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Returns when standard output is a pipe or socket whose reader is gone. Never returns for a file or a terminal.
#[expect(deprecated, reason = "the sound form is an unsafe one; standard output stays open as long as the process")]
pub(crate) async fn gone() {
    // Files cannot be watched, and have no reader that could go away.
    match AsyncFd::with_interest(std::io::stdout(), Interest::ERROR) {
        Ok(stdout) => drop(stdout.ready(Interest::ERROR).await),
        Err(_) => std::future::pending().await,
    }
}
