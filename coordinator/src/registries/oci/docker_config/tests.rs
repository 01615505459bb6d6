//! Files as they are found in the wild, each with what docker, podman or Kubernetes makes of it.

use base64::engine::general_purpose::{STANDARD as PADDED, URL_SAFE, URL_SAFE_NO_PAD};

use super::*;

/// The login in a file; if it names a helper instead, an error with that name.
fn look_up(text: &[u8], registry: &str, repository: &str) -> Result<Credentials, String> {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("config.json"), text).unwrap();
    let (_, config) = DockerConfig::read(directory.path())?.unwrap();
    match config.source(registry, repository) {
        Source::File(read) => read,
        Source::Helper { name, .. } => Err(format!("helper {name}")),
    }
}

fn login(user: &str, password: &str) -> Credentials {
    Credentials::of(user.to_owned(), password.to_owned())
}

fn identity(token: &str, password: Option<(&str, &str)>) -> Credentials {
    let password = password.map(|(user, password)| (user.to_owned(), Secret::new(password.to_owned())));
    Credentials::Identity { token: Secret::new(token.to_owned()), password }
}

#[test]
fn nothing_configured_is_anonymous() {
    assert_eq!(CredentialStore::default().source("r", "app").map(|_| ()), Ok(()));
    assert!(DockerConfig::read(Path::new("/nonexistent/config.json")).unwrap().is_none());
    assert!(DockerConfig::read(tempfile::tempdir().unwrap().path()).unwrap().is_none());
    for empty in ["", " \n", "{}", "null", "\u{feff}", "\u{feff}{}", r#"{"auths": null}"#, r#"{"auths": {"r": null}}"#]
    {
        assert_eq!(look_up(empty.as_bytes(), "r", "app"), Ok(Credentials::Anonymous), "{empty:?}");
    }
}

#[test]
fn an_entry_is_read_in_every_form_that_is_written() {
    let good = PADDED.encode("anna:pass>>word?");
    let wrapped = format!("{}\\n  {}\\r\\n", &good[..8], &good[8..]);
    for entry in [
        format!(r#"{{"auth": "{good}"}}"#),
        format!(r#"{{"auth": "{wrapped}"}}"#),
        format!(r#"{{"auth": "{}"}}"#, good.trim_end_matches('=')),
        format!(r#"{{"auth": "{}"}}"#, URL_SAFE.encode("anna:pass>>word?")),
        format!(r#"{{"auth": "{}"}}"#, URL_SAFE_NO_PAD.encode("anna:pass>>word?")),
        format!(r#"{{"auth": "{}"}}"#, PADDED.encode("anna:pass>>word?\0\0\0")),
        format!(r#"{{"auth": "{good}", "identitytoken": "", "registrytoken": null, "email": 5}}"#),
        format!(r#"{{"AUTH": "{good}"}}"#),
        // Docker makes the other fields from this one.
        format!(r#"{{"auth": "{good}", "username": "eve", "password": "other"}}"#),
        r#"{"username": "anna", "password": "pass>>word?"}"#.to_owned(),
        r#"{"auth": "", "username": "anna", "password": "pass>>word?"}"#.to_owned(),
        // The last of two counts, as in Go.
        format!(r#"{{"auth": "eA==", "auth": "{good}"}}"#),
    ] {
        let text = format!(r#"{{"auths": {{"r.io": {entry}, "other": {{}}}}}}"#);
        assert_eq!(look_up(text.as_bytes(), "r.io", "app"), Ok(login("anna", "pass>>word?")), "{entry}");
    }
    for (entry, expected) in [
        (r#"{"auth": "YW5uYTpwYTpzcw=="}"#, login("anna", "pa:ss")),
        (r#"{"auth": "YW5uYTo="}"#, login("anna", "")),
        (r#"{"auth": "Og=="}"#, Credentials::Anonymous),
        (r#"{}"#, Credentials::Anonymous),
        (r#"{"email": "anna@r.io"}"#, Credentials::Anonymous),
        (r#"{"identitytoken": "refresh"}"#, identity("refresh", None)),
        (r#"{"identityToken": "refresh", "auth": "YW5uYTpwdw=="}"#, identity("refresh", Some(("anna", "pw")))),
        (
            r#"{"registrytoken": "bearer", "auth": "YW5uYTpwdw=="}"#,
            Credentials::Registry(Secret::new("bearer".to_owned())),
        ),
    ] {
        let text = format!(r#"{{"auths": {{"r.io": {entry}}}}}"#);
        assert_eq!(look_up(text.as_bytes(), "r.io", "app"), Ok(expected), "{entry}");
    }
    assert!(!format!("{:?}", login("anna", "pass-word")).contains("pass-word"));
}

#[test]
fn a_file_is_read_in_every_form_that_is_written() {
    let entry = r#"{"auth": "YW5uYTpwdw=="}"#;
    for text in [
        format!("\u{feff}{{\"auths\": {{\"r.io\": {entry}}}}}"),
        format!(r#"{{"Auths": {{"r.io": {entry}}}, "HttpHeaders": {{"a": "b"}}, "psFormat": 5, "credHelpers": null}}"#),
        format!(r#"{{"auths": {{"r.io": {entry}}}, "credsStore": "", "credHelpers": {{"q.io": "gcloud"}}}}"#),
        format!(r#"{{"auths": {{"r.io": {entry}, "q.io": {{"auth": "%%%"}}, "s.io": 5}}}}"#),
        // What follows the document is ignored.
        format!(r#"{{"auths": {{"r.io": {entry}}}}} }}"#),
        // The old form, and keys of every kind.
        format!(r#"{{"r.io": {entry}, "https://index.docker.io/v1/": {{"auth": "eA=="}}}}"#),
        r#"{"https://r.io/v1/": {"username": "anna", "password": "pw", "email": "a@r.io"}}"#.to_owned(),
    ] {
        assert_eq!(look_up(text.as_bytes(), "r.io", "app"), Ok(login("anna", "pw")), "{text}");
    }
}

#[test]
fn what_cannot_be_read_is_said_without_the_secrets_in_it() {
    for bad in [
        "{",
        "[]",
        "5",
        "// mine\n{}",
        r#"{"auths": []}"#,
        r#"{"auths": {"r": }}"#,
        r#"{"credsStore": 5}"#,
        r#"{"credHelpers": {"q": 5}}"#,
    ] {
        let error = look_up(bad.as_bytes(), "r", "app").unwrap_err();
        assert!(error.contains("config.json is not a valid Docker configuration"), "{bad}: {error}");
    }
    for bad in [r#"{"auth": "%%%"}"#, r#"{"auth": "YW5uYQ=="}"#, r#"{"auth": 5}"#, "5", r#"{"identitytoken": {}}"#] {
        let error = look_up(format!(r#"{{"auths": {{"r": {bad}}}}}"#).as_bytes(), "r", "app").unwrap_err();
        assert!(error.contains("login in it") && !error.contains("YW5"), "{bad}: {error}");
    }
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("config.json")).unwrap();
    let error = DockerConfig::read(directory.path()).map(|_| ()).unwrap_err();
    assert!(error.contains("config.json cannot be read"), "{error}");
}

#[test]
fn the_file_of_a_directory_is_found_by_its_kinds_of_names() {
    let directory = tempfile::tempdir().unwrap();
    // The better known name counts.
    for name in [".dockercfg", ".dockerconfigjson", "auth.json", "config.json"] {
        std::fs::write(directory.path().join(name), format!(r#"{{"r": {{"username": "{name}"}}}}"#)).unwrap();
        for path in [directory.path().to_owned(), directory.path().join(name)] {
            let (file, config) = DockerConfig::read(&path).unwrap().unwrap();
            let Source::File(read) = config.source("r", "app") else { panic!("{name}") };
            assert_eq!((file, read), (directory.path().join(name), Ok(login(name, ""))));
        }
    }
}

/// The user that is chosen from a file with these keys, each of which has its own name as the user.
fn user(keys: &[&str], registry: &str, repository: &str) -> String {
    let entries = keys.iter().map(|key| ((*key).to_owned(), serde_json::json!({"username": key, "password": "x"})));
    let text = serde_json::json!({"auths": entries.collect::<Map<_, _>>()}).to_string();
    look_up(text.as_bytes(), registry, repository).unwrap().who()
}

#[test]
fn keys_name_registries_and_parts_of_them() {
    for key in [
        "r.io",
        "R.IO",
        "r.io/",
        "https://r.io",
        "https://r.io/",
        "http://r.io",
        "HTTPS://r.io/v1/",
        "https://r.io/v2/",
        "https://r.io/team/other",
        "r.io/v1/",
        "r.io/v2",
        "r.io/team",
        "r.io/team/",
        "r.io/team/app",
    ] {
        assert_eq!(user(&[key], "r.io", "team/app"), format!("user {key}"));
        assert_eq!(user(&[key], "q.io", "team/app"), "anonymous users", "{key}");
        assert_eq!(user(&[key], "r.io:5000", "team/app"), "anonymous users", "{key}");
    }
    for key in ["r.io/tea", "r.io/team/app/more", "r.io/app", "io", "r.io:443", "docker.io"] {
        assert_eq!(user(&[key], "r.io", "team/app"), "anonymous users", "{key}");
    }
    for (registry, key) in
        [("r.io:5000", "http://r.io:5000"), ("[::1]:5000", "https://[::1]:5000/v2/"), ("localhost", "localhost/team")]
    {
        assert_eq!(user(&[key], registry, "team/app"), format!("user {key}"));
    }
    // The longest part of the path counts, then the name that docker itself would write.
    let keys = ["r.io", "r.io/team", "r.io/team/app", "https://r.io", "q.io/team/app"];
    for (repository, expected) in [
        ("team/app", "r.io/team/app"),
        ("team/app/sub", "r.io/team/app"),
        ("team/application", "r.io/team"),
        ("team", "r.io/team"),
        ("teams/app", "r.io"),
        ("other", "r.io"),
    ] {
        assert_eq!(user(&keys, "r.io", repository), format!("user {expected}"), "{repository}");
    }
}

#[test]
fn docker_hub_has_one_login_whatever_it_is_filed_under() {
    let keys = [
        "https://index.docker.io/v1/",
        "docker.io",
        "index.docker.io",
        "registry-1.docker.io",
        "registry.hub.docker.com",
        "https://docker.io",
        "https://registry-1.docker.io/v2/",
        "index.docker.io/v1/",
    ];
    for (number, key) in keys.iter().enumerate() {
        assert_eq!(user(&[key], "docker.io", "library/app"), format!("user {key}"));
        assert_eq!(user(&[key], "r.io", "library/app"), "anonymous users");
        // Docker's own key comes before all others.
        assert_eq!(user(&keys[..=number], "docker.io", "library/app"), "user https://index.docker.io/v1/");
    }
    assert_eq!(user(&["docker.io", "docker.io/library"], "docker.io", "library/app"), "user docker.io/library");
    assert_eq!(user(&["docker.io", "docker.io/library"], "docker.io", "me/app"), "user docker.io");
}
