//! Reads the YAML document that people write for `apply` and `diff`. Errors come with line and column and in terms of YAML and of
//! our keys, because the parser's own messages are for programmers.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use coordinator_api::settings::Settings;
use serde_saphyr::{Error, UserMessageFormatter};

/// Reads a document from a file, or from standard input (`-`).
pub(crate) fn read(path: &Path) -> anyhow::Result<Settings> {
    let mut text = String::new();
    if path == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).context("standard input cannot be read")?;
        return parse(&text, "standard input");
    }
    let name = path.display().to_string();
    match std::fs::read_to_string(path) {
        Ok(text) => parse(&text, &name),
        Err(error) => Err(anyhow!("{name} cannot be read: {error}")),
    }
}

/// Parses the one document in a text. Empty documents between markers do not count.
fn parse(text: &str, name: &str) -> anyhow::Result<Settings> {
    let mut documents: Vec<Settings> = serde_saphyr::from_multiple(text).map_err(|error| {
        let place = error.location().map(|at| format!(":{}:{}", at.line(), at.column())).unwrap_or_default();
        let words = words(&error);
        let line = error.location().and_then(|at| text.lines().nth((at.line() as usize).checked_sub(1)?));
        let hint = line.and_then(quoted).map(|line| format!("; quote what begins with a special character: {line}"));
        anyhow!("{name}{place}: {words}{}", hint.unwrap_or_default())
    })?;
    match documents.len() {
        0 => Ok(Settings::default()),
        1 => Ok(documents.remove(0)),
        count => bail!("{name} holds {count} documents: put everything into one, without --- in between"),
    }
}

/// The error in one line, without its position.
fn words(error: &Error) -> String {
    match error.without_snippet() {
        Error::DuplicateMappingKey { key: Some(key), .. } => format!("key {key} is there twice: write it once"),
        Error::DuplicateMappingKey { key: None, .. } => "a key is there twice: write it once".to_owned(),
        Error::UnknownAnchor { .. } => {
            "a value that begins with * refers to an anchor, and there is none of that name".to_owned()
        }
        Error::Unexpected { expected, .. } => format!("{} is expected here", kind(expected)),
        Error::InvalidScalar { ty, .. } => format!("{} is expected here", kind(ty)),
        Error::SerdeInvalidType { unexpected, expected, .. }
        | Error::SerdeInvalidValue { unexpected, expected, .. } => {
            format!("{} is expected here, not {}", kind(expected), unexpected.replace("sequence", "a list"))
        }
        Error::SerdeMissingField { field, .. } => format!("key {field} is missing"),
        Error::SerdeUnknownField { field, expected, .. } => {
            format!("there is no key {field} here, only {}", expected.join(", "))
        }
        Error::SerdeUnknownVariant { variant, expected, .. } => {
            format!("{variant} is not known here, only {}", expected.join(", "))
        }
        Error::Eof { .. } => "the document ends too early".to_owned(),
        Error::NullIntoString { .. } => "a text is expected here, and there is nothing".to_owned(),
        other => {
            let text = other.render_with_formatter(&UserMessageFormatter);
            let line = text.lines().next().unwrap_or_default();
            let place = error.location().map(|at| format!(" at line {}, column {}", at.line(), at.column()));
            let line = place.as_deref().and_then(|place| line.strip_suffix(place)).unwrap_or(line);
            line.replace("scalar", "text").replace("sequence", "list")
        }
    }
}

/// The parser's name for a kind of value, in words for people.
fn kind(name: &str) -> &str {
    match name {
        "sequence start" | "sequence" => "a list (lines with - in front, or [a, b])",
        "mapping start" | "mapping" => "a block of keys (key: value)",
        "scalar" | "string scalar" => "one value",
        "string" | "str" => "a text",
        "bool" | "boolean" => "true or false",
        "char" => "one character",
        "f32" | "f64" | "float" => "a number",
        _ if name.strip_prefix(['u', 'i']).is_some_and(|bits| bits.bytes().all(|byte| byte.is_ascii_digit())) => {
            "a whole number"
        }
        other => other,
    }
}

/// The line `key: value` with its value quoted, if the value begins with a character that is special in YAML.
fn quoted(line: &str) -> Option<String> {
    let line = line.trim().trim_start_matches("- ");
    let (key, value) = line.split_once(": ").map_or(("", line), |(key, value)| (key, value.trim()));
    let key = if key.is_empty() { String::new() } else { format!("{key}: ") };
    value.starts_with(['*', '@', '`', '%']).then(|| format!("{key}'{}'", value.replace('\'', "''")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = "\
schedules:
  - name: nightly
    images: [r.io/app:1, 'r.io/tools:v1.*']
    cron: 0 3 * * *
    time_zone: Europe/Berlin
    newest: 3
limits:
  bandwidth: 20M
  registries:
    docker.io: {requests_per_minute: 60}
pull_on_demand: true
";

    #[test]
    fn what_is_shown_can_be_applied() {
        let settings = parse(DOCUMENT, "x").unwrap();
        let schedules = settings.schedules.as_ref().unwrap();
        assert_eq!((schedules[0].cron.as_deref(), schedules[0].newest), (Some("0 3 * * *"), Some(3)));
        let shown = serde_saphyr::to_string(&settings).unwrap();
        assert_eq!(parse(&shown, "x").unwrap(), settings, "{shown}");
        assert_eq!(parse("# nothing\n", "x").unwrap(), Settings::default());
    }

    #[test]
    fn what_yaml_has_a_use_for_is_to_be_quoted() {
        let error = |text: &str| parse(text, "s.yaml").unwrap_err().to_string();
        for (value, place) in [("*/15 * * * *", "s.yaml:4:"), ("@daily", "s.yaml:4:"), ("*", "s.yaml:4:")] {
            let text = format!("schedules:\n  - name: a\n    images: [r.io/a:1]\n    cron: {value}\n");
            let error = error(&text);
            let hint = format!("; quote what begins with a special character: cron: '{value}'");
            assert!(error.starts_with(place) && error.ends_with(&hint), "{error}");
        }
        let list = error("pins:\n  - *latest\n");
        assert!(list.ends_with(": '*latest'"), "{list}");
    }

    #[test]
    fn nothing_is_said_in_the_parsers_words() {
        for text in [
            "pins: [a]\n---\npull_on_demand: true\n",
            "pins: [a]\npins: [b]\n",
            "schedules: [{name: a, name: b}]\n",
            "limits: {parallel_layers: many}\n",
            "limits: {parallel_layers: [1]}\n",
            "limits: {parallel_layers: -1}\n",
            "schedules: {name: a}\n",
            "schedules: [a]\n",
            "pins: a\n",
            "pins: [[a]]\n",
            "pins: [~]\n",
            "limits: 5\n",
            "pull_on_demand: perhaps\n",
            "pull_on_demand: [true]\n",
            "retention: {rules: [{pattern: '*', keep_last: x}]}\n",
            "schedules: [\n",
            "pins: 'a\n",
            "pins: [a]\n\tretention: 1\n",
            "schedules: [{}]\n",
            "retention: {rules: [{pattern: 1, keep_last: -1}]}\n",
            "retention: {quota: {limit_bytes: much}}\n",
            "schedules: [{name: a, newest: 1.5}]\n",
            "schedules: [{name: a, on_push: maybe}]\n",
            "pins: [a\n  b: c\n",
            "pins: *none\n",
            "pins: !!binary x\n",
            "pins: !include other.yaml\n",
            "a: &a [*a]\n",
            "- a\n",
            "just words\n",
            "pull_on_demand: true\n  pins: [a]\n",
        ] {
            let error = parse(text, "s.yaml").unwrap_err().to_string();
            let told = format!("{text:?}: {error}");
            assert!(error.starts_with("s.yaml") && error.lines().count() == 1, "{told}");
            for foreign in [
                "from_str",
                "Options",
                "Option<",
                "Policy",
                "u64",
                "u32",
                "usize",
                "sequence",
                "mapping start",
                "scalar",
                "deserialize",
                "_with_",
            ] {
                assert!(!error.contains(foreign), "{foreign} in {told}");
            }
        }
    }

    #[test]
    fn a_file_holds_one_document() {
        let several = parse("pins: [a]\n---\npins: [b]\n", "s.yaml").unwrap_err().to_string();
        assert!(several.contains("2 documents: put everything into one"), "{several}");
        for one in
            ["pins: [a]\n---\n", "---\npins: [a]\n", "---\npins: [a]\n...\n", "# words\n---\npins: [a]\n---\n# more\n"]
        {
            assert_eq!(parse(one, "x").unwrap().pins, Some(vec!["a".to_owned()]), "{one:?}");
        }
        assert_eq!(parse("", "x").unwrap(), Settings::default());
        assert_eq!(parse("---\n", "x").unwrap(), Settings::default());
    }

    #[test]
    fn unknown_keys_are_refused_with_line_and_column() {
        let error = |text: &str| parse(text, "s.yaml").unwrap_err().to_string();
        let misspelt = error(&DOCUMENT.replace("time_zone", "timezone"));
        assert!(misspelt.starts_with("s.yaml:5:5: ") && misspelt.contains("timezone"), "{misspelt}");
        let misspelt = error("limits:\n  bandwith: 1M\n");
        assert!(misspelt.starts_with("s.yaml:2:3: ") && misspelt.contains("bandwith"), "{misspelt}");
        let broken = error("schedules: [\n");
        assert!(broken.starts_with("s.yaml:"), "{broken}");
        let wrong = error("pull_on_demand: perhaps\n");
        assert!(wrong.starts_with("s.yaml:1:17: "), "{wrong}");
    }
}
