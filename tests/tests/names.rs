//! Image names: which ones this project accepts and refuses, compared with docker and skopeo.

use std::process::Command;

use anyhow::Result;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use store::image::ImageRef;
use tests::process::run;

/// Whether docker accepts a name. It parses names before it connects to its daemon, and there is none here.
fn docker_takes(name: &str) -> Result<bool> {
    let mut command = Command::new("docker");
    command.args(["--host", "unix:///nonexistent/docker.sock", "pull", "--", name]);
    let output = run(&mut command)?.stderr;
    let is_refused = ["invalid", "unsupported", "must not be"].iter().any(|word| output.contains(word));
    anyhow::ensure!(is_refused != output.contains("Cannot connect to the Docker daemon"), "{name:?}: {output}");
    Ok(!is_refused)
}

/// Whether skopeo accepts a name. It parses the name of the source before that of the target, and this target is invalid.
fn skopeo_takes(name: &str) -> Result<bool> {
    let output = run(Command::new("skopeo").args(["copy", "--", &format!("docker://{name}"), "nowhere:"]))?.stderr;
    let is_refused = output.contains("Invalid source name");
    anyhow::ensure!(is_refused || output.contains("Invalid destination name"), "{name:?}: {output}");
    Ok(!is_refused)
}

/// Mostly one of `good`, and sometimes one of `odd`, which the grammar does not allow.
fn mostly(good: &'static [&'static str], odd: &'static [&'static str]) -> impl Strategy<Value = &'static str> {
    prop_oneof![15 => proptest::sample::select(good), 1 => proptest::sample::select(odd)]
}

/// A path component: words with separators between them.
fn component() -> impl Strategy<Value = String> {
    let separator = mostly(&[".", "_", "__", "-", "--", "-----"], &["..", "___", "._", "-_", "", "A", "+", "é", " "]);
    let more = proptest::collection::vec((separator, "[a-z0-9]{1,3}"), 0..3);
    ("[a-z0-9]{1,3}", more).prop_map(|(first, more)| {
        more.into_iter().fold(first, |word, (separator, next)| format!("{word}{separator}{next}"))
    })
}

/// Names in which most parts are valid, and names that are nearly valid.
fn candidates() -> impl Strategy<Value = String> {
    let host = mostly(
        &[
            "",
            "",
            "",
            "localhost/",
            "docker.io/",
            "index.docker.io/",
            "r.io/",
            "A/",
            "R-1.Io/",
            "1.2.3.4/",
            "[::1]:5000/",
            "h:80/",
        ],
        &[
            "/",
            "-a.io/",
            "a-.io/",
            "a_b.io/",
            "h:/",
            "h:x/",
            "h:+1/",
            "h:99999/",
            "[::1/",
            "[::g]/",
            "r..io/",
            "https://r.io/",
        ],
    );
    let path = (proptest::collection::vec(component(), 1..4), mostly(&["/"], &["//", "/./"]));
    let path = path.prop_map(|(components, slash)| components.join(slash));
    let tag = mostly(&["", "", ":1", ":v1.0", ":_x", ":A-b.C_d"], &[":", ":.x", ":-x", ":a:b", ":é", ":a/b", "/"]);
    let hex = "[0-9a-f]{64}".prop_map(|hex| format!("@sha256:{hex}"));
    let odd = prop_oneof!["@sha256:[0-9a-f]{0,63}", "@sha256:[0-9A-F]{64}", "@md5:[0-9a-f]{32}", Just("@".to_owned())];
    let digest = prop_oneof![9 => Just(String::new()), 5 => hex, 1 => odd];
    (host, path, tag, digest).prop_map(|(host, path, tag, digest)| format!("{host}{path}{tag}{digest}"))
}

/// Whether the name has a port to which no connection is possible. Such names are refused here, but docker and skopeo accept them.
fn has_odd_port(name: &str) -> bool {
    let host = name.split_once('/').map_or("", |(host, _)| host);
    let port = host.rsplit_once(':').map_or("", |(_, port)| port);
    !port.is_empty()
        && port.bytes().all(|byte| byte.is_ascii_digit())
        && port.parse().is_ok_and(|port: u64| port == 0 || port > 65535)
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
        // This version of skopeo does not support names with both tag and digest, IPv6, or hosts that are recognisable by capitals only.
        let is_bare = |host: &str| host.contains(char::is_uppercase) && !host.contains(['.', ':']);
        let is_newer = |host: &str| is_bare(host) || host.starts_with('[');
        let is_beyond = has_both || parsed.as_ref().is_ok_and(|image| is_newer(image.registry()));
        if docker != parsed.is_ok() || (skopeo != parsed.is_ok() && !is_beyond) {
            wrong.push(format!("{name:?}: docker {docker}, skopeo {skopeo}, here {parsed:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} of 200: {}", wrong.len(), wrong.join("\n"));
    assert!(taken > 60 && refused > 40, "{taken} were taken and {refused} refused: these names show nothing");
}

#[test]
fn the_longest_and_the_oddest_names_are_taken_as_docker_takes_them() {
    let digest = format!("@sha256:{}", "f".repeat(64));
    for (name, expected) in [
        // docker 20.10 includes the host in the length limit, today's grammar only the path. Both accept these names.
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
    // docker accepts sha512, but the store names nothing by it. The error says so.
    let other = format!("a@sha512:{}", "f".repeat(128));
    let error = other.parse::<ImageRef>().unwrap_err().to_string();
    assert!(docker_takes(&other).unwrap() && error.contains("only sha256 is supported"), "{error}");
}
