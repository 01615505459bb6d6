//! Makes the config of an image from its `json` of before Docker 1.10, byte for byte as dockerd does: the config's digest is the image's
//! id.
//!
//! Fields that the new format does not use are removed from `json`, and `rootfs` and `history` are added. What Docker before 1.8.3 wrote is
//! first reduced to the fields that dockerd knows, and missing ones are filled in; what later versions wrote stays as it is. The result is
//! written as Go writes JSON: keys in order, no blanks, and `<`, `>` and `&` escaped. Source: the images that Docker 20.10 makes of such
//! archives.

use std::collections::BTreeMap;
use std::fmt;
use std::io;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Error;
use serde_json::ser::{CharEscape, Formatter};
use serde_json::value::RawValue;
use store::Digest;

use store::go_json;

/// Fields of `json` that configs do not have.
const DROPPED: [&str; 6] = ["id", "parent", "Size", "parent_id", "layer_id", "throwaway"];
/// The first version of Docker whose `json` is taken as it is.
const TAKEN_SINCE: [i64; 3] = [1, 8, 3];
/// The time that stands for a missing one.
const NO_TIME: &str = "0001-01-01T00:00:00Z";

/// What is needed from a `json` besides its config.
#[derive(Debug)]
pub(super) struct Parsed {
    /// The id of the image below.
    pub(super) parent: Option<String>,
    /// The layer's entry in the config's history.
    pub(super) history: History,
}

/// An entry of a config's history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct History {
    created: Time,
    #[serde(skip_serializing_if = "String::is_empty")]
    author: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    created_by: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    comment: String,
}

/// A config's list of layers.
#[derive(Serialize)]
struct RootFs<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    diff_ids: &'a [Digest],
}

/// Parses a `json`. Fails if the image is not for Linux.
pub(super) fn parse(json: &[u8]) -> Result<Parsed, Error> {
    let image: Image = go_json::from_slice(json)?;
    if !matches!(image.os.as_str(), "" | "linux") {
        return Err(serde::de::Error::custom(format!("it is for {}, not for linux", image.os)));
    }
    let words = image.container_config.cmd.unwrap_or_default().0;
    let created_by = words.join(" ");
    let history = History { created: image.created, author: image.author, created_by, comment: image.comment };
    Ok(Parsed { parent: Some(image.parent).filter(|parent| !parent.is_empty()), history })
}

/// Makes the config of an image from its `json` and its layers, the lowest first.
pub(super) fn make_config(json: &[u8], diff_ids: &[Digest], history: &[&History]) -> Result<Vec<u8>, Error> {
    let image: Image = go_json::from_slice(json)?;
    let text = if is_older(&image.docker_version) {
        go_text(&image)?
    } else {
        std::str::from_utf8(json).map_err(serde::de::Error::custom)?.to_owned()
    };
    let mut fields: BTreeMap<String, Box<RawValue>> = serde_json::from_str(&text)?;
    DROPPED.iter().for_each(|field| drop(fields.remove(*field)));
    let root_fs = RootFs { kind: "layers", diff_ids };
    fields.insert("rootfs".to_owned(), RawValue::from_string(go_text(&root_fs)?)?);
    fields.insert("history".to_owned(), RawValue::from_string(go_text(&history)?)?);
    go_text(&fields).map(String::into_bytes)
}

/// Whether a version is older than [`TAKEN_SINCE`], compared as dockerd does: parts that are no numbers count as 0.
fn is_older(version: &str) -> bool {
    let mut parts = version.split('.').map(|part| part.parse::<i64>().unwrap_or(0));
    let wanted = TAKEN_SINCE.map(|wanted| (wanted, parts.next().unwrap_or(0)));
    wanted.into_iter().find(|(wanted, has)| wanted != has).is_some_and(|(wanted, has)| has < wanted)
}

/// A point in time, as Go writes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Time(String);

impl Default for Time {
    fn default() -> Time {
        Time(NO_TIME.to_owned())
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Time, D::Error> {
        let Some(text) = Option::<String>::deserialize(deserializer)? else { return Ok(Time::default()) };
        normal(&text).map(Time).ok_or_else(|| serde::de::Error::custom(format!("{text:?} is no time of RFC 3339")))
    }
}

/// Normalises a time of RFC 3339 to as few digits as possible, and keeps its zone (UTC becomes `Z`). `None` if it is not such a time.
fn normal(text: &str) -> Option<String> {
    let (seconds, rest) = text.split_at_checked(19)?;
    // Formatting the parsed time gives the same text, unless it was a leap second or had other separators.
    seconds.parse::<jiff::civil::DateTime>().ok().filter(|parsed| parsed.to_string() == seconds)?;
    let zone_at = rest.find(['Z', '+', '-'])?;
    let (fraction, zone) = rest.split_at(zone_at);
    let digits = match fraction.strip_prefix(['.', ',']) {
        Some(digits) if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) => digits,
        None if fraction.is_empty() => "",
        _ => return None,
    };
    let digits = digits[..digits.len().min(9)].trim_end_matches('0');
    let zone = match zone {
        "Z" | "+00:00" | "-00:00" => "Z",
        zone => is_offset(zone).then_some(zone)?,
    };
    let point = if digits.is_empty() { "" } else { "." };
    Some(format!("{seconds}{point}{digits}{zone}"))
}

/// Whether this is `+hh:mm` or `-hh:mm`.
fn is_offset(zone: &str) -> bool {
    let number = |range: std::ops::Range<usize>| {
        let digits = zone.get(range).filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?;
        digits.parse::<u8>().ok()
    };
    let is_below = |number: Option<u8>, limit: u8| number.is_some_and(|number| number < limit);
    zone.len() == 6 && zone.get(3..4) == Some(":") && is_below(number(1..3), 24) && is_below(number(4..6), 60)
}

/// The fields of `json` that dockerd knows; `id` and `Size` are not needed.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Image {
    #[serde(skip_serializing)]
    parent: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    comment: String,
    created: Time,
    #[serde(skip_serializing_if = "String::is_empty")]
    container: String,
    container_config: ContainerConfig,
    #[serde(skip_serializing_if = "String::is_empty")]
    docker_version: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    author: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    config: Option<ContainerConfig>,
    #[serde(skip_serializing_if = "String::is_empty")]
    architecture: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    variant: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    os: String,
}

/// How a container is run, its fields in dockerd's order.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct ContainerConfig {
    hostname: String,
    domainname: String,
    user: String,
    attach_stdin: bool,
    attach_stdout: bool,
    attach_stderr: bool,
    #[serde(skip_serializing_if = "is_empty")]
    exposed_ports: Option<BTreeMap<String, Nothing>>,
    tty: bool,
    open_stdin: bool,
    stdin_once: bool,
    env: Option<Vec<String>>,
    cmd: Option<Words>,
    #[serde(skip_serializing_if = "Option::is_none")]
    healthcheck: Option<HealthCheck>,
    #[serde(skip_serializing_if = "is_false")]
    args_escaped: bool,
    image: String,
    volumes: Option<BTreeMap<String, Nothing>>,
    working_dir: String,
    entrypoint: Option<Words>,
    #[serde(skip_serializing_if = "is_false")]
    network_disabled: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    mac_address: String,
    on_build: Option<Vec<String>>,
    labels: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "String::is_empty")]
    stop_signal: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_timeout: Option<i64>,
    #[serde(skip_serializing_if = "Words::are_none")]
    shell: Option<Words>,
}

/// A container's health check; times are in nanoseconds.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct HealthCheck {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    test: Vec<String>,
    #[serde(skip_serializing_if = "is_zero")]
    interval: i64,
    #[serde(skip_serializing_if = "is_zero")]
    timeout: i64,
    #[serde(skip_serializing_if = "is_zero")]
    start_period: i64,
    #[serde(skip_serializing_if = "is_zero")]
    retries: i64,
}

/// The value type of maps in which only the keys count.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Nothing {}

fn is_empty(map: &Option<BTreeMap<String, Nothing>>) -> bool {
    map.as_ref().is_none_or(BTreeMap::is_empty)
}

// serde passes references, even to values that are smaller.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_false(flag: &bool) -> bool {
    !flag
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(number: &i64) -> bool {
    *number == 0
}

/// A command's words; a plain string is one word.
#[derive(Debug, Default, Serialize)]
struct Words(Vec<String>);

impl Words {
    fn are_none(words: &Option<Words>) -> bool {
        words.as_ref().is_none_or(|words| words.0.is_empty())
    }
}

impl<'de> Deserialize<'de> for Words {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Words, D::Error> {
        deserializer.deserialize_any(WordsVisitor)
    }
}

struct WordsVisitor;

impl<'de> serde::de::Visitor<'de> for WordsVisitor {
    type Value = Words;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a text or a list of texts")
    }

    fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<Words, E> {
        Ok(Words(vec![word.to_owned()]))
    }

    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<Words, A::Error> {
        let mut words = Vec::new();
        while let Some(word) = list.next_element::<Option<String>>()? {
            words.push(word.unwrap_or_default());
        }
        Ok(Words(words))
    }
}

/// Serialises a value as Go writes it.
fn go_text(value: &impl Serialize) -> Result<String, Error> {
    let mut text = Vec::new();
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, GoFormat))?;
    String::from_utf8(text).map_err(serde::ser::Error::custom)
}

/// Escapes as in Go's `encoding/json` until Go 1.21. Raw JSON is only compacted, and gets Go's additional escapes.
struct GoFormat;

/// Whether Go escapes a character although JSON does not ask for it.
fn escaped(char: char) -> bool {
    matches!(char, '<' | '>' | '&' | '\u{2028}' | '\u{2029}')
}

impl Formatter for GoFormat {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, mut fragment: &str) -> io::Result<()> {
        while let Some(at) = fragment.find(escaped) {
            let (plain, rest) = fragment.split_at(at);
            writer.write_all(plain.as_bytes())?;
            let mut chars = rest.chars();
            if let Some(char) = chars.next() {
                write!(writer, "\\u{:04x}", u32::from(char))?;
            }
            fragment = chars.as_str();
        }
        writer.write_all(fragment.as_bytes())
    }

    fn write_char_escape<W: ?Sized + io::Write>(&mut self, writer: &mut W, escape: CharEscape) -> io::Result<()> {
        match escape {
            CharEscape::Backspace => writer.write_all(b"\\u0008"),
            CharEscape::FormFeed => writer.write_all(b"\\u000c"),
            other => serde_json::ser::CompactFormatter.write_char_escape(writer, other),
        }
    }

    fn write_raw_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let (mut in_string, mut after_backslash, mut begin) = (false, false, 0);
        for (at, char) in fragment.char_indices() {
            let is_blank = !in_string && char.is_ascii_whitespace();
            if is_blank || escaped(char) {
                writer.write_all(&fragment.as_bytes()[begin..at])?;
                begin = at + char.len_utf8();
            }
            if escaped(char) {
                write!(writer, "\\u{:04x}", u32::from(char))?;
            }
            if char == '"' && !after_backslash {
                in_string = !in_string;
            }
            after_backslash = char == '\\' && !after_backslash;
        }
        writer.write_all(&fragment.as_bytes()[begin..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> String {
        let history = parse(json.as_bytes()).unwrap().history;
        String::from_utf8(make_config(json.as_bytes(), &[Digest::of(b"")], &[&history]).unwrap()).unwrap()
    }

    #[test]
    fn times_are_written_as_go_writes_them() {
        for (text, expected) in [
            ("2014-10-01T20:46:08.914288461Z", Some("2014-10-01T20:46:08.914288461Z")),
            ("2014-10-01T20:46:08.120000000000Z", Some("2014-10-01T20:46:08.12Z")),
            ("2014-10-01T20:46:08.000Z", Some("2014-10-01T20:46:08Z")),
            ("2014-10-01T20:46:08+00:00", Some("2014-10-01T20:46:08Z")),
            ("2014-10-01T20:46:08-07:30", Some("2014-10-01T20:46:08-07:30")),
            ("2014-02-30T20:46:08Z", None),
            ("2014-10-01 20:46:08Z", None),
            ("2014-10-01T20:46:08", None),
            ("2014-10-01T20:46:60Z", None),
            ("2014-10-01T20:46:08.Z", None),
            ("2014-10-01T20:46:08+0100", None),
            ("2014-10-01T20:46:08+é:00", None),
            ("", None),
        ] {
            assert_eq!(normal(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn versions_are_compared_as_dockerd_compares_them() {
        let older = ["", "dev", "1.7.0-dev", "1.8", "1.8.2", "1.8.3-rc1", "0.9.0", "1.8.-5"];
        let newer = ["1.8.3", "1.8.3.1", "1.9.0", "1.10.0", "2", "20.10.24+dfsg1"];
        assert!(older.iter().all(|version| is_older(version)));
        assert!(!newer.iter().any(|version| is_older(version)));
    }

    #[test]
    fn what_is_new_stays_and_what_is_old_is_filled_up() {
        let empty = Digest::of(b"");
        let new = config(r#"{"id": "x", "docker_version": "1.9.1", "Zz": [1.50, "<\u00e9>\b"], "throwaway": true}"#);
        let expected = format!(
            r#"{{"Zz":[1.50,"\u003c\u00e9\u003e\b"],"docker_version":"1.9.1","history":[{{"created":"{NO_TIME}"}}],"rootfs":{{"type":"layers","diff_ids":["{empty}"]}}}}"#
        );
        assert_eq!(new, expected);
        let old = config(r#"{"id": "x", "Zz": 1, "config": {"Cmd": "a&b\f"}}"#);
        assert!(!old.contains("Zz") && old.contains(r#""Cmd":["a\u0026b\u000c"]"#), "{old}");
        assert!(old.contains(r#""container_config":{"Hostname":"","Domainname":"","User":"","AttachStdin":false"#));
    }

    #[test]
    fn what_dockerd_refuses_is_refused() {
        for json in [
            "",
            "[]",
            "{",
            r#"{"os": "windows"}"#,
            r#"{"created": "now"}"#,
            r#"{"created": 1}"#,
            r#"{"config": {"Cmd": [1]}}"#,
        ] {
            assert!(parse(json.as_bytes()).is_err(), "{json}");
        }
    }
}
