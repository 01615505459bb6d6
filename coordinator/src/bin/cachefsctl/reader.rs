//! Whether anybody reads on: a command that writes only when something happens must not outlive its reader (`events --follow | head -1`).

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Ends when the pipe or socket that is standard output has no reader any more; never for a file or a terminal.
#[expect(deprecated, reason = "the sound form is an unsafe one; standard output stays open as long as the process")]
pub(crate) async fn gone() {
    // Files cannot be watched, and have no reader that goes away.
    match AsyncFd::with_interest(std::io::stdout(), Interest::ERROR) {
        Ok(stdout) => drop(stdout.ready(Interest::ERROR).await),
        Err(_) => std::future::pending().await,
    }
}
