//! Commands to a slow disk. A connection carries one line with a command, and is answered by one line, which is `ok`, a
//! JSON document or `error: ` with the reason.
//!
//! | command | what it does |
//! | --- | --- |
//! | `ok` | ends a fault |
//! | `eio`, `estale` | every request fails with that |
//! | `hang` | no request is answered until the next fault or `ok` |
//! | `readonly`, `enospc` | changes fail with EROFS, requests that need space fail with ENOSPC |
//! | `latency 5ms`, `bandwidth 50M`, `bandwidth unlimited` | applies from the next request on |
//! | `stats`, `reset` | shows the counts since the start or the last `reset`; resets them to zero |
//! | `record`, `timeline` | records all requests from now on; ends that and shows them |

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use super::wire::{Fault, Wire};
use crate::quantity;

/// The longest command, bytes.
const LINE: u64 = 200;
/// How long a client may take to send its command.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Serves commands for ever.
pub(super) fn serve(listener: &UnixListener, wire: &Wire) {
    for stream in listener.incoming() {
        // A client that gets no answer notices that by itself.
        let _ = stream.and_then(|stream| converse(stream, wire));
    }
}

fn converse(mut stream: UnixStream, wire: &Wire) -> std::io::Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
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
        ("record", "") => wire.timeline.record(),
        ("timeline", "") => return Ok(wire.timeline.end().to_string()),
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
        for command in ["eio", "hang", "ok", "latency 0.2ms", "bandwidth 50M", "bandwidth unlimited", "reset", "record"]
        {
            assert_eq!(obey(command, &wire), Ok("ok".to_owned()), "{command}");
        }
        assert!(obey("stats", &wire).unwrap().starts_with('{'));
        assert_eq!(obey("timeline", &wire), Ok("[]".to_owned()));
        for command in ["", "eio now", "latency", "latency 5", "explode"] {
            assert!(obey(command, &wire).is_err(), "{command}");
        }
    }
}
