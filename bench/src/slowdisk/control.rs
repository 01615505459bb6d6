//! Commands to a slow disk: one line for a connection, answered by one line, which is `ok`, a JSON document or
//! `error: ` with the reason.
//!
//! | command | what it does |
//! | --- | --- |
//! | `ok` | ends a fault |
//! | `eio`, `estale` | every request fails with that |
//! | `hang` | no request is answered until the next fault or `ok` |
//! | `readonly`, `enospc` | changes fail with EROFS, what needs room fails with ENOSPC |
//! | `latency 5ms`, `bandwidth 50M`, `bandwidth unlimited` | from the next request on |
//! | `stats`, `reset` | what was asked since the start or the last `reset`; counts from zero |

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use super::wire::{Fault, Wire};
use crate::quantity;

/// The longest command.
const LINE: u64 = 200;
/// How long a client may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(5);

/// Obeys for ever.
pub(super) fn serve(listener: &UnixListener, wire: &Wire) {
    for stream in listener.incoming() {
        // Whoever does not get an answer sees that himself.
        let _ = stream.and_then(|stream| converse(stream, wire));
    }
}

fn converse(mut stream: UnixStream, wire: &Wire) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new((&stream).take(LINE)).read_line(&mut line)?;
    let answer = obey(line.trim(), wire).unwrap_or_else(|why| format!("error: {why}"));
    stream.write_all(format!("{answer}\n").as_bytes())
}

fn obey(command: &str, wire: &Wire) -> Result<String, String> {
    match command.split_once(' ').unwrap_or((command, "")) {
        ("ok", "") => wire.set_fault(Fault::None),
        ("eio", "") => wire.set_fault(Fault::Io),
        ("estale", "") => wire.set_fault(Fault::Stale),
        ("hang", "") => wire.set_fault(Fault::Hang),
        ("readonly", "") => wire.set_fault(Fault::ReadOnly),
        ("enospc", "") => wire.set_fault(Fault::Full),
        ("latency", value) => wire.set_latency(quantity::duration(value)?),
        ("bandwidth", "unlimited") => wire.set_bandwidth(None),
        ("bandwidth", value) => wire.set_bandwidth(Some(quantity::rate(value)?)),
        ("reset", "") => wire.reset(),
        ("stats", "") => return Ok(wire.statistics().to_string()),
        _ => return Err(format!("there is no command `{command}`")),
    }
    Ok("ok".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_taken_or_refused_with_the_reason() {
        let wire = Wire::new(Duration::ZERO, None);
        for command in ["eio", "hang", "ok", "latency 0.2ms", "bandwidth 50M", "bandwidth unlimited", "reset"] {
            assert_eq!(obey(command, &wire), Ok("ok".to_owned()), "{command}");
        }
        assert!(obey("stats", &wire).unwrap().starts_with('{'));
        for command in ["", "eio now", "latency", "latency 5", "explode"] {
            assert!(obey(command, &wire).is_err(), "{command}");
        }
    }
}
