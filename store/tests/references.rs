//! Image names by the distribution project's reference grammar: the inputs and outcomes of its published tests
//! (`reference_test.go`, `normalize_test.go`, `regexp_test.go`). Comments say where this project differs.

use store::image::{ImageRef, parse_registry};

/// 64 hexadecimal digits.
const ID: &str = "1a3f5e7d9c1b3a5f7e9d1c3b5a7f9e1d3c5b7a9f1e3d5d7c9b1a3f5e7d9c1b3a";

fn digest() -> String {
    format!("sha256:{}", "f".repeat(64))
}

fn parse(text: &str) -> Result<ImageRef, String> {
    text.parse().map_err(|error: store::Error| error.to_string())
}

/// Checks that a name is read as this registry, path, tag and digest.
fn check(text: &str, registry: &str, path: &str, tag: Option<&str>, digest: Option<&str>) {
    let found = parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    let named = found.digest().map(ToString::to_string);
    let got = (found.registry(), found.path(), found.tag(), named.as_deref());
    assert_eq!(got, (registry, path, tag, digest), "{text}");
    assert_eq!(parse(&found.to_string()).as_ref(), Ok(&found), "{text} is shown as {found}");
}

#[test]
fn names_are_read_as_docker_reads_them() {
    for (text, registry, path) in [
        ("test_com", "docker.io", "library/test_com"),
        ("test.com/repo", "test.com", "repo"),
        ("test_com/foo", "docker.io", "test_com/foo"),
        ("test:5000/repo", "test:5000", "repo"),
        ("test-com:8080/foo", "test-com:8080", "foo"),
        ("sub-dom1.foo.com/bar/baz/quux", "sub-dom1.foo.com", "bar/baz/quux"),
        ("xn--n3h.com:18080/foo", "xn--n3h.com:18080", "foo"),
        ("foo/foo_bar.com", "docker.io", "foo/foo_bar.com"),
        ("192.168.1.1", "docker.io", "library/192.168.1.1"),
        ("192.168.1.1/repo", "192.168.1.1", "repo"),
        ("192.168.0.2:25000/debian", "192.168.0.2:25000", "debian"),
        ("0101.com/a", "0101.com", "a"),
        ("[2001:db8::1]/repo", "[2001:db8::1]", "repo"),
        ("[2001:db8:1:2:3:4:5:6]/repo", "[2001:db8:1:2:3:4:5:6]", "repo"),
        ("[2001:db8::]:5000/repo", "[2001:db8::]:5000", "repo"),
        ("[::1]:5000/repo", "[::1]:5000", "repo"),
        ("[FC00::1]:5000/docker/docker", "[FC00::1]:5000", "docker/docker"),
        ("localhost/fooo/bar", "localhost", "fooo/bar"),
        ("localhost:8080/bar", "localhost:8080", "bar"),
        ("LOCALDOMAIN/debian", "LOCALDOMAIN", "debian"),
        ("Docker/docker", "Docker", "docker"),
        ("Asdf.com/a", "Asdf.com", "a"),
        ("docker.io/debian", "docker.io", "library/debian"),
        ("docker.io", "docker.io", "library/docker.io"),
        ("index.docker.io/docker/docker", "docker.io", "docker/docker"),
        ("index.docker.io/debian", "docker.io", "library/debian"),
        ("docker.io/library/foo/bar", "docker.io", "library/foo/bar"),
        ("library/ubuntu-12.04-base", "docker.io", "library/ubuntu-12.04-base"),
        ("docker---rules/docker", "docker.io", "docker---rules/docker"),
        ("dock__er/docker", "docker.io", "dock__er/docker"),
        ("d/docker", "docker.io", "d/docker"),
        ("b.gcr.io/test.example.com/my-app", "b.gcr.io", "test.example.com/my-app"),
        // With a registry it cannot be mistaken for an ID.
        (&format!("docker.io/{ID}"), "docker.io", &format!("library/{ID}")),
        // Only in this project: the other names of Docker Hub, and a repository there that looks like a registry.
        ("registry-1.docker.io/library/debian", "docker.io", "library/debian"),
        ("docker.io/quay.io/team/app", "docker.io", "quay.io/team/app"),
        ("docker.io/localhost/app", "docker.io", "localhost/app"),
    ] {
        let digest = digest();
        check(text, registry, path, Some("latest"), None);
        check(&format!("{text}:Tag-1.2_3"), registry, path, Some("Tag-1.2_3"), None);
        check(&format!("{text}:8080"), registry, path, Some("8080"), None);
        check(&format!("{text}@{digest}"), registry, path, None, Some(&digest));
        check(&format!("{text}:xn--n3h.com@{digest}"), registry, path, Some("xn--n3h.com"), Some(&digest));
    }
}

#[test]
fn what_is_no_name_is_refused_in_words() {
    let long = format!("docker.io/{}/docker", "this_is_too_long_".repeat(16).trim_end_matches('_'));
    for text in [
        "",
        ":justtag",
        &format!("@{}", digest()),
        "repo@sha256:ffffffffffffffffffffffffffffffffff",
        &format!("repo@sha256:{}", "F".repeat(64)),
        "Uppercase:tag",
        "test:5000/Uppercase/lowercase:tag",
        "docker/Docker",
        "docker.io/docker/Docker",
        "aa/asdf$$^/aa",
        "asdf$$^/aa",
        "a^a",
        "https://github.com/docker/docker",
        "-docker",
        "-docker/docker",
        "docker-/docker",
        "-docker.io/docker/docker",
        "ab-.com/a",
        "ab.-com/a",
        "docker///docker",
        "docker.io/docker///docker",
        "docker/",
        "foo.com/",
        "a//a/a",
        "____/____",
        "_docker/_docker",
        "dock..er/docker",
        "dock_.er/docker",
        "dock-.er/docker",
        "test.com:http/a",
        "test.com:+80/a",
        "test.com:/a",
        "[2001:db8::1]",
        "[2001:db8::1]:5000",
        "[2001:db8::1]:tag",
        "[fe80::1%eth0]:5000/repo",
        "[fe80::1%@invalidzone]:5000/repo",
        "[2001:db8:3:4::192.0.2.33]:5000/debian",
        "[fd00:1:2::3]75050/a",
        "[fd00:1:2::3]::5000/a",
        "fc00::1:5000/debian",
        "name:-tag",
        "name:.tag",
        "name: tag",
        "name:tag\n",
        " name",
        "name:ä",
        ID,
        &long,
        // The grammar accepts these, but no connection could be made.
        "r.io:0/a",
        "192.168.1.1:75050/a",
        "[fd00123123123]:5000/a",
    ] {
        let error = parse(text).expect_err(text);
        assert!(error.contains("image reference") || error.contains("digest"), "{text}: {error}");
    }
}

#[test]
fn lengths_are_the_grammars() {
    let path = |len: usize| "a".repeat(len);
    assert!(parse(&format!("example.com/{}:tag", path(255))).is_ok(), "the host does not count");
    assert!(parse(&format!("example.com/{}:tag", path(256))).is_err());
    assert!(parse(&format!("domain/{}:tag", path(256))).is_err());
    assert!(parse(&format!("{}a:tag-puts-this-over-max", "a/".repeat(127))).is_ok());
    assert!(parse(&format!("a:{}", path(128))).is_ok());
    assert!(parse(&format!("a:{}", path(129))).is_err());
}

#[test]
fn digests_of_other_algorithms_are_refused_by_name() {
    for algorithm in ["sha512", "sha384", "blake3", "invaliddigest", "sha256+b64", "SHA256"] {
        let error = parse(&format!("validname@{algorithm}:{}", "f".repeat(128))).unwrap_err();
        assert!(error.contains("only sha256 is supported"), "{algorithm}: {error}");
    }
}

#[test]
fn registries_by_themselves_are_read_by_the_same_grammar() {
    for (text, expected) in [
        ("test.com:10304", true),
        ("[fd00:1:2::3]:443", true),
        ("[fd00:1:2::3]", true),
        ("[::1%eth0]", false),
        ("a_b.com", false),
    ] {
        assert_eq!(parse_registry(text).is_ok(), expected, "{text}");
    }
}
