//! A container that a real engine starts: the time until it does useful work.

use std::time::Instant;

use anyhow::Result;

use crate::application::{Application, READY, Useful};
use crate::start;

/// Whether the image is pulled first, within the measured time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pull {
    First,
    No,
}

/// Drops the page cache, runs the application of an image, and returns the seconds until it was useful. `docker` runs the
/// engine's client; the container is gone afterwards.
pub(crate) fn seconds(
    docker: impl Fn(&[&str]) -> Result<String>,
    reference: &str,
    application: &Application,
    pull: Pull,
) -> Result<f64> {
    let ready = tempfile::Builder::new().prefix("ready-").tempdir()?;
    application.prepare(ready.path())?;
    let volume = format!("{}:{READY}", ready.path().display());
    let mut run = vec!["run", "--network", "none", "--volume", &volume];
    run.push(if matches!(application.useful, Useful::Exits) { "--rm" } else { "--detach" });
    run.push(reference);
    run.extend(application.command);
    start::make_cold()?;
    let begin = Instant::now();
    if pull == Pull::First {
        docker(&["pull", "--quiet", reference])?;
    }
    let container = docker(&run)?;
    application.wait_for_answer(ready.path(), || Ok(()))?;
    let seconds = begin.elapsed().as_secs_f64();
    if matches!(application.useful, Useful::Answers { .. }) {
        docker(&["rm", "--force", &container])?;
    }
    Ok(seconds)
}
