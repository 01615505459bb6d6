//! Access to the coordinator: TLS, tokens, roles, image patterns, users of the machine.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::cluster::{Ctl, binary};
use tests::hosts::load;
use tests::images::small;
use tests::process::{Output, TIMEOUT, run, wait_until};
use tests::registry::Registry;
use tests::secured::Secured;
use tests::site::{Site, SiteSpec};

/// Checks that a command was refused: exit code 1, and one sentence that contains these words.
fn check_refused(output: &Output, words: &[&str]) -> Result<()> {
    let text = output.stderr.trim_end();
    ensure!(output.code == 1 && output.stdout.is_empty(), "{}: {}{text}", output.code, output.stdout);
    ensure!(text.starts_with("cachefsctl: ") && text.lines().count() == 1, "{text}");
    words.iter().try_for_each(|word| {
        ensure!(text.contains(word), "no {word} in: {text}");
        Ok(())
    })
}

fn names(list: &Value) -> Vec<&str> {
    list["images"].as_array().into_iter().flatten().filter_map(|image| image["name"].as_str()).collect()
}

/// The kind and actor of each event so far.
fn kinds(ctl: &Ctl) -> Result<Vec<(String, String)>> {
    let list = ctl.json(&["events", "--since", "0", "-n", "1000"])?;
    let text = |event: &Value, name: &str| event[name].as_str().unwrap_or_default().to_owned();
    let events = list["events"].as_array().context("no events")?;
    Ok(events.iter().map(|event| (text(event, "kind"), text(event, "actor"))).collect())
}

#[test]
fn over_tls_a_token_opens_what_its_role_allows() {
    let secured = Secured::start(&SiteSpec::default()).unwrap();
    load(&secured.site, &small().unwrap()).unwrap();
    let image = secured.site.images().unwrap().remove(0);
    let [viewer, host, admin] = ["viewer", "host", "admin"].map(|role| secured.token(role, role, &[]).unwrap());
    for token in [&viewer, &host, &admin] {
        assert_eq!(names(&secured.ctl(Some(token)).json(&["images"]).unwrap()), [image.as_str()]);
    }
    let refused = |token: &str, arguments: &[&str], words: &[&str]| {
        check_refused(&secured.ctl(Some(token)).run(arguments).unwrap(), words).unwrap();
    };
    refused(&viewer, &["remove", &image], &["token viewer has the role viewer"]);
    refused(&viewer, &["pull", "-d", &image], &["token viewer"]);
    refused(&host, &["remove", &image], &["token host"]);
    refused(&host, &["events"], &["token host"]);
    refused(&host, &["token", "list"], &["ask an admin"]);
    secured.ctl(Some(&viewer)).ok(&["hosts"]).unwrap();
    secured.ctl(Some(&admin)).ok(&["token", "create", "other", "--role", "viewer"]).unwrap();
    secured.ctl(Some(&admin)).ok(&["remove", &image]).unwrap();
    let events = kinds(&secured.site.ctl()).unwrap();
    for (kind, actor) in
        [("token.created", "uid 0"), ("token.created", "token admin"), ("image.removed", "token admin")]
    {
        assert!(events.contains(&(kind.to_owned(), actor.to_owned())), "no {kind} by {actor} in {events:?}");
    }
    let refusals = events.iter().filter(|(kind, _)| kind == "access.refused").count();
    assert_eq!(refusals, 2, "one for each token that was refused, however often: {events:?}");
}

#[test]
fn what_does_not_fit_is_said_in_a_sentence() {
    let secured = Secured::start(&SiteSpec::default()).unwrap();
    let token = secured.token("ci", "viewer", &["--expires", "1s"]).unwrap();
    check_refused(&secured.ctl(None).run(&["images"]).unwrap(), &["wants a token", "--token-file"]).unwrap();
    let wrong = secured.ctl(Some(&token.replace(|c: char| c.is_ascii_digit(), "a")));
    check_refused(&wrong.run(&["images"]).unwrap(), &["token is not known here"]).unwrap();
    wait_until("the token's end", TIMEOUT, || Ok(!secured.ctl(Some(&token)).run(&["images"])?.succeeded())).unwrap();
    check_refused(&secured.ctl(Some(&token)).run(&["images"]).unwrap(), &["token ci has expired"]).unwrap();
    // No authority, another authority, the wrong scheme.
    let untrusted = Ctl { environment: Vec::new(), ..secured.ctl(None) };
    check_refused(&untrusted.run(&["images"]).unwrap(), &["no trusted connection", "--ca-certificate"]).unwrap();
    let plain = Ctl { server: secured.url().replace("https", "http"), ..secured.ctl(Some(&token)) };
    check_refused(&plain.run(&["images"]).unwrap(), &["write https://"]).unwrap();
    let renamed = Ctl { server: secured.url().replace("127.0.0.1", "127.0.0.2"), ..secured.ctl(Some(&token)) };
    let output = renamed.run(&["images"]).unwrap();
    assert!(output.code == 1 && !output.stderr.contains(&token), "{}", output.stderr);
    for (arguments, words) in [
        (&["token", "create", "x y", "--role", "host"][..], "is no name for a token"),
        (&["token", "create", "x", "--role", "admin", "--images", "a/*"], "leave --images out"),
        (&["token", "create", "ci", "--role", "host"], "there is a token ci already"),
        (&["token", "revoke", "nobody"], "there is no token nobody"),
    ] {
        check_refused(&secured.site.ctl().run(arguments).unwrap(), &[words]).unwrap();
    }
}

#[test]
fn a_token_file_is_read_each_time_and_revoking_works_at_once() {
    let secured = Secured::start(&SiteSpec::default()).unwrap();
    let [first, second] = ["first", "second"].map(|name| secured.token(name, "viewer", &[]).unwrap());
    let file = secured.site.path().join("token");
    std::fs::write(&file, format!("{first}\n")).unwrap();
    let mut ctl = secured.ctl(None);
    ctl.environment.push(("CACHEFS_TOKEN_FILE".to_owned(), file.to_string_lossy().into_owned()));
    // The follower runs until it is refused. Each of its requests waits for events, and the one in progress may still be answered.
    let log = secured.site.path().join("follower.log");
    let mut command = ctl.command(&["events", "--follow", "--since", "0"]).unwrap();
    let mut follower = tests::process::Process::spawn("follower", &mut command, &log).unwrap();
    follower.wait_ready(TIMEOUT, || Ok(std::fs::read_to_string(&log)?.contains("token.created"))).unwrap();
    secured.site.ctl().ok(&["token", "revoke", "first"]).unwrap();
    check_refused(&ctl.run(&["images"]).unwrap(), &["not known here"]).unwrap();
    assert_eq!(follower.wait(TIMEOUT).unwrap().code(), Some(1));
    assert!(follower.log().contains("not known here"), "{}", follower.log());
    std::fs::write(&file, &second).unwrap();
    ctl.ok(&["images"]).unwrap();
    let list = secured.site.ctl().json(&["token", "list"]).unwrap();
    let tokens = list["tokens"].as_array().unwrap();
    assert_eq!((tokens.len(), &tokens[0]["name"]), (1, &Value::from("second")));
    assert!(tokens[0]["last_used_at"].is_string() && tokens[0]["created_by"] == "uid 0", "{list}");
    assert!(!list.to_string().contains(second.rsplit('_').next().unwrap()));
    assert!(secured.site.ctl().ok(&["token", "list"]).unwrap().contains("second"));
}

#[test]
fn patterns_hide_and_refuse_other_images() {
    let (secured, registry) = (Secured::start(&SiteSpec::default()).unwrap(), Registry::start().unwrap());
    let [ours, theirs] = ["team/app", "other/app"].map(|name| registry.push(&small().unwrap(), name, "1").unwrap());
    secured.site.ctl().ok(&["pull", &ours, &theirs]).unwrap();
    let pattern = format!("{}/team/*", registry.address());
    let host = secured.ctl(Some(&secured.token("h", "host", &["--images", &pattern]).unwrap()));
    assert_eq!(names(&host.json(&["images"]).unwrap()), [ours.as_str()]);
    let jobs = host.json(&["jobs"]).unwrap();
    let jobs: Vec<_> = jobs["jobs"].as_array().unwrap().iter().map(|job| job["image"].as_str().unwrap()).collect();
    assert_eq!(jobs, [ours.as_str()]);
    host.ok(&["image", &ours]).unwrap();
    host.ok(&["wait", &ours]).unwrap();
    host.ok(&["pull", &ours]).unwrap();
    host.ok(&["profile", &ours]).unwrap();
    let absent = format!("{}/other/absent:1", registry.address());
    let file = secured.site.path().join("export.tar").to_string_lossy().into_owned();
    for image in [theirs.as_str(), &absent] {
        for arguments in [
            &["image", image][..],
            &["wait", image],
            &["pull", image],
            &["profile", image],
            &["export", image, &file],
            &["pull", &ours, image],
        ] {
            check_refused(&host.run(arguments).unwrap(), &["token h may not use image", image, &pattern]).unwrap();
        }
    }
    let theirs_job = secured.site.job(&theirs).unwrap()["id"].to_string();
    check_refused(&host.run(&["job", &theirs_job]).unwrap(), &["there is no job"]).unwrap();
    // A viewer with patterns sees the events of matching images, and no others.
    let viewer = secured.ctl(Some(&secured.token("v", "viewer", &["--images", &pattern]).unwrap()));
    let list = viewer.json(&["events", "--since", "0"]).unwrap();
    let events = list["events"].as_array().unwrap();
    assert!(!events.is_empty() && events.iter().all(|event| event["subject"] == ours.as_str()), "{list}");
}

#[test]
fn a_new_certificate_is_served_without_a_restart_and_a_bad_one_is_not() {
    let mut secured = Secured::start(&SiteSpec::default()).unwrap();
    let token = secured.token("t", "viewer", &[]).unwrap();
    let old = secured.authority.pem().to_owned();
    secured.ctl(Some(&token)).ok(&["images"]).unwrap();
    secured.change_authority().unwrap();
    let answers = |secured: &Secured| Ok(secured.ctl(Some(&token)).run(&["images"])?.succeeded());
    wait_until("the new certificate", TIMEOUT, || answers(&secured)).unwrap();
    let file = secured.site.path().join("old.pem");
    std::fs::write(&file, old).unwrap();
    let mut outdated = secured.ctl(Some(&token));
    outdated.environment[0].1 = file.to_string_lossy().into_owned();
    check_refused(&outdated.run(&["images"]).unwrap(), &["no trusted connection", "signed by"]).unwrap();
    std::fs::write(secured.key_file(), "half a key").unwrap();
    let complains =
        |secured: &mut Secured| Ok(secured.site.coordinator().process().log().contains("goes on with the certificate"));
    wait_until("a complaint", TIMEOUT, || complains(&mut secured)).unwrap();
    assert!(answers(&secured).unwrap());
}

/// Runs `cachefsctl` with a uid and gid that do not belong to any user of this machine.
fn as_user(program: &Path, uid: u32, gid: u32, server: &str, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new("setpriv");
    command.arg(format!("--reuid={uid}")).arg(format!("--regid={gid}")).arg("--clear-groups");
    run(command.arg(program).args(["--server", server]).args(arguments))
}

#[test]
fn users_of_the_machine_are_known_by_the_socket() {
    let settings = "[[local_access]]\nuid = 64990\nrole = 'viewer'\n[[local_access]]\ngid = 64991\nrole = 'admin'\n";
    let directory = tempfile::Builder::new().prefix("site-").tempdir().unwrap();
    // Other users must be able to reach the socket, and a copy of the program.
    let open = |path: &Path| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    open(directory.path());
    let program = directory.path().join("cachefsctl");
    std::fs::copy(binary("cachefsctl").unwrap(), &program).unwrap();
    open(&program);
    std::fs::create_dir(directory.path().join("store")).unwrap();
    let site = Site::start_in(directory, &SiteSpec { settings: settings.to_owned(), ..SiteSpec::default() }).unwrap();
    let server = site.ctl().server;
    let run = |uid, gid, arguments: &[&str]| as_user(&program, uid, gid, &server, arguments).unwrap();
    run(64990, 64990, &["images"]).ok().unwrap();
    check_refused(&run(64990, 64990, &["token", "list"]), &["uid 64990 has the role viewer"]).unwrap();
    run(64992, 64991, &["token", "create", "t", "--role", "viewer"]).ok().unwrap();
    check_refused(&run(64993, 64993, &["images"]), &["uid 64993 may not use this coordinator", "[[local_access]]"])
        .unwrap();
    let events = kinds(&site.ctl()).unwrap();
    assert!(events.contains(&("token.created".to_owned(), "uid 64992".to_owned())), "{events:?}");

    let closed = Site::start().unwrap();
    open(closed.path());
    let output = as_user(&program, 64990, 64990, &closed.ctl().server, &["images"]).unwrap();
    check_refused(&output, &["cannot reach the coordinator", "ermission denied"]).unwrap();
}
