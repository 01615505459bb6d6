//! Properties that all command lines share (`docs/COMMANDS.md`): exit codes, JSON on both outputs, closed pipes, variables.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tests::cluster::{Mount, binary};
use tests::hosts;
use tests::images::small;
use tests::process::{Output, TIMEOUT, run, wait_until};
use tests::registry::{Fault, FaultyRegistry, Match, Registry};
use tests::secured::Secured;
use tests::site::{Site, SiteSpec};

/// How long a small image may take on a loaded machine.
const LONG: Duration = Duration::from_secs(120);

/// The value under `key` in the JSON object on the last line of standard error. The object must have no other key.
fn said(output: &Output, key: &str) -> Result<Value> {
    let line = output.stderr.lines().last().unwrap_or_default();
    let object: Value = serde_json::from_str(line).with_context(|| format!("no JSON: {output:?}"))?;
    ensure!(object.as_object().is_some_and(|fields| fields.len() == 1), "{object}");
    Ok(object[key].clone())
}

fn check_error(output: &Output, code: i32, kind: &str, words: &str) -> Result<()> {
    ensure!(output.code == code, "{output:?}");
    ensure!(output.stderr.lines().count() == 1, "one line: {output:?}");
    let error = said(output, "error")?;
    let message = error["message"].as_str().unwrap_or_default();
    ensure!(error["code"] == kind && message.contains(words), "{error}");
    Ok(())
}

fn cachefs(arguments: &[&str]) -> Result<Output> {
    run(Command::new(binary("cachefs")?).args(arguments))
}

/// Runs `cachefs` in a mount namespace without cachefs mounts, so that mounts of other tests have no influence.
fn cachefs_alone(arguments: &[&str]) -> Result<Output> {
    let script = "umount -a -l -t fuse.cachefs 2>/dev/null; exec \"$0\" \"$@\"";
    run(Command::new("unshare").args(["-m", "sh", "-c", script]).arg(binary("cachefs")?).args(arguments))
}

#[test]
fn errors_are_objects_where_json_is_asked_for() {
    let mut site = Site::start().unwrap();
    let ctl = site.ctl();
    let run = |arguments: &[&str]| ctl.run(arguments).unwrap();
    check_error(&run(&["--json", "image", "r.io/none:1"]), 1, "not_found", "r.io/none:1").unwrap();
    check_error(&run(&["image", "Not An Image", "--json"]), 1, "invalid_request", "Not An Image").unwrap();
    check_error(&run(&["--json", "imagse"]), 2, "usage", "unrecognized subcommand 'imagse'").unwrap();
    check_error(&run(&["--json", "wait", "r.io/none:1", "--timeout", "5"]), 2, "usage", "write 5s").unwrap();
    check_error(&run(&["--json", "wait", "r.io/none:1", "--timeout", "0s"]), 1, "timeout", "r.io/none:1").unwrap();
    check_error(&run(&["--json", "load", "/no/such/file"]), 1, "failed", "/no/such/file").unwrap();
    check_error(&run(&["--json", "token", "revoke", "none"]), 1, "not_found", "none").unwrap();
    let several = run(&["--json", "remove", "r.io/one:1", "r.io/two:1"]);
    assert!(several.code == 1 && several.stdout.is_empty(), "{several:?}");
    let errors: Vec<Value> = several.stderr.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(errors.len() == 2 && errors.iter().all(|error| error["error"]["code"] == "not_found"), "{errors:?}");
    site.coordinator().stop().unwrap();
    check_error(&run(&["--json", "images"]), 1, "unreachable", "is cachefs-coordinator running?").unwrap();
    let text = run(&["images"]);
    assert!(text.code == 1 && text.stderr.starts_with("cachefsctl: cannot reach the coordinator at "), "{text:?}");
}

#[test]
fn a_host_answers_with_its_exit_code_too() {
    let alone = cachefs_alone(&["status"]).unwrap();
    assert_eq!((alone.code, alone.stdout.as_str()), (1, ""));
    assert!(alone.stderr.starts_with("cachefs: nothing is mounted: start with cachefs mount"), "{alone:?}");
    let alone = cachefs_alone(&["status", "--json"]).unwrap();
    check_error(&alone, 1, "failed", "nothing is mounted").unwrap();
    assert_eq!(serde_json::from_str::<Value>(&alone.stdout).unwrap()["mounts"], Value::Array(Vec::new()));
    check_error(&cachefs_alone(&["why", "--json"]).unwrap(), 1, "failed", "nothing is mounted").unwrap();
    check_error(&cachefs(&["status", "--json", "--nonsense"]).unwrap(), 2, "usage", "--nonsense").unwrap();
    check_error(&cachefs_alone(&["cache", "stats", "--json"]).unwrap(), 2, "usage", "--cache DIR").unwrap();
    let absent = cachefs(&["cache", "--cache", "/no/such/cache", "verify", "--json"]).unwrap();
    check_error(&absent, 3, "failed", "/no/such/cache").unwrap();
    for arguments in [&["unmount", "/no/such/mount"][..], &["status", "--mount", "/usr"], &["why", "--mount", "/usr"]] {
        let nothing = cachefs(arguments).unwrap();
        assert!(nothing.code == 1 && nothing.stderr.contains("no cachefs is mounted on /"), "{nothing:?}");
    }
    let lacking = run(Command::new(binary("cachefs-coordinator").unwrap()).arg("serve")).unwrap();
    assert!(lacking.code == 2 && lacking.stderr.contains("--store is missing"), "{lacking:?}");
    let mount = ["mount", "/m", "--store", "/s", "--cache", "/c"];
    let mut command = Command::new(binary("cachefs").unwrap());
    let log = run(command.args(mount).env("CACHEFS_LOG", "cachefs=loud")).unwrap();
    assert!(log.code == 2 && log.stderr.contains("CACHEFS_LOG=cachefs=loud is not a log filter"), "{log:?}");
    let size = cachefs(&["mount", "/m", "--store", "/s", "--cache", "/c", "--cache-size", "1,5G"]).unwrap();
    assert!(size.code == 2 && size.stderr.contains("G is 10^9 bytes, Gi is 2^30"), "{size:?}");
}

/// The first file below a directory, in the order of names.
fn first_file(directory: &Path) -> Option<std::path::PathBuf> {
    let mut entries: Vec<_> = fs::read_dir(directory).ok()?.flatten().map(|entry| entry.path()).collect();
    entries.sort();
    entries.into_iter().find_map(|path| if path.is_dir() { first_file(&path) } else { Some(path) })
}

#[test]
fn damage_in_a_cache_is_a_failure_once() {
    let site = Site::start().unwrap();
    hosts::load(&site, &small().unwrap()).unwrap();
    let spec = hosts::host(&site, "one").unwrap();
    let mut mount = Mount::start(spec.clone()).unwrap();
    let chain = first_file(&mount.path().join("chains")).expect("the image has files");
    fs::read(&chain).unwrap();
    assert!(mount.process().log().contains("mounted on"), "{}", mount.process().log());
    let objects = spec.cache.join("objects");
    let cache = ["cache", "--cache", &*spec.cache.to_string_lossy()].map(str::to_owned);
    let run = |action: &str, more: &[&str]| {
        let words: Vec<&str> = cache.iter().map(String::as_str).chain([action]).chain(more.iter().copied()).collect();
        cachefs(&words)
    };
    let whole =
        || Ok(serde_json::from_str::<Value>(&run("stats", &["--json"])?.ok()?)?["whole_files"].as_u64() > Some(0));
    wait_until("a whole file in the cache", TIMEOUT, whole).unwrap();
    assert!(mount.stop().unwrap().success());
    let verify = |more: &[&str]| run("verify", more).unwrap();
    let whole = verify(&["--json"]);
    assert_eq!(whole.code, 0, "{whole:?}");
    let document: Value = serde_json::from_str(&whole.stdout).unwrap();
    assert!(document["whole_files"].as_u64() > Some(0), "{document}");
    let mut damaged = 0;
    for directory in fs::read_dir(&objects).unwrap() {
        for file in fs::read_dir(directory.unwrap().path()).unwrap() {
            fs::write(file.unwrap().path(), "not this").unwrap();
            damaged += 1;
        }
    }
    let found = verify(&["--json"]);
    check_error(&found, 1, "failed", "damaged").unwrap();
    let document: Value = serde_json::from_str(&found.stdout).unwrap();
    assert!(document["damaged_files"].as_u64() > Some(0) && document["damaged_files"].as_u64() <= Some(damaged));
    let again = verify(&[]);
    assert!(again.code == 0 && again.stdout.contains("damaged  0 files"), "{again:?}");
}

#[test]
fn progress_comes_as_lines_and_an_interrupt_says_that_the_job_goes_on() {
    let (registry, site) = (Registry::start().unwrap(), Site::start().unwrap());
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    registry.push(&small().unwrap(), "app", "v1").unwrap();
    let image = faulty.reference("app", "v1");
    faulty.inject(Match::Blobs, Fault::Slow(5000, Duration::from_millis(100)), 100);
    let mut pull = site.begin("pull", &["--json", "pull", &image]).unwrap();
    wait_until("a line of progress", TIMEOUT, || Ok(pull.log().contains("\"fetching\""))).unwrap();
    pull.signal(Signal::SIGINT).unwrap();
    assert_eq!(pull.wait(TIMEOUT).unwrap().code(), Some(130));
    let lines: Vec<Value> = pull.log().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (error, progress) = lines.split_last().unwrap();
    assert!(progress.iter().all(|line| line["progress"]["image"] == image.as_str()), "{lines:?}");
    assert!(error["error"]["message"].as_str().unwrap().contains("job 1 goes on: cachefsctl cancel 1"), "{error}");
    assert_eq!(site.job(&image).unwrap()["state"], "fetching");
    site.ctl().ok(&["cancel", "1"]).unwrap();
    site.wait_for_job(&image, &["cancelled"], LONG).unwrap();
    let direct = registry.reference("app", "v1");
    let done = site.ctl().run(&["--json", "pull", &direct]).unwrap();
    assert_eq!(done.code, 0, "{done:?}");
    let document: Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!(document["jobs"][0]["state"], "published");
    assert_eq!(said(&done, "progress").unwrap()["state"], "published", "{}", done.stderr);
    let failed = site.ctl().run(&["--json", "pull", &registry.reference("absent", "1")]).unwrap();
    assert_eq!(failed.code, 1);
    assert!(said(&failed, "error").unwrap()["message"].as_str().unwrap().contains("failed: "), "{failed:?}");
    assert_eq!(serde_json::from_str::<Value>(&failed.stdout).unwrap()["jobs"][0]["state"], "failed");
}

/// Runs a command whose output pipe is already closed. Returns its exit code and its standard error.
fn into_nowhere(command: &mut Command) -> Result<(Option<i32>, String)> {
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    let output = command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped()).output()?;
    Ok((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

#[test]
fn a_reader_that_has_gone_is_no_failure() {
    let site = Site::start().unwrap();
    hosts::load(&site, &small().unwrap()).unwrap();
    let name = site.images().unwrap().remove(0);
    for arguments in [
        &["images"][..],
        &["image", &name],
        &["jobs"],
        &["jobs", "--watch"],
        &["job", "1"],
        &["events"],
        &["events", "--follow", "--since", "0"],
        &["--json", "events", "--follow", "--since", "0"],
        &["hosts"],
        &["pins"],
        &["status"],
        &["retention"],
        &["registries"],
        &["schedule", "list"],
        &["schedule", "plan"],
        &["apply", "--show"],
        &["gc", "--dry-run"],
        &["token", "list"],
        &["fsck"],
        &["completions", "bash"],
        &["--help"],
    ] {
        let mut command = site.ctl().command(arguments).unwrap();
        let (code, stderr) = into_nowhere(&mut command).unwrap();
        assert_eq!((code, stderr.as_str()), (Some(0), ""), "{arguments:?}");
    }
    for (program, arguments) in [
        ("cachefs", &["completions", "zsh"][..]),
        ("cachefs", &["--help"]),
        ("cachefs-coordinator", &["completions", "fish"]),
        ("cachefs-coordinator", &["serve", "--help"]),
    ] {
        let ended = into_nowhere(Command::new(binary(program).unwrap()).args(arguments)).unwrap();
        assert_eq!(ended, (Some(0), String::new()), "{program} {arguments:?}");
    }
    // Readers that close the pipe while nothing new is written.
    for arguments in [&["jobs", "--watch"][..], &["events", "--follow", "--since", "0"], &["--json", "jobs", "--watch"]]
    {
        let mut command = site.ctl().command(arguments).unwrap();
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut first = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
        drop(child.stdout.take());
        let ended = wait_until("its end", TIMEOUT, || Ok(child.try_wait()?.is_some()));
        let _ = child.kill();
        let status = child.wait().unwrap();
        ended.unwrap();
        assert!(status.success(), "{arguments:?}: {status}");
    }
    let absent = site.ctl().command(&["image", "r.io/none:1"]).map(|mut command| into_nowhere(&mut command));
    assert_eq!(absent.unwrap().unwrap().0, Some(1), "what fails still fails");
}

#[test]
fn a_log_that_nobody_reads_stops_no_coordinator() {
    let directory = tempfile::tempdir().unwrap();
    let (store, state) = (directory.path().join("store"), directory.path().join("state"));
    let spec = tests::cluster::CoordinatorSpec::new(&store, &state);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = spec.command().unwrap();
    command.args(["--create", "--log=trace"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(writer);
    let mut child = command.spawn().unwrap();
    let ctl = tests::cluster::Ctl { server: format!("unix:{}", spec.socket().display()), environment: Vec::new() };
    let leads = || Ok(ctl.run(&["--json", "status"])?.stdout.contains("\"leader\""));
    let answered = wait_until("an answer", TIMEOUT, leads);
    let ended = child.try_wait().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    let status = child.wait().unwrap();
    answered.unwrap();
    assert_eq!(ended, None);
    assert!(status.success(), "{status}");
}

#[test]
fn no_colour_where_none_is_wanted() {
    for (value, is_coloured) in [("", true), ("1", false)] {
        let directory = tempfile::tempdir().unwrap();
        let (store, state) = (directory.path().join("store"), directory.path().join("state"));
        let spec = tests::cluster::CoordinatorSpec::new(&store, &state);
        let command = format!(
            "exec {} serve --create --store {} --state {} --socket {}",
            binary("cachefs-coordinator").unwrap().display(),
            store.display(),
            state.display(),
            spec.socket().display()
        );
        let mut terminal = Command::new("script");
        terminal.args(["-qefc", &command, "/dev/null"]).env("NO_COLOR", value).env("TERM", "xterm");
        let log = directory.path().join("log");
        let mut process = tests::process::Process::spawn("script", &mut terminal, &log).unwrap();
        process.wait_ready(TIMEOUT, || Ok(fs::read_to_string(&log)?.contains("INFO"))).unwrap();
        process.terminate(TIMEOUT).unwrap();
        assert_eq!(process.log().contains('\u{1b}'), is_coloured, "NO_COLOR={value}: {:?}", process.log());
    }
}

#[test]
fn variables_say_what_options_say() {
    let secured = Secured::start(&SiteSpec::default()).unwrap();
    let token = secured.token("host", "host", &[]).unwrap();
    let file = secured.site.path().join("host.token");
    fs::write(&file, &token).unwrap();
    let authority = secured.authority_file();
    let ask = |variables: &[(&str, &str)]| {
        let mut command = Command::new(binary("cachefsctl").unwrap());
        run(command.arg("images").envs(variables.iter().copied())).unwrap()
    };
    let (url, file_path, authority) = (secured.url(), file.to_string_lossy(), authority.to_string_lossy());
    let known = [("CACHEFS_SERVER", url.as_str()), ("CACHEFS_CA_CERTIFICATE", &*authority)];
    for more in [
        &[("CACHEFS_TOKEN", token.as_str())][..],
        &[("CACHEFS_TOKEN_FILE", &*file_path)],
        &[("CACHEFS_TOKEN", token.as_str()), ("CACHEFS_TOKEN_FILE", "")],
    ] {
        let answer = ask(&[&known, more].concat());
        assert_eq!(answer.code, 0, "{more:?}: {answer:?}");
    }
    assert_eq!(ask(&known).code, 1, "no token");
    assert_eq!(ask(&[known[0], ("CACHEFS_TOKEN", &token)]).code, 1, "no authority");
    let nowhere = ask(&[("CACHEFS_SERVER", "")]);
    assert!(nowhere.code == 1 && nowhere.stderr.contains("/run/cachefs/coordinator.sock"), "{nowhere:?}");
    let mut host = hosts::host(&secured.site, "one").unwrap();
    host.coordinator = Some(secured.url());
    host.arguments = vec!["--host-name=by-variables".to_owned()];
    host.environment = vec![
        ("CACHEFS_TOKEN_FILE".to_owned(), file_path.into_owned()),
        ("CACHEFS_CA_CERTIFICATE".to_owned(), authority.into_owned()),
        ("CACHEFS_LOG".to_owned(), "error".to_owned()),
    ];
    let mut mount = Mount::start(host).unwrap();
    let registered = || Ok(secured.site.ctl().ok(&["hosts"])?.contains("by-variables"));
    wait_until("the host is known", TIMEOUT, registered).unwrap();
    assert!(!mount.process().log().contains("mounted on"), "errors alone are logged: {}", mount.process().log());
}

/// kubectl #765, #707, #1408: an exit code that scripts take for an answer must not be used when the question could not be answered.
#[test]
fn an_answer_of_1_is_told_from_no_answer() {
    let mut site = Site::start().unwrap();
    let (ctl, file) = (site.ctl(), site.path().join("wish.yaml"));
    let path = file.to_string_lossy().into_owned();
    let diff = |text: &str| {
        fs::write(&file, text).unwrap();
        ctl.run(&["diff", &path]).unwrap()
    };
    assert_eq!(diff("").code, 0);
    let different = diff("pull_on_demand: true\n");
    assert!(different.code == 1 && different.stderr.contains("1 difference"), "{different:?}");
    for (broken, words) in [
        ("pull_on_demand: [\n", "wish.yaml:"),
        ("schedules:\n- {name: a, images: [r.io/a:1], cron: nonsense}\n", "nonsense"),
        ("schedules:\n- name: a\n  images: [r.io/a:1]\n  cron: */15 * * * *\n", "cron: '*/15 * * * *'"),
        ("pins: [a]\n---\npins: [b]\n", "put everything into one"),
    ] {
        let answer = diff(broken);
        assert!(answer.code == 3 && answer.stderr.contains(words), "{broken}: {answer:?}");
        assert_eq!(ctl.run(&["apply", &path]).unwrap().code, 1, "who changes something fails with 1");
    }
    assert_eq!(ctl.run(&["diff", "/no/such/file"]).unwrap().code, 3);
    assert_eq!(ctl.run(&["fsck", "--status"]).unwrap().code, 3, "none has run yet");
    assert_eq!(ctl.run(&["fsck"]).unwrap().code, 0);
    site.coordinator().stop().unwrap();
    check_error(&ctl.run(&["--json", "fsck"]).unwrap(), 3, "unreachable", "cannot reach").unwrap();
    assert_eq!(diff("").code, 3);
    assert_eq!(ctl.run(&["diff"]).unwrap().code, 2);
    let unprepared = cachefs(&["data-root", "status", &site.path().to_string_lossy(), "--json"]).unwrap();
    check_error(&unprepared, 3, "failed", "").unwrap();
}

/// kubectl: "Zero means check once and don't wait".
#[test]
fn a_wait_without_time_looks_once() {
    let site = Site::start().unwrap();
    hosts::load(&site, &small().unwrap()).unwrap();
    let name = site.images().unwrap().remove(0);
    for round in 0..60 {
        let timeout = if round % 2 == 0 { "0s" } else { "0" };
        let there = site.ctl().run(&["wait", &name, "--timeout", timeout]).unwrap();
        assert_eq!(there.code, 0, "round {round}: {there:?}");
    }
    check_error(
        &site.ctl().run(&["--json", "wait", "r.io/none:1", "--timeout", "0"]).unwrap(),
        1,
        "timeout",
        "within 0 s",
    )
    .unwrap();
    let registry = Registry::start().unwrap();
    registry.push(&small().unwrap(), "app", "v1").unwrap();
    let image = registry.reference("app", "v1");
    assert_eq!(site.ctl().run(&["wait", &image, "--pull", "--timeout", "0"]).unwrap().code, 1);
    site.wait_for_job(&image, &["published"], LONG).unwrap();
}

#[test]
fn both_versions_are_told() {
    let mut site = Site::start().unwrap();
    let text = site.ctl().ok(&["version"]).unwrap();
    assert!(text.contains("Client:  cachefsctl ") && text.contains("Server:  cachefs-coordinator "), "{text}");
    let both = site.ctl().json(&["version"]).unwrap();
    assert_eq!(both["client"]["version"], both["server"]["version"]);
    site.coordinator().stop().unwrap();
    let own = site.ctl().run(&["--json", "version"]).unwrap();
    check_error(&own, 1, "unreachable", "cannot reach").unwrap();
    let document: Value = serde_json::from_str(&own.stdout).unwrap();
    assert!(document["client"]["name"] == "cachefsctl" && document["server"].is_null(), "{document}");
}

#[test]
fn starts_of_what_nobody_has_started_are_none_to_tell_of() {
    let site = Site::start().unwrap();
    let mount = hosts::mount(&site, "one").unwrap();
    let path = mount.path().to_string_lossy().into_owned();
    let none = cachefs(&["why", "--mount", &path]).unwrap();
    assert!(none.code == 0 && none.stdout.contains("No start was recorded"), "{none:?}");
    let unknown = cachefs(&["why", "--mount", &path, "nope:1"]).unwrap();
    assert!(unknown.code == 1 && unknown.stderr.contains("no start of image nope:1 was recorded"), "{unknown:?}");
    let unknown = cachefs(&["why", "--mount", &path, "nope:1", "--json"]).unwrap();
    check_error(&unknown, 1, "failed", "nope:1").unwrap();
    assert_eq!(serde_json::from_str::<Value>(&unknown.stdout).unwrap()["starts"], Value::Array(Vec::new()));
}

/// podman #16043: the archive must be readable by its owner only, as with `docker save -o`.
#[test]
fn an_archive_is_its_owners_alone_and_none_is_left_in_parts() {
    let site = Site::start().unwrap();
    hosts::load(&site, &small().unwrap()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let mode = |name: &str| path(name).metadata().unwrap().permissions().mode() & 0o7777;
    let export = |name: &str| site.ctl().ok(&["export", "small:latest", &path(name).to_string_lossy()]).unwrap();
    for (name, before, after) in [("new", None, 0o600), ("shared", Some(0o640), 0o640), ("open", Some(0o644), 0o644)] {
        if let Some(before) = before {
            fs::write(path(name), "old").unwrap();
            fs::set_permissions(path(name), fs::Permissions::from_mode(before)).unwrap();
        }
        export(name);
        assert_eq!((mode(name), path(name).metadata().unwrap().len() > 1_000_000), (after, true), "{name}");
    }

    // A coordinator that never finishes its answer.
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", server.local_addr().unwrap());
    let halves = tempfile::tempdir().unwrap();
    let left = || fs::read_dir(halves.path()).unwrap().flatten().map(|entry| entry.file_name()).collect::<Vec<_>>();
    let file = halves.path().join("image.tar");
    let begin = || {
        let log = directory.path().join("log");
        let mut command = Command::new(binary("cachefsctl").unwrap());
        command.args(["--server", &url, "export", "a"]).arg(&file);
        let process = tests::process::Process::spawn("export", &mut command, &log).unwrap();
        let (mut stream, _) = server.accept().unwrap();
        std::io::Read::read(&mut stream, &mut [0; 4096]).unwrap();
        std::io::Write::write_all(&mut stream, b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf").unwrap();
        wait_until("half an archive", TIMEOUT, || Ok(left().len() == 1)).unwrap();
        let partial = halves.path().join(&left()[0]);
        assert_eq!(partial.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
        (process, stream)
    };
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        let (mut process, _stream) = begin();
        process.signal(signal).unwrap();
        assert_eq!(process.wait(TIMEOUT).unwrap().code(), Some(code), "{}", process.log());
        assert_eq!(left().len(), 0, "{signal}: {:?}", left());
    }
    let (mut process, stream) = begin();
    drop(stream);
    assert_eq!(process.wait(TIMEOUT).unwrap().code(), Some(1), "{}", process.log());
    assert_eq!(left().len(), 0, "broken off: {:?}", left());
    let (mut process, mut stream) = begin();
    fs::create_dir_all(file.join("in the way")).unwrap();
    std::io::Write::write_all(&mut stream, b"-whole").unwrap();
    assert_eq!(process.wait(TIMEOUT).unwrap().code(), Some(1), "{}", process.log());
    assert_eq!(left(), ["image.tar"], "no name to be had");
}
