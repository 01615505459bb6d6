//! For any bad input from users: one clear sentence that names the object, a non-zero exit code, and nothing published.
//!
//! Most tests are tables of inputs, with the words that the sentence must contain.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::cluster::{CoordinatorSpec, Ctl, Mount, MountSpec, binary};
use tests::images::archive::{Archive, Header, Kind};
use tests::images::{Compression, ImageBuilder, Layer, Pools, digest_of, hex, oddities, small};
use tests::mounts;
use tests::process::{Output, TIMEOUT, run, wait_until};
use tests::registry::{Access, Fault, FaultyRegistry, Match, Registry, Transport, free_port};
use tests::site::{Site, SiteSpec, coordinator_spec, run_to_end};

#[path = "bad_input/hosts.rs"]
mod hosts;
#[path = "bad_input/images.rs"]
mod images;
#[path = "bad_input/stores.rs"]
mod stores;

/// Checks a failure: exit code 1, exactly one sentence by `program` that contains all `words`, and no text of a crash.
fn check_refusal(output: &Output, program: &str, words: &[&str]) -> Result<()> {
    ensure!(output.code == 1, "exit {} with: {}{}", output.code, output.stdout, output.stderr);
    let start = format!("{program}: ");
    let sentences: Vec<_> = output.stderr.lines().filter_map(|line| line.strip_prefix(&start)).collect();
    ensure!(sentences.len() == 1, "{} sentences instead of one: {}", sentences.len(), output.stderr);
    ensure!(output.stderr.trim_end().ends_with(sentences[0]), "something follows the sentence: {}", output.stderr);
    for word in words {
        ensure!(sentences[0].contains(word), "the sentence lacks `{word}`: {}", sentences[0]);
    }
    for word in ["panicked", "RUST_BACKTRACE", "Some(", "Err("] {
        ensure!(!output.stderr.contains(word), "`{word}` is no word for users: {}", output.stderr);
    }
    Ok(())
}

/// Checks that nothing was published and that the attempt left nothing behind.
fn check_nothing_published(site: &Site) -> Result<()> {
    ensure!(site.images()?.is_empty(), "images: {:?}", site.images()?);
    ensure!(site.layers()?.is_empty(), "layers: {:?}", site.layers()?);
    // The last threads of a failed job may still be cleaning up.
    wait_until("an empty staging", TIMEOUT, || Ok(site.staged()?.is_empty()))
}

/// Checks that a pull is refused with a sentence that contains these words and the image's name.
fn check_pull(site: &Site, reference: &str, words: &[&str]) -> Result<()> {
    let output = site.ctl().run(&["pull", reference])?;
    let words = [&[reference], words].concat();
    check_refusal(&output, "cachefsctl", &words).with_context(|| format!("pull {reference}"))?;
    check_nothing_published(site).with_context(|| format!("after pull {reference}"))
}

/// A site with few retries, so that failures come soon.
fn impatient() -> SiteSpec {
    SiteSpec { settings: "retry_attempts = 2\n".to_owned(), ..SiteSpec::default() }
}
