//! The files of `deploy/`: manifests, chart, units and snippets, checked by `scripts/check-deploy` with helm, kubectl, the
//! Kubernetes schemas and systemd's own verifier.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use tests::process::{Output, run};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Runs the check on a directory; nothing if its tools cannot be had here, which it says.
fn check(directory: &Path) -> Result<Option<Output>> {
    let output = run(Command::new("bash").arg(root().join("scripts/check-deploy")).arg(directory))?;
    let lacking = ["could not install", "could not download", "needs Python's venv"];
    if output.code == 1 && lacking.iter().any(|words| output.stderr.contains(words)) {
        eprintln!(
            "not checked, for the tools come from a registry of packages that does not answer: {}",
            output.stderr
        );
        return Ok(None);
    }
    Ok(Some(output))
}

#[test]
fn manifests_chart_units_and_snippets_are_right_and_agree() {
    let Some(output) = check(&root().join("deploy")).unwrap() else { return };
    assert_eq!(output.code, 0, "{}{}", output.stdout, output.stderr);
    assert!(output.stdout.contains("ok    manifests and chart agree"), "{}", output.stdout);
}

/// Replaces text in one file of a copy of `deploy/`, and checks the copy.
fn planted(file: &str, from: &str, to: &str) -> Result<Option<Output>> {
    let directory = tempfile::tempdir()?;
    run(Command::new("cp").arg("-a").arg(root().join("deploy")).arg(directory.path()))?.ok()?;
    let path = directory.path().join("deploy").join(file);
    let text = std::fs::read_to_string(&path)?;
    ensure!(text.contains(from), "{file} has no `{from}`");
    std::fs::write(&path, text.replacen(from, to, 1))?;
    check(&directory.path().join("deploy"))
}

#[test]
fn a_fault_in_them_is_found() {
    for (file, from, to, said) in [
        ("systemd/cachefs-mount.service", "--config", "--configuration", "has no --configuration"),
        (
            "helm/cachefs/templates/statefulset.yaml",
            "apiVersion: apps/v1",
            "apiVersion: apps/v1beta9",
            "FAILED chart-default",
        ),
    ] {
        let Some(output) = planted(file, from, to).unwrap() else { return };
        assert_eq!(output.code, 1, "{file}: {}", output.stdout);
        assert!(output.stdout.contains("FAILED") && output.stdout.contains(said), "{file}: {}", output.stdout);
    }
}
