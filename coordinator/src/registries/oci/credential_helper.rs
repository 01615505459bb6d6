//! Docker's credential helpers: programs that are asked for one login over their standard input and output.
//!
//! A helper may ask a key service, a browser or a person, and may hang or run wild. It gets [`TIMEOUT`] and a process group of its own,
//! which is killed with it, and its output is read up to [`MAX_OUTPUT`]. Nothing that it prints is put into a message, because it may hold
//! secrets.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::Value;

/// How long a helper may take.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum number of bytes of output that are read: no login is longer.
const MAX_OUTPUT: u64 = 1 << 20;
/// How often to check whether a helper that has closed its outputs has exited.
const LOOK: Duration = Duration::from_millis(10);
/// The user name that marks an identity token.
const TOKEN_USER: &str = "<token>";

/// What a helper answers.
#[derive(PartialEq, Eq)]
pub(super) enum Login {
    /// A user and a password.
    Password(String, String),
    /// An OAuth2 refresh token.
    Token(String),
    /// No login.
    None,
}

/// Parses a helper's answer as Go does: names of fields in any case, and missing fields are empty.
fn answer(bytes: &[u8]) -> Option<Login> {
    let answer: serde_json::Map<String, Value> = serde_json::from_slice(bytes).ok()?;
    let field = |name: &str| match answer.iter().find(|(other, _)| other.eq_ignore_ascii_case(name)) {
        None | Some((_, Value::Null)) => Some(String::new()),
        Some((_, value)) => value.as_str().map(str::to_owned),
    };
    let (user, secret) = (field("Username")?, field("Secret")?);
    Some(if user == TOKEN_USER { Login::Token(secret) } else { Login::Password(user, secret) })
}

/// Asks `docker-credential-NAME` for the login of `server`; an error is a sentence. Blocks.
pub(super) fn ask(name: &str, server: &str) -> Result<Login, String> {
    ask_within(name, server, TIMEOUT)
}

fn ask_within(name: &str, server: &str, patience: Duration) -> Result<Login, String> {
    // The name becomes part of a program's name, not a path to one.
    if name.is_empty() || name.contains('/') {
        return Err(format!("{name:?} is not the name of a credential helper"));
    }
    let program = format!("docker-credential-{name}");
    let mut command = Command::new(&program);
    command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let child = command.spawn();
    let mut child =
        child.map_err(|error| format!("{program} cannot be run ({error}): install it or remove it there"))?;
    let ended = talk(&mut child, server, patience);
    if ended.is_err() {
        // Kill the helper and whatever it started.
        if let Ok(id) = i32::try_from(child.id()) {
            let _ = killpg(Pid::from_raw(id), Signal::SIGKILL);
        }
        let _ = child.kill();
        let _ = child.wait();
    }
    let (is_success, stdout, stderr) = ended.map_err(|why| format!("{program} {why}: try it by hand"))?;
    let says_none = |output: &[u8]| String::from_utf8_lossy(output).to_lowercase().contains("credentials not found");
    if !is_success {
        let none = says_none(&stdout) || says_none(&stderr);
        return if none { Ok(Login::None) } else { Err(format!("{program} fails: try it by hand")) };
    }
    answer(&stdout).ok_or_else(|| format!("{program} gives an unusable answer: try it by hand"))
}

/// Sends a helper the server's name and reads both its outputs. Returns whether it succeeded, and what it printed.
fn talk(child: &mut Child, server: &str, patience: Duration) -> Result<(bool, Vec<u8>, Vec<u8>), String> {
    let deadline = Instant::now() + patience;
    let too_slow = || format!("gives no answer within {} seconds", patience.as_secs());
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that does not read is judged by its answer. The pipe has room for a server's name, so this does not block.
        let _ = stdin.write_all(server.as_bytes());
    }
    let (sender, outputs) = mpsc::channel();
    let stdout = child.stdout.take().map(|pipe| Box::new(pipe) as Box<dyn Read + Send>);
    let stderr = child.stderr.take().map(|pipe| Box::new(pipe) as Box<dyn Read + Send>);
    for (at, pipe) in [stdout, stderr].into_iter().enumerate() {
        let (sender, pipe) = (sender.clone(), pipe.ok_or("has no output")?);
        // These threads end when the pipes are closed, at the latest when the helper's process group is killed.
        std::thread::spawn(move || {
            let mut output = Vec::new();
            let read = pipe.take(MAX_OUTPUT + 1).read_to_end(&mut output);
            let _ = sender.send((at, read.map(|_| output)));
        });
    }
    let mut printed = [Vec::new(), Vec::new()];
    for _ in 0..2 {
        let left = deadline.saturating_duration_since(Instant::now());
        let (at, output) = outputs.recv_timeout(left).map_err(|_| too_slow())?;
        printed[at] = output.map_err(|error| format!("cannot be read from ({error})"))?;
        if printed[at].len() as u64 > MAX_OUTPUT {
            return Err("prints without end".to_owned());
        }
    }
    let status = loop {
        match child.try_wait().map_err(|error| format!("is lost ({error})"))? {
            Some(status) => break status,
            None if Instant::now() >= deadline => return Err(too_slow()),
            None => std::thread::sleep(LOOK),
        }
    };
    let [stdout, stderr] = printed;
    Ok((status.success(), stdout, stderr))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a shell script in a helper's place.
    fn run(script: &str, patience: Duration) -> Result<(bool, Vec<u8>, Vec<u8>), String> {
        let mut command = Command::new("sh");
        command
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let mut child = command.spawn().unwrap();
        let ended = talk(&mut child, "r.io", patience);
        let _ = killpg(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGKILL);
        let _ = child.wait();
        ended
    }

    #[test]
    fn a_helper_that_hangs_is_ended() {
        let began = Instant::now();
        for script in ["sleep 1000", "sleep 1000 & exec >&- 2>&-; wait", "exec sleep 1000 >/dev/null 2>&1"] {
            let error = run(script, Duration::from_millis(300)).unwrap_err();
            assert!(error.contains("no answer"), "{error}");
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    }

    #[test]
    fn a_helper_that_prints_without_end_is_ended() {
        for script in ["yes", "yes >&2"] {
            let error = run(script, Duration::from_secs(60)).unwrap_err();
            assert_eq!(error, "prints without end");
        }
    }

    #[test]
    fn what_a_helper_is_told_and_says_comes_through() {
        let (is_success, stdout, stderr) = run("read -r s; echo \"got $s\"; echo no >&2; exit 3", TIMEOUT).unwrap();
        assert_eq!((is_success, &stdout[..], &stderr[..]), (false, &b"got r.io\n"[..], &b"no\n"[..]));
        let (is_success, stdout, _) = run("cat", TIMEOUT).unwrap();
        assert_eq!((is_success, &stdout[..]), (true, &b"r.io"[..]));
    }

    #[test]
    fn answers_are_read_as_go_reads_them() {
        let login = |user: &str, secret: &str| Some(Login::Password(user.to_owned(), secret.to_owned()));
        for (text, expected) in [
            (r#"{"ServerURL": "r", "Username": "anna", "Secret": "pw"}"#, login("anna", "pw")),
            (r#"{"username": "anna", "SECRET": "pw", "Expiry": 5}"#, login("anna", "pw")),
            (r#"{"Username": "<token>", "Secret": "t"}"#, Some(Login::Token("t".to_owned()))),
            (r#"{"Username": null}"#, login("", "")),
            (r#"{"Username": 5, "Secret": "pw"}"#, None),
            ("anna", None),
            ("", None),
        ] {
            assert!(answer(text.as_bytes()) == expected, "{text}");
        }
    }

    #[test]
    fn a_helper_is_a_name() {
        for bad in ["", "../x", "a/b"] {
            assert!(ask(bad, "r.io").is_err(), "{bad}");
        }
    }
}
