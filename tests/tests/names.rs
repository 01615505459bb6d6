//! Names of images: what this project takes and refuses, beside what docker and skopeo take and refuse.

use std::process::Command;

use anyhow::Result;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use store::image::ImageRef;
use tests::process::run;

/// Whether docker takes a name. It reads names before it looks for its daemon, and there is none here.
fn docker_takes(name: &str) -> Result<bool> {
    let mut command = Command::new("docker");
    command.args(["--host", "unix:///nonexistent/docker.sock", "pull", "--", name]);
    let output = run(&mut command)?.stderr;
    let is_refused = ["invalid", "unsupported", "must not be"].iter().any(|word| output.contains(word));
    anyhow::ensure!(is_refused != output.contains("Cannot connect to the Docker daemon"), "{name:?}: {output}");
    Ok(!is_refused)
}

/// Whether skopeo takes a name. It reads the name of the source before that of the target, and this target is none.
fn skopeo_takes(name: &str) -> Result<bool> {
    let output = run(Command::new("skopeo").args(["copy", "--", &format!("docker://{name}"), "nowhere:"]))?.stderr;
    let is_refused = output.contains("Invalid source name");
    anyhow::ensure!(is_refused || output.contains("Invalid destination name"), "{name:?}: {output}");
    Ok(!is_refused)
}

/// Names and what is nearly one, made of the grammar's parts.
fn candidates() -> impl Strategy<Value = String> {
    let host = prop_oneof![
        4 => Just(String::new()),
        1 => Just("localhost/".to_owned()),
        1 => Just("docker.io/".to_owned()),
        2 => "[a-zA-Z0-9-]{1,3}(\\.[a-zA-Z0-9_-]{1,3}){0,2}(:[0-9]{1,4}|:|:x|:\\+1)?/",
    ];
    let path = "[a-z0-9]{1,2}([._-]{0,3}[a-zA-Z0-9]{1,2}){0,2}(/{1,2}[a-z0-9._-]{1,4}){0,2}/?";
    let tag = prop_oneof![3 => Just(String::new()), 2 => ":[a-zA-Z0-9_.-]{0,4}", 1 => ":[ -~]{0,3}"];
    let digest = prop_oneof![
        6 => Just(String::new()),
        2 => "[0-9a-f]{64}".prop_map(|hex| format!("@sha256:{hex}")),
        1 => "@(sha256|sha512|md5):[0-9a-fA-F]{0,64}",
    ];
    (host, path, tag, digest).prop_map(|(host, path, tag, digest)| format!("{host}{path}{tag}{digest}"))
}

/// Ports that no connection can be made to are refused here and let pass there.
fn has_odd_port(name: &str) -> bool {
    let host = name.split_once('/').map_or("", |(host, _)| host);
    host.split_once(':').is_some_and(|(_, port)| port.parse::<u16>() == Ok(0))
}

#[test]
fn names_are_taken_and_refused_as_docker_and_skopeo_do() {
    let mut runner = TestRunner::new_with_rng(Config::default(), TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let strategy = candidates();
    let (mut taken, mut refused, mut wrong) = (0, 0, Vec::new());
    for _ in 0..200 {
        let name = strategy.new_tree(&mut runner).unwrap().current();
        let parsed = name.parse::<ImageRef>();
        if parsed.is_ok() {
            taken += 1
        } else {
            refused += 1
        }
        if has_odd_port(&name) {
            assert!(parsed.is_err(), "{name:?}");
            continue;
        }
        let has_both = parsed.as_ref().is_ok_and(|image| image.tag().is_some() && image.digest().is_some());
        let (docker, skopeo) = (docker_takes(&name).unwrap(), skopeo_takes(&name).unwrap());
        // skopeo does not support names with both, and knows no host by its capitals alone.
        let is_bare = |host: &str| host.contains(char::is_uppercase) && !host.contains(['.', ':']);
        let is_beyond = has_both || parsed.as_ref().is_ok_and(|image| is_bare(image.registry()));
        if docker != parsed.is_ok() || (skopeo != parsed.is_ok() && !is_beyond) {
            wrong.push(format!("{name:?}: docker {docker}, skopeo {skopeo}, here {parsed:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} of 200: {}", wrong.len(), wrong.join("\n"));
    assert!(taken > 5 && refused > 100, "{taken} were taken and {refused} refused: these names show nothing");
}

#[test]
fn the_longest_and_the_oddest_names_are_taken_as_docker_takes_them() {
    let digest = format!("@sha256:{}", "f".repeat(64));
    for (name, expected) in [
        // docker 20.10 counts the host as well, the grammar of today the path alone: both take these.
        (format!("r.io/{}", "a".repeat(250)), true),
        (format!("r.io/{}", "a".repeat(256)), false),
        (format!("a:{}", "t".repeat(128)), true),
        (format!("a:{}", "t".repeat(129)), false),
        ("f".repeat(64), false),
        (format!("docker.io/{}", "f".repeat(64)), true),
        (format!("a:1{digest}"), true),
        (format!("a{}", digest.to_uppercase()), false),
        ("LOCALDOMAIN/a".to_owned(), true),
        ("Upper/Case".to_owned(), false),
        ("a__b/c---d".to_owned(), true),
        ("a___b".to_owned(), false),
        (" a".to_owned(), false),
        ("a\n".to_owned(), false),
    ] {
        assert_eq!(name.parse::<ImageRef>().is_ok(), expected, "{name:?}");
        assert_eq!(docker_takes(&name).unwrap(), expected, "docker and {name:?}");
    }
    // docker knows a second algorithm, which no store of ours names anything by: it is refused by name.
    let other = format!("a@sha512:{}", "f".repeat(128));
    let error = other.parse::<ImageRef>().unwrap_err().to_string();
    assert!(docker_takes(&other).unwrap() && error.contains("only sha256 is supported"), "{error}");
}
