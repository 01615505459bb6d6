//! Random indexes of many platforms, and images whose configs contradict the index: which one this project, skopeo and
//! docker choose for a requested platform. It is the same one, or the difference has a reason.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::docker::Docker;
use tests::images::digest_of;
use tests::process::run;
use tests::registry::{Reply, ScriptedRegistry};

use crate::clients::Library;
use crate::draw::Numbers;
use crate::listed::Tool;
use crate::{SEED, Stage, for_each};

/// The number of random cases.
const CASES: usize = 240;
/// Docker takes longer, so it gets one of this many cases.
const OF_DOCKER: usize = 3;

/// Platforms of the entries. An empty string means `{}`; `None` means that the field is absent.
const NAMED: [&[Option<&str>]; 3] = [
    &[
        Some("linux/arm"),
        Some("linux/arm/v5"),
        Some("linux/arm/v6"),
        Some("linux/arm/v7"),
        Some("linux/arm/v8"),
        Some("linux/arm64"),
        Some("linux/arm64/v8"),
        Some("linux/arm64/v9"),
    ],
    &[
        Some("linux/amd64"),
        Some("linux/amd64/v2"),
        Some("linux/amd64/v3"),
        Some("linux/386"),
        Some("linux/x86_64"),
        Some("windows/amd64"),
        Some("unknown/unknown"),
        Some(""),
        None,
    ],
    &[
        Some("linux/amd64"),
        Some("linux/arm64/v8"),
        Some("linux/arm/v7"),
        Some("linux/s390x"),
        Some("linux/ppc64le/power9"),
    ],
];
/// The requested platforms.
const WISHES: [&[Option<&str>]; 3] = [
    &[
        Some("linux/arm"),
        Some("linux/arm/v5"),
        Some("linux/arm/v6"),
        Some("linux/arm/v7"),
        Some("linux/arm/v8"),
        Some("linux/arm64"),
        Some("linux/arm64/v8"),
    ],
    &[None, Some("linux/amd64"), Some("linux/amd64/v3"), Some("linux/386")],
    &[None, Some("linux/amd64"), Some("linux/arm64"), Some("linux/s390x"), Some("linux/ppc64le")],
];
/// Platforms in configs that contradict the index.
const OTHERS: &[&str] = &["linux/amd64", "linux/arm64", "linux/", "/", "windows/amd64"];

/// An image in an index, or a single image.
#[derive(Debug, Clone, Copy)]
struct Entry {
    named: Option<&'static str>,
    config: &'static str,
}

#[derive(Debug)]
struct Case {
    entries: Vec<Entry>,
    wish: Option<&'static str>,
    is_single: bool,
}

fn draw(numbers: &mut Numbers) -> Case {
    let family = numbers.below(NAMED.len());
    let wish = WISHES[family][numbers.below(WISHES[family].len())];
    let is_single = numbers.below(6) == 0;
    let count = if is_single { 1 } else { 1 + numbers.below(4) };
    let entries = (0..count).map(|_| {
        let named = NAMED[family][numbers.below(NAMED[family].len())];
        let own = named.filter(|named| named.len() > 1).unwrap_or("linux/amd64");
        let config = if numbers.below(4) == 0 { OTHERS[numbers.below(OTHERS.len())] } else { own };
        Entry { named, config }
    });
    Case { entries: entries.collect(), wish, is_single }
}

/// The parts of `os/architecture/variant` as fields. Empty parts are absent.
fn fields(platform: &str) -> Value {
    let names = ["os", "architecture", "variant"].into_iter();
    Value::Object(
        names.zip(platform.split('/')).filter(|(_, v)| !v.is_empty()).map(|(k, v)| (k.to_owned(), json!(v))).collect(),
    )
}

/// The documents of a registry: media type and bytes, by path.
type Documents = HashMap<String, (&'static str, Vec<u8>)>;

const MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// Adds the image or index of a case as `appNUMBER:1`.
fn serve(documents: &mut Documents, number: usize, case: &Case) {
    let mut put = |kind: &str, media_type, document: &Value| {
        let bytes = document.to_string().into_bytes();
        let (digest, size) = (digest_of(&bytes), bytes.len());
        documents.insert(format!("/v2/app{number}/{kind}/{digest}"), (media_type, bytes.clone()));
        if kind == "manifests" {
            // The tag points to the manifest or index that was added last.
            documents.insert(format!("/v2/app{number}/manifests/1"), (media_type, bytes));
        }
        json!({"mediaType": media_type, "digest": digest, "size": size})
    };
    let mut entries = Vec::new();
    for (place, entry) in case.entries.iter().enumerate() {
        let mut config = fields(entry.config);
        config["rootfs"] = json!({"type": "layers", "diff_ids": []});
        config["comment"] = json!(format!("{place}"));
        let config = put("blobs", CONFIG, &config);
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": []});
        let mut descriptor = put("manifests", MANIFEST, &manifest);
        if let Some(named) = entry.named {
            descriptor["platform"] = fields(named);
        }
        entries.push(descriptor);
    }
    if !case.is_single {
        put("manifests", LIST, &json!({"schemaVersion": 2, "mediaType": LIST, "manifests": entries}));
    }
}

/// The entry that a tool has chosen, or its error.
type Taken = Result<usize, String>;

fn place(comment: &str) -> Result<usize> {
    comment.trim().parse().with_context(|| format!("{comment:?} is no place"))
}

fn skopeo(reference: &str, wish: Option<&str>) -> Result<Taken> {
    let mut command = std::process::Command::new("skopeo");
    let options = ["--override-os", "--override-arch", "--override-variant"].into_iter();
    options.zip(wish.unwrap_or_default().split('/')).filter(|(_, value)| !value.is_empty()).for_each(
        |(option, value)| {
            command.args([option, value]);
        },
    );
    let output =
        run(command.args(["inspect", "--tls-verify=false", "--config", "--raw"]).arg(format!("docker://{reference}")))?;
    if !output.succeeded() {
        return Ok(Err(output.stderr.lines().last().unwrap_or_default().to_owned()));
    }
    let config: Value = serde_json::from_str(&output.stdout)?;
    Ok(Ok(place(config["comment"].as_str().unwrap_or_default())?))
}

fn docker(docker: &Docker, reference: &str, wish: Option<&str>) -> Result<Taken> {
    let wish: Vec<&str> = wish.iter().flat_map(|wish| ["--platform", wish]).collect();
    let output = docker.run(&[&["pull", "--quiet"], &wish[..], &[reference]].concat())?;
    if !output.succeeded() {
        return Ok(Err(output.stderr.lines().last().unwrap_or_default().to_owned()));
    }
    let comment = docker.ok(&["image", "inspect", "--format", "{{.Comment}}", reference])?;
    docker.ok(&["rmi", "--force", reference])?;
    Ok(Ok(place(&comment)?))
}

/// The reason why this project and a tool choose differently, or why only one of them chooses any.
fn reason(tool: Tool, case: &Case, ours: Option<usize>, theirs: Option<usize>) -> Option<&'static str> {
    let entry = |place: Option<usize>| place.map(|place| case.entries[place]);
    let named = |place: Option<usize>| entry(place).and_then(|entry| entry.named).unwrap_or_default();
    let config = |place: Option<usize>| entry(place).map_or("", |entry| entry.config);
    let is_arm = |text: &str| text == "linux/arm" || text.starts_with("linux/arm/");
    let alone = if case.is_single { Some(0) } else { theirs };
    match (tool, ours, theirs) {
        (_, None, Some(_)) if case.is_single => Some("an image that is not what was wished for would be all hosts'"),
        (Tool::Skopeo, None, Some(_)) if config(alone).starts_with("windows") => {
            Some("a config of another system than the index says; docker refuses it, too")
        }
        (_, Some(_), None) if case.wish.is_none() && case.entries.len() == 1 => {
            Some("without a wish the only image is taken, whatever its platform")
        }
        (_, Some(_), None) if named(ours).is_empty() => {
            Some("an entry without a platform is for all whom no other serves")
        }
        (Tool::Skopeo, _, _) if named(ours) == "linux/x86_64" => {
            Some("architectures have other names, as docker has it")
        }
        (Tool::Skopeo, Some(_), Some(_)) if named(ours) == "linux/arm" && case.wish == Some("linux/arm/v7") => {
            Some("arm alone is v7, as docker has it")
        }
        (Tool::Skopeo, Some(_), Some(_)) if named(ours) == "linux/arm64" && named(theirs) == "linux/arm64/v8" => {
            Some("arm64 is v8, as docker has it: of equals the first")
        }
        (Tool::Docker, _, Some(_)) if case.wish.is_some_and(is_arm) && is_arm(named(theirs)) => Some(
            "docker 20.10 takes the first arm where no variant is the wished one, even one that does not run there",
        ),
        (Tool::Docker, Some(_), None)
            if case.wish == Some("linux/amd64/v3") && ["linux/amd64", "linux/x86_64"].contains(&named(ours)) =>
        {
            Some("what names no variant runs on all, as skopeo has it")
        }
        _ => None,
    }
}

/// A comparison with one tool, case by case.
struct Comparison<'a> {
    tool: Tool,
    library: &'a Library,
    cases: &'a [Case],
    agree: usize,
    listed: BTreeMap<&'static str, usize>,
    unlisted: Vec<String>,
}

impl<'a> Comparison<'a> {
    fn new(tool: Tool, library: &'a Library, cases: &'a [Case]) -> Self {
        Self { tool, library, cases, agree: 0, listed: BTreeMap::new(), unlisted: Vec::new() }
    }

    fn count(&mut self, number: usize, ours: &Taken, theirs: &Taken) {
        let (ours_place, theirs_place) = (ours.as_ref().ok().copied(), theirs.as_ref().ok().copied());
        if ours_place == theirs_place {
            self.agree += 1;
            return;
        }
        match reason(self.tool, &self.cases[number], ours_place, theirs_place) {
            Some(reason) => *self.listed.entry(reason).or_default() += 1,
            None => {
                let case = &self.cases[number];
                self.unlisted.push(format!("{:?} {case:?}: ours {ours:?}, theirs {theirs:?}", self.tool));
            }
        }
    }

    fn check(&self) -> Result<()> {
        println!("{:?}: {} agree, listed {:#?}", self.tool, self.agree, self.listed);
        ensure!(self.unlisted.is_empty(), "not listed: {:#?}", self.unlisted);
        Ok(())
    }
}

/// The cases, and a registry that serves all of them.
fn stage() -> Result<(Vec<Case>, ScriptedRegistry)> {
    let mut numbers = Numbers::new(SEED);
    let is_amd64 = cfg!(target_arch = "x86_64");
    let drawn = (0..CASES).map(|_| draw(&mut numbers)).filter(|case| is_amd64 || case.wish.is_some());
    let cases: Vec<Case> = drawn.collect();
    let mut documents = Documents::new();
    cases.iter().enumerate().for_each(|(number, case)| serve(&mut documents, number, case));
    let registry = ScriptedRegistry::start_at("127.0.0.1:0", None, move |seen| match documents.get(seen.path()) {
        Some((media_type, bytes)) => Reply::body(media_type, bytes.clone()),
        None if seen.path() == "/v2/" => Reply::body("application/json", "{}"),
        None => Reply::status(404),
    })?;
    Ok((cases, registry))
}

fn no_logins(stage: &Stage) -> Result<std::path::PathBuf> {
    let config = stage.directory.path().join("no-logins.json");
    std::fs::write(&config, "{}")?;
    Ok(config)
}

fn ours(library: &Library, reference: &str, wish: Option<&str>, config: &Path) -> Result<Taken> {
    library
        .taken(reference, wish, config)?
        .map(|comment| place(&comment))
        .map_or_else(|said| Ok(Err(said)), |found| found.map(Ok))
}

#[test]
fn platforms_are_chosen_as_skopeo_chooses_them() -> Result<()> {
    let (held, (cases, registry)) = (Stage::new()?, stage()?);
    let config = no_logins(&held)?;
    let comparison = Mutex::new(Comparison::new(Tool::Skopeo, &held.library, &cases));
    for_each(&cases, |number, case| {
        let reference = format!("{}/app{number}:1", registry.address());
        let (ours, theirs) = (ours(&held.library, &reference, case.wish, &config)?, skopeo(&reference, case.wish)?);
        comparison.lock().expect("no thread panicked").count(number, &ours, &theirs);
        Ok(())
    })?;
    comparison.into_inner().expect("no thread panicked").check()
}

#[test]
fn platforms_are_chosen_as_docker_chooses_them() -> Result<()> {
    let (held, (cases, registry)) = (Stage::new()?, stage()?);
    let config = no_logins(&held)?;
    let mut engine = Docker::start()?;
    engine.forward(&registry.address())?;
    let mut comparison = Comparison::new(Tool::Docker, &held.library, &cases);
    for (number, case) in cases.iter().enumerate().step_by(OF_DOCKER) {
        let reference = format!("{}/app{number}:1", registry.address());
        let ours = ours(comparison.library, &reference, case.wish, &config)?;
        let theirs = docker(&engine, &reference, case.wish)?;
        comparison.count(number, &ours, &theirs);
    }
    comparison.check()
}
