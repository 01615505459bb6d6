//! Image configs, read as Docker reads them. An error names the field that dockerd could not restore.
//!
//! dockerd reads every config of its data-root when it starts. A config that does not fit its types is logged and
//! dropped, and one whose `os` is Linux in another spelling stops dockerd for good. So a config is published, and given
//! to a data-root, only if it fits. This module describes those types, and coordinator and hosts read configs through
//! it alone. Source: `image.Image`, `container.Config` and `image.(*store)` of Docker 20.10, which later versions only
//! add to. Go reads times more loosely than RFC 3339, and so does this module.
//!
//! Invariant: [`ImageConfig::parse`] accepts nothing that Docker refuses. What it refuses beyond that: an `os` in
//! another spelling in an image without layers, and what newer versions refuse (offsets of more than a day, a
//! `StartInterval` that is not a number).

use serde::Deserialize;
use thiserror::Error;

use crate::digest::Digest;
use crate::go_json::{self, Kind, Raw};

/// The types of Docker's fields, as far as they decide what can be read.
#[derive(Debug, Clone, Copy)]
enum Type {
    Bool,
    /// 64 bits, signed.
    Int,
    Text,
    /// A text that Go's `time.Time` accepts.
    Time,
    /// A list of texts, or one text.
    Words,
    List(&'static Type),
    /// An object whose keys are data.
    Map(&'static Type),
    /// An object of which these keys are read.
    Struct(&'static [(&'static str, Type)]),
}

use Type::{Bool, Int, List, Map, Struct, Text, Time, Words};

/// Any number of texts.
const TEXTS: Type = List(&Text);
/// A set is an object whose values are empty objects.
const SET: Type = Map(&Struct(&[]));

/// Docker's `container.HealthConfig`. Times are nanoseconds.
const HEALTH: Type = Struct(&[
    ("Test", TEXTS),
    ("Interval", Int),
    ("Timeout", Int),
    ("StartPeriod", Int),
    ("StartInterval", Int),
    ("Retries", Int),
]);

/// Docker's `container.Config`.
const CONTAINER: Type = Struct(&[
    ("Hostname", Text),
    ("Domainname", Text),
    ("User", Text),
    ("AttachStdin", Bool),
    ("AttachStdout", Bool),
    ("AttachStderr", Bool),
    ("ExposedPorts", SET),
    ("Tty", Bool),
    ("OpenStdin", Bool),
    ("StdinOnce", Bool),
    ("Env", TEXTS),
    ("Cmd", Words),
    ("Healthcheck", HEALTH),
    ("ArgsEscaped", Bool),
    ("Image", Text),
    ("Volumes", SET),
    ("WorkingDir", Text),
    ("Entrypoint", Words),
    ("NetworkDisabled", Bool),
    ("MacAddress", Text),
    ("OnBuild", TEXTS),
    ("Labels", Map(&Text)),
    ("StopSignal", Text),
    ("StopTimeout", Int),
    ("Shell", Words),
]);

/// Docker's `image.History`.
const HISTORY: Type =
    Struct(&[("created", Time), ("author", Text), ("created_by", Text), ("comment", Text), ("empty_layer", Bool)]);

/// Docker's `image.Image`.
const IMAGE: Type = Struct(&[
    ("id", Text),
    ("parent", Text),
    ("comment", Text),
    ("created", Time),
    ("container", Text),
    ("container_config", CONTAINER),
    ("docker_version", Text),
    ("author", Text),
    ("config", CONTAINER),
    ("architecture", Text),
    ("variant", Text),
    ("os", Text),
    ("Size", Int),
    ("rootfs", Struct(&[("type", Text), ("diff_ids", TEXTS)])),
    ("history", List(&HISTORY)),
    ("os.version", Text),
    ("os.features", TEXTS),
]);

/// Why Docker cannot use a config.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Unusable {
    /// The config is not a JSON document.
    #[error("{0}")]
    Text(#[from] serde_json::Error),
    /// A field has another type than in Docker.
    #[error("{field} holds {found} where Docker wants {wanted}")]
    Field {
        /// The field's name, after those of the fields that it is in.
        field: String,
        /// What is there.
        found: &'static str,
        /// What should be there.
        wanted: &'static str,
    },
    /// The document has no `rootfs`, so it is not an image's config.
    #[error("it has no rootfs, so it is not an image's")]
    NoRootFs,
    /// The image is for another system.
    #[error("its os is {os:?}, and Docker on Linux takes \"linux\" alone, in this spelling")]
    OperatingSystem {
        /// The system, as it is written.
        os: String,
        /// The processor, as it is written.
        architecture: String,
    },
    /// The history does not fit the layers.
    #[error("its history has {steps} steps that made a layer, and it names {layers} layers")]
    History {
        /// Steps that made a layer.
        steps: usize,
        /// Layers.
        layers: usize,
    },
}

impl Type {
    fn check(self, value: Raw<'_>, field: &str) -> Result<(), Unusable> {
        match (self, value.kind()) {
            (_, Kind::Null) | (Bool, Kind::Bool) | (Text | Words, Kind::Text) => Ok(()),
            (Int, Kind::Number) if value.literal().parse::<i64>().is_ok() => Ok(()),
            (Time, Kind::Text) if is_time(value.literal()) => Ok(()),
            (Words, Kind::List) => value.elements(|element| Text.check(element, field)),
            (List(of), Kind::List) => value.elements(|element| of.check(element, field)),
            (Map(of), Kind::Object) => value.members(|_, value| of.check(value, field)),
            (Struct(fields), Kind::Object) => value.members(|key, value| {
                let Some((name, of)) = go_json::field(fields, |(name, _)| name, key) else { return Ok(()) };
                let path = if field.is_empty() { (*name).to_owned() } else { format!("{field}.{name}") };
                of.check(value, &path)
            }),
            (_, kind) => Err(Unusable::Field {
                field: if field.is_empty() { "the document".to_owned() } else { field.to_owned() },
                found: found(kind),
                wanted: self.wanted(),
            }),
        }
    }

    fn wanted(self) -> &'static str {
        match self {
            Bool => "true or false",
            Int => "a whole number of 64 bits",
            Text => "a text",
            Time => "a time such as 2006-01-02T15:04:05Z",
            Words => "a list of texts or a text",
            List(_) => "a list",
            Map(_) | Struct(_) => "an object",
        }
    }
}

fn found(kind: Kind) -> &'static str {
    match kind {
        Kind::Null => "null",
        Kind::Bool => "true or false",
        Kind::Number => "a number",
        Kind::Text => "a text",
        Kind::List => "a list",
        Kind::Object => "an object",
    }
}

/// Whether Go's `time.Time` accepts a JSON string, given with its quotes and escapes: `2006-01-02T15:04:05`, where the
/// hour may have one digit and a fraction may follow after a point or a comma, and then `Z` or an offset.
fn is_time(quoted: &str) -> bool {
    time(quoted.as_bytes()).is_some()
}

fn time(quoted: &[u8]) -> Option<()> {
    let text = quoted.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    let (year, text) = digits(text, 4)?;
    let (month, text) = digits(text.strip_prefix(b"-")?, 2)?;
    let (day, text) = digits(text.strip_prefix(b"-")?, 2)?;
    let text = text.strip_prefix(b"T")?;
    let (hour, text) = digits(text, 2).or_else(|| digits(text, 1))?;
    let (minute, text) = digits(text.strip_prefix(b":")?, 2)?;
    let (second, mut text) = digits(text.strip_prefix(b":")?, 2)?;
    if let [b'.' | b',', first, ..] = text
        && first.is_ascii_digit()
    {
        let end = text[1..].iter().position(|byte| !byte.is_ascii_digit()).map_or(text.len(), |at| at + 1);
        text = &text[end..];
    }
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days = match month {
        2 => 28 + u32::from(is_leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    let is_in_bounds = (1..=days).contains(&day) && hour < 24 && minute < 60 && second < 60;
    (is_in_bounds && is_zone(text)?).then_some(())
}

/// Whether `text`, what is left of a time, is a zone: `Z` or an offset.
fn is_zone(text: &[u8]) -> Option<bool> {
    if text == b"Z" {
        return Some(true);
    }
    let offset = text.strip_prefix(b"+").or_else(|| text.strip_prefix(b"-"))?;
    let (hours, text) = digits(offset, 2)?;
    let (minutes, text) = digits(text.strip_prefix(b":")?, 2)?;
    Some(hours <= 24 && minutes <= 60 && text.is_empty())
}

/// A number of `count` digits, and what follows.
fn digits(text: &[u8], count: usize) -> Option<(u32, &[u8])> {
    let (number, rest) = text.split_at_checked(count)?;
    let number = number
        .iter()
        .try_fold(0, |number, byte| byte.is_ascii_digit().then(|| number * 10 + u32::from(byte - b'0')))?;
    Some((number, rest))
}

/// The fields of a config that are read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Fields {
    architecture: String,
    os: String,
    variant: String,
    rootfs: Option<RootFs>,
    history: Vec<Step>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RootFs {
    diff_ids: Vec<Digest>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Step {
    empty_layer: bool,
}

/// The config of an image that Docker on Linux can use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageConfig {
    /// The processor, as it is written; may be empty.
    pub architecture: String,
    /// Its variant; may be empty.
    pub variant: String,
    /// The layers, base first.
    pub diff_ids: Vec<Digest>,
}

impl ImageConfig {
    /// Reads a config.
    ///
    /// # Errors
    /// If Docker would refuse it, or could not start with it.
    pub fn parse(bytes: &[u8]) -> Result<ImageConfig, Unusable> {
        let text = String::from_utf8_lossy(bytes);
        let document = Raw::of(&text)?;
        IMAGE.check(document, "")?;
        let Fields { architecture, os, variant, rootfs, history } = document.read()?;
        let diff_ids = rootfs.ok_or(Unusable::NoRootFs)?.diff_ids;
        if !matches!(os.as_str(), "" | "linux") {
            let short = |text: String| text.chars().take(100).collect();
            return Err(Unusable::OperatingSystem { os: short(os), architecture: short(architecture) });
        }
        let (steps, layers) = (history.iter().filter(|step| !step.empty_layer).count(), diff_ids.len());
        if steps > layers {
            Err(Unusable::History { steps, layers })
        } else {
            Ok(ImageConfig { architecture, variant, diff_ids })
        }
    }
}

/// The layers that a config names, base first, whether or not Docker can use the rest of it.
///
/// # Errors
/// If they cannot be read, or if the document is not an image's and has no layers to name.
pub fn diff_ids(config: &[u8]) -> Result<Vec<Digest>, Unusable> {
    let fields: Named = go_json::from_slice(config)?;
    Ok(fields.rootfs.ok_or(Unusable::NoRootFs)?.diff_ids)
}

/// What a container of an image runs, if its creator says nothing else.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Process {
    /// The entrypoint's words, then the command's; may be empty.
    pub arguments: Vec<String>,
    /// `NAME=value` each.
    pub env: Vec<String>,
    /// Where it starts; may be empty.
    pub working_dir: String,
}

impl Process {
    /// The value of a variable of its environment.
    pub fn variable(&self, name: &str) -> Option<&str> {
        self.env.iter().rev().find_map(|one| one.strip_prefix(name)?.strip_prefix('='))
    }
}

/// What a container of the image with this config runs.
///
/// # Errors
/// If the config cannot be read.
pub fn process(config: &[u8]) -> Result<Process, Unusable> {
    let Container { entrypoint, cmd, env, working_dir } =
        go_json::from_slice::<Run>(config)?.config.unwrap_or_default();
    let arguments = entrypoint.into_iter().chain(cmd).flat_map(ManyWords::into_words).collect();
    Ok(Process { arguments, env: env.unwrap_or_default(), working_dir: working_dir.unwrap_or_default() })
}

/// The part of a config that says what runs.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Run {
    config: Option<Container>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Container {
    entrypoint: Option<ManyWords>,
    cmd: Option<ManyWords>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
}

/// A list of texts, or one text.
#[derive(Deserialize)]
#[serde(untagged)]
enum ManyWords {
    List(Vec<String>),
    One(String),
}

impl ManyWords {
    fn into_words(self) -> Vec<String> {
        match self {
            ManyWords::List(words) => words,
            ManyWords::One(word) => vec![word],
        }
    }
}

/// The part of a config that names layers.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Named {
    rootfs: Option<RootFs>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A config with `more` among its fields.
    fn with(more: &str) -> String {
        format!("{{\"os\":\"linux\",\"rootfs\":{{\"type\":\"layers\",\"diff_ids\":[\"{}\"]}}{more}}}", Digest::of(b"1"))
    }

    fn said(config: &str) -> String {
        ImageConfig::parse(config.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn what_docker_reads_is_read() {
        let full = r#","architecture":"arm","variant":"v7","created":"2020-01-01T00:00:00.1Z","Size":-0,"config":{"Cmd":"/x",
            "Entrypoint":["/x"],"Env":[null,"A=b"],"Labels":{"a":null},"Volumes":{"/a":null,"/b":{"x":1}},"Healthcheck":
            {"Interval":30},"StopTimeout":null},"history":[{"created":null,"empty_layer":true},{}],"unknown":[1e999]"#;
        let read = ImageConfig::parse(with(full).as_bytes()).unwrap();
        let expected =
            ImageConfig { architecture: "arm".into(), variant: "v7".into(), diff_ids: vec![Digest::of(b"1")] };
        assert_eq!(read, expected);
        for odd in [r#","OS":"linux""#, r#","config":null"#, r#","rootfs":{"type":"layers"}"#, r#","os":null"#] {
            assert_eq!(ImageConfig::parse(with(odd).as_bytes()).unwrap().diff_ids.len(), 1, "{odd}");
        }
    }

    #[test]
    fn what_docker_refuses_is_refused_by_the_fields_name() {
        for (more, field) in [
            (r#","os":"Linux""#, "its os is \"Linux\""),
            (r#","OS":"LINUX""#, "its os is \"LINUX\""),
            (r#","oſ":"windows""#, "its os is \"windows\""),
            (r#","os":1,"os":"linux""#, "os holds a number"),
            (r#","rootfs":null"#, "no rootfs"),
            (r#","created":"""#, "created holds a text where Docker wants a time"),
            (r#","history":{}"#, "history holds an object where Docker wants a list"),
            (r#","history":[{"created":1}]"#, "history.created"),
            (r#","history":[{},{}]"#, "its history has 2 steps"),
            (r#","Size":1.0"#, "Size holds a number"),
            (r#","size":9223372036854775808"#, "Size"),
            (r#","config":"x""#, "config holds a text where Docker wants an object"),
            (r#","config":{"env":"A=b"}"#, "config.Env"),
            (r#","config":{"Cmd":[1]}"#, "config.Cmd"),
            (r#","config":{"Cmd":{}}"#, "config.Cmd holds an object where Docker wants a list of texts or a text"),
            (r#","config":{"Labels":{"a":1}}"#, "config.Labels holds a number where Docker wants a text"),
            (r#","config":{"Volumes":["/a"]}"#, "config.Volumes"),
            (r#","config":{"ExposedPorts":{"80":1}}"#, "config.ExposedPorts"),
            (r#","config":{"Healthcheck":{"Interval":"30s"}}"#, "config.Healthcheck.Interval"),
            (r#","container_config":{"Tty":"true"}"#, "container_config.Tty"),
            (r#","os.features":"a""#, "os.features"),
        ] {
            assert!(said(&with(more)).contains(field), "{more}: {}", said(&with(more)));
        }
        for broken in ["", "{}", "null", "[]", "\u{feff}{}", "{\"rootfs\":{\"diff_ids\":[\"sha256:a\"]}}"] {
            assert!(ImageConfig::parse(broken.as_bytes()).is_err(), "{broken}");
        }
        let deep = with(&format!(",\"x\":{}{}", "[".repeat(20_000), "]".repeat(20_000)));
        assert!(ImageConfig::parse(deep.as_bytes()).is_err());
    }

    #[test]
    fn times_are_gos() {
        let good = [
            "2006-01-02T15:04:05Z",
            "0000-02-29T00:00:00Z",
            "2006-01-02T1:04:05Z",
            "2006-01-02T15:04:05,123456789123Z",
            "2006-01-02T15:04:05.9-23:59",
        ];
        for text in good {
            assert!(is_time(&format!("\"{text}\"")), "{text}");
        }
        let bad = [
            "",
            "Z",
            "2006-01-02",
            "2006-01-02 15:04:05Z",
            "2006-01-02T15:04:05",
            "2006-01-02T15:04:05.Z",
            "2006-01-02T15:04:60Z",
            "2006-01-02T24:00:00Z",
            "2006-02-29T00:00:00Z",
            "2006-00-01T00:00:00Z",
            "2006-01-00T00:00:00Z",
            "2006-01-02t15:04:05z",
            "2006-01-02T15:04:05Z ",
            "2006-01-02T15:04:05\\u005a",
            "2006-01-02T15:04:05+25:00",
            "2006-01-02T15:04:05+1:00",
            "-006-01-02T15:04:05Z",
        ];
        for text in bad {
            assert!(!is_time(&format!("\"{text}\"")), "{text}");
        }
    }

    #[test]
    fn what_a_container_runs() {
        let config = br#"{"config": {"Entrypoint": ["/entry.sh"], "cmd": "nginx", "Env": ["PATH=/bin", "A=1", "A=2"], "WorkingDir": "/w"}}"#;
        let run = process(config).unwrap();
        assert_eq!(
            (run.arguments.clone(), &*run.working_dir),
            (vec!["/entry.sh".to_owned(), "nginx".to_owned()], "/w")
        );
        assert_eq!((run.variable("A"), run.variable("PAT")), (Some("2"), None));
        assert_eq!(process(br#"{"config": null}"#).unwrap(), Process::default());
        assert_eq!(process(br#"{"config": {"Cmd": null, "Env": null}}"#).unwrap(), Process::default());
        assert!(process(b"[]").is_err());
    }

    #[test]
    fn layers_are_named_by_what_docker_cannot_use_as_well() {
        assert_eq!(diff_ids(with(r#","os":"Linux","config":1"#).as_bytes()).unwrap(), [Digest::of(b"1")]);
        assert_eq!(diff_ids(b"{\"RootFS\":{\"diff_ids\":null}}").unwrap(), []);
        assert!(diff_ids(b"{}").is_err() && diff_ids(b"{\"rootfs\":null}").is_err());
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes: Vec<u8>, value in "[\\[\\]{}\",:a-z0-9.TZ+-]{0,30}") {
            let _ = (ImageConfig::parse(&bytes), diff_ids(&bytes), is_time(&value));
            for field in ["created", "config", "history", "rootfs", "Size"] {
                let _ = ImageConfig::parse(with(&format!(",\"{field}\":{value}")).as_bytes());
                let _ = ImageConfig::parse(with(&format!(",\"{field}\":\"{value}\"")).as_bytes());
            }
        }
    }
}
