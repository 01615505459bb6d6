//! Asks the kernel to kill other processes first when memory runs out: without this daemon every container on the host
//! would lose its files.

use std::fs;
use std::io;

const FILE: &str = "/proc/self/oom_score_adj";

/// The score that container runtimes give to processes that containers depend on. -1000 would mean never, and a host
/// without memory is no help either.
const WISHED: i32 = -999;
/// The score that a process may go back to if it was started with a higher one.
const ORDINARY: i32 = 0;

/// Lowers this process's score as far as it may be lowered; a score that is lower already, set by a service manager, stays.
pub fn lower() {
    match lower_to(|| fs::read_to_string(FILE), |score| fs::write(FILE, score)) {
        Ok(score) if score > WISHED => tracing::info!(
            "when memory runs out the kernel may end this daemon before others: it may not lower its own oom_score_adj from \
             {score} to {WISHED} (CAP_SYS_RESOURCE, or OOMScoreAdjust={WISHED} in its unit)"
        ),
        Ok(score) => tracing::debug!("oom_score_adj is {score}"),
        Err(error) => tracing::info!("{FILE} is not known: {error}"),
    }
}

/// Lowers the score; returns the one that is in effect then.
fn lower_to(read: impl Fn() -> io::Result<String>, write: impl Fn(String) -> io::Result<()>) -> io::Result<i32> {
    let present = || read()?.trim().parse::<i32>().map_err(io::Error::other);
    for score in [WISHED, ORDINARY] {
        if present()? > score && write(score.to_string()).is_ok() {
            break;
        }
    }
    present()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// The final score of a process that begins with `first` and may go down to `least`.
    fn ends_with(first: i32, least: i32) -> i32 {
        let score = Cell::new(first);
        let write = |text: String| {
            let wished = text.parse().unwrap();
            (wished >= least).then(|| score.set(wished)).ok_or_else(|| io::ErrorKind::PermissionDenied.into())
        };
        lower_to(|| Ok(format!("{}\n", score.get())), write).unwrap()
    }

    #[test]
    fn the_score_goes_as_low_as_it_may_and_never_up() {
        assert_eq!(ends_with(0, -1000), -999);
        assert_eq!(ends_with(500, -1000), -999);
        assert_eq!(ends_with(500, 0), 0);
        assert_eq!(ends_with(0, 0), 0);
        assert_eq!(ends_with(500, 300), 500);
        assert_eq!(ends_with(-500, -500), -500);
        assert_eq!(ends_with(-1000, -1000), -1000);
    }
}
