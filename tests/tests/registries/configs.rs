//! Odd image configs, each pulled by this project and by dockerd. The outcome is the same, or the difference is listed.
//! dockerd must also restore every accepted image when it restarts, as is necessary when hosts get it from a store.

use anyhow::{Context, Result, ensure};
use tests::docker::Docker;
use tests::images::digest_of;
use tests::registry::{Documents, write_logins};

use crate::clients::{self, Outcome};
use crate::listed::Does;

/// A config and its name in messages.
struct Config {
    name: String,
    bytes: Vec<u8>,
}

/// Fields of the config itself, of its `config`, of the health check in that, and of a step of its history.
const IMAGE: &[&str] = &[
    "id",
    "parent",
    "comment",
    "created",
    "container",
    "container_config",
    "docker_version",
    "author",
    "config",
    "architecture",
    "variant",
    "Size",
    "history",
    "os.version",
    "os.features",
    "unknown",
];
const CONTAINER: &[&str] = &[
    "Hostname",
    "Domainname",
    "User",
    "AttachStdin",
    "AttachStdout",
    "AttachStderr",
    "ExposedPorts",
    "Tty",
    "OpenStdin",
    "StdinOnce",
    "Env",
    "Cmd",
    "Healthcheck",
    "ArgsEscaped",
    "Image",
    "Volumes",
    "WorkingDir",
    "Entrypoint",
    "NetworkDisabled",
    "MacAddress",
    "OnBuild",
    "Labels",
    "StopSignal",
    "StopTimeout",
    "Shell",
    "Unknown",
];
const HEALTH: &[&str] = &["Test", "Interval", "Timeout", "StartPeriod", "StartInterval", "Retries"];
const STEP: &[&str] = &["created", "author", "created_by", "comment", "empty_layer"];

/// Values of every kind, and values at the limits of types.
const VALUES: &[&str] = &[
    "null",
    "\"\"",
    "7",
    "[]",
    "{\"a\":\"b\"}",
    "true",
    "[\"a\"]",
    "1.5",
    "{\"a\":{}}",
    "\"2020-01-01T00:00:00Z\"",
    "[1]",
    "-9223372036854775809",
    "{}",
    "[null]",
    "{\"a\":1}",
    "\"text\"",
    "{\"a\":null}",
];
/// The number of values that each field is tried with. Different fields get different values.
const EACH: usize = 4;

/// Members with which a config is invalid or unusual.
const ODD: &[&str] = &[
    r#""created":"2020-01-01T1:02:03Z""#,
    r#""created":"2020-01-01T01:02:03,5Z""#,
    r#""created":"2020-01-01T01:02:03.1234567890123+14:00""#,
    r#""created":"2020-01-01T01:02:03.Z""#,
    r#""created":"2020-01-01T01:02:03+25:00""#,
    r#""created":"2020-01-01T01:02:03+1:00""#,
    r#""created":"2020-02-30T00:00:00Z""#,
    r#""created":"2020-01-01T23:59:60Z""#,
    r#""created":"2020-01-01t00:00:00z""#,
    r#""created":"2020-01-01 00:00:00Z""#,
    r#""created":"2020-01-01T00:00:00\u005a""#,
    r#""created":"0000-01-01T00:00:00Z""#,
    r#""Size":-0"#,
    r#""Size":1e2"#,
    r#""SIZE":"1""#,
    r#""unknown":1e999"#,
    r#""unknown":"\ud800""#,
    r#""config":{"User":"\udc00"}"#,
    r#""config":{"cmd":["/x"],"CMD":7}"#,
    r#""config":{"Env":7,"Env":[]}"#,
    r#""config":{"Env":[]},"config":null"#,
    "\"config\":{\"U\u{17f}er\":7}",
    "\"container_confi\u{212a}\":7,\"docKer_version\":\"a\"",
    "\"doc\u{212a}er_version\":7",
    r#""rootfs":null"#,
    r#""rootfs":{"type":"layers"}"#,
    r#""rootfs":{"type":"layers+base"}"#,
    r#""rootfs":{"diff_ids":null}"#,
    r#""rootfs":{"diff_ids":[]}"#,
    r#""RootFS":{"Type":7}"#,
    r#""history":[{},{}]"#,
    r#""history":[{},{"empty_layer":true}]"#,
    r#""history":[{"empty_layer":false},{"empty_layer":null}]"#,
    r#""os":null"#,
    r#""os":7"#,
    r#""os":7,"os":"linux""#,
];

/// Members after which a dockerd that has accepted them fails at its next start.
const SYSTEMS: &[&str] = &[
    r#""os":"Linux""#,
    r#""OS":"LINUX""#,
    r#""os":"windows""#,
    r#""os":"darwin""#,
    r#""os":" linux""#,
    "\"o\u{17f}\":\"Linux\"",
];

/// Configs that are treated differently, and why.
const LISTED: &[(&str, Does, &str)] = &[
    (r#""created":"2020-01-01T01:02:03+25:00""#, Does::Refuse, "newer versions of Go refuse such an offset"),
    ("StartInterval", Does::Refuse, "Docker 25 and later read the field"),
];

/// A config that ends with these members. The number makes it unique.
fn config(number: usize, diff_id: &str, members: &str) -> Config {
    let text = format!(
        "{{\"n\":{number},\"architecture\":\"amd64\",\"os\":\"linux\",\"rootfs\":{{\"type\":\"layers\",\
         \"diff_ids\":[\"{diff_id}\"]}},{members}}}"
    );
    Config { name: members.chars().take(80).collect(), bytes: text.into_bytes() }
}

/// The members to try: each field with some of the values, and the odd members.
fn members() -> Vec<String> {
    let nested: [(&[&str], &str, &str); 4] = [
        (IMAGE, "", ""),
        (CONTAINER, "\"config\":{", "}"),
        (HEALTH, "\"config\":{\"Healthcheck\":{", "}}"),
        (STEP, "\"history\":[{\"empty_layer\":true},{\"empty_layer\":true,", "}]"),
    ];
    let fields = nested.iter().flat_map(|(fields, before, after)| fields.iter().map(move |name| (name, before, after)));
    let mut all: Vec<String> = ODD.iter().map(|members| (*members).to_owned()).collect();
    for (number, (name, before, after)) in fields.enumerate() {
        let values = (0..EACH).map(|n| VALUES[(number * EACH + n) % VALUES.len()]);
        all.extend(values.map(|value| format!("{before}\"{name}\":{value}{after}")));
    }
    all
}

/// Configs whose text as a whole is unusual.
fn whole(diff_id: &str) -> Vec<Config> {
    let good = config(0, diff_id, "\"x\":0");
    let put = |name: &str, before: &[u8], after: &[u8]| Config {
        name: name.to_owned(),
        bytes: [before, good.bytes.as_slice(), after].concat(),
    };
    let deep = |depth: usize| config(depth, diff_id, &format!("\"x\":{}{}", "[".repeat(depth), "]".repeat(depth)));
    let mut upper = String::from_utf8_lossy(&good.bytes).into_owned();
    for key in ["architecture", "\"os\"", "rootfs", "type", "diff_ids"] {
        upper = upper.replace(key, &key.to_uppercase());
    }
    let latin = [b"{\"author\":\"caf\xe9\",\"k\xe9y\":1,".as_slice(), &good.bytes[1..]].concat();
    vec![
        put("a byte order mark", b"\xef\xbb\xbf", b""),
        put("blanks around", b"\n\t ", b" \r\n"),
        put("a NUL behind", b"", b"\0"),
        put("two documents", b"", b"{}"),
        deep(500),
        deep(9_999),
        deep(10_000),
        Config { name: "keys in capitals".to_owned(), bytes: upper.into_bytes() },
        Config { name: "bytes that are no UTF-8".to_owned(), bytes: latin },
        Config { name: "nothing".to_owned(), bytes: Vec::new() },
        Config { name: "null".to_owned(), bytes: b"null".to_vec() },
    ]
}

/// The difference between the outcomes, unless it is listed.
fn difference(config: &Config, ours: &Outcome, theirs: &Outcome) -> Option<String> {
    let (does, why) = match (ours, theirs) {
        (Outcome::Pulled, Outcome::Refused(why)) => (Does::Pull, why),
        (Outcome::Refused(why), Outcome::Pulled) => (Does::Refuse, why),
        _ => return None,
    };
    let is_listed = LISTED.iter().any(|(part, listed, _)| *listed == does && config.name.contains(part));
    (!is_listed).then(|| format!("{does:?} {}: {why}", config.name))
}

#[test]
fn configs_are_taken_as_docker_takes_them_and_it_restores_what_is_taken() -> Result<()> {
    let stage = crate::Stage::new()?;
    let mut documents = Documents::default();
    let layer = documents.layer()?;
    let mut configs = whole(&layer.diff_id);
    // Configs that may keep dockerd from starting come last, after its restart.
    let restored = configs.len() + members().len();
    for members in members().iter().map(String::as_str).chain(SYSTEMS.iter().copied()) {
        configs.push(config(configs.len(), &layer.diff_id, members));
    }
    for (number, config) in configs.iter().enumerate() {
        documents.image(config.bytes.clone(), &layer, &[&number.to_string()]);
    }
    let registry = documents.serve()?;
    let logins = stage.directory.path().join("config.json");
    write_logins(&logins, &[])?;
    let mut docker = Docker::start()?;
    docker.forward(&registry.address())?;
    let (mut taken, mut differences) = (Vec::new(), Vec::new());
    for (number, config) in configs.iter().enumerate() {
        if number == restored {
            check_restored(&mut docker, &taken)?;
        }
        let reference = registry.reference("app", &number.to_string());
        let ours = stage.library.pull(&reference, &logins)?;
        let theirs = clients::docker_keeps(&docker, &reference, &logins)?;
        differences.extend(difference(config, &ours, &theirs));
        if ours.is_pulled() && theirs.is_pulled() {
            taken.push(config);
        }
    }
    println!("{} configs, {} taken, {} differences not listed", configs.len(), taken.len(), differences.len());
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    ensure!(taken.len() > 50 && configs.len() - taken.len() > 50, "both outcomes are common");
    Ok(())
}

/// Checks that all accepted images are there after dockerd has restarted.
fn check_restored(docker: &mut Docker, taken: &[&Config]) -> Result<()> {
    docker.restart().context("dockerd does not start with what was taken")?;
    let there = docker.ok(&["images", "--all", "--quiet", "--no-trunc"])?;
    for config in taken {
        ensure!(there.contains(&digest_of(&config.bytes)), "{} is not restored", config.name);
    }
    Ok(())
}
