//! Archives of Docker before 1.10: `repositories`, and a directory with `json` and `layer.tar` for each layer.
//!
//! They are generated, because no such Docker runs any more. The image's id is the digest of a config that only dockerd
//! generates, so equal ids mean that dockerd's config was reproduced byte for byte.

use serde_json::{Value, json};
use tests::docker::Docker;
use tests::images::archive::{Archive as Tar, Header, Kind};
use tests::process::TIMEOUT;
use tests::site::Site;

use crate::{bzip2, gzip, loaded, opened, tar_of, tar_with, xz};

/// The id of image `number`.
fn id(number: u32) -> String {
    format!("{number:064x}")
}

/// The content that Docker before 1.8.3 wrote into `json`.
fn old(number: u32, parent: Option<&str>) -> Value {
    let mut json = json!({"id": id(number), "created": format!("2014-10-01T20:46:{number:02}.914288461Z"),
        "container": id(number + 1000), "container_config": {"Hostname": "cc", "Cmd": ["/bin/sh", "-c", format!("#(nop) <{number}> & \u{8}")],
        "Env": ["A=b"], "Memory": 0, "CpuShares": 0, "PortSpecs": null}, "docker_version": "1.2.0", "author": "me <me@x>",
        "config": {"Cmd": ["/x"], "Env": [], "ExposedPorts": {"80/tcp": {}, "53/udp": {}}, "Volumes": {"/v": {}}, "OnBuild": [], "Labels": null},
        "architecture": "amd64", "os": "linux", "Size": 5});
    json["parent"] = parent.map_or(Value::Null, Value::from);
    json
}

/// An archive under construction.
#[derive(Clone)]
struct Saved {
    members: Vec<(String, Vec<u8>)>,
    repositories: Value,
}

impl Saved {
    fn new(repositories: Value) -> Saved {
        Saved { members: Vec::new(), repositories }
    }

    fn part(mut self, id: &str, json: &Value, layer: Option<Vec<u8>>) -> Saved {
        self.members.push((format!("{id}/"), Vec::new()));
        self.members.push((format!("{id}/VERSION"), b"1.0".to_vec()));
        self.members.push((format!("{id}/json"), serde_json::to_vec_pretty(json).expect("memory takes it")));
        self.members.extend(layer.map(|layer| (format!("{id}/layer.tar"), layer)));
        self
    }

    fn with(mut self, name: &str, content: &[u8]) -> Saved {
        self.members.push((name.to_owned(), content.to_vec()));
        self
    }

    fn archive(&self) -> Vec<u8> {
        let list = ("repositories".to_owned(), format!("{}\n", self.repositories).into_bytes());
        tar_of(&[&self.members[..], &[list]].concat()).expect("memory takes it")
    }
}

fn layer(number: u32) -> Option<Vec<u8>> {
    Some(tar_with(&format!("layer {number}")).expect("memory takes it"))
}

fn tags(number: u32) -> Value {
    json!({"old": {"1": id(number)}})
}

/// An archive of one image with one layer and this `json`.
fn one(json: &Value) -> Saved {
    Saved::new(tags(1)).part(&id(1), json, layer(1))
}

/// An archive of one image with the `json` of [`old`], with these fields replaced.
fn changed(fields: Value) -> Saved {
    let mut json = old(1, None);
    if let (Some(json), Value::Object(fields)) = (json.as_object_mut(), fields) {
        json.extend(fields);
    }
    one(&json)
}

/// An archive of two images, the second on top of the first, with these layers.
fn two(first: Option<Vec<u8>>, second: Option<Vec<u8>>) -> Saved {
    Saved::new(tags(2)).part(&id(1), &old(1, None), first).part(&id(2), &old(2, Some(&id(1))), second)
}

/// Archives that both accept or both refuse.
fn alike() -> Vec<(&'static str, Saved)> {
    [parts(), configs(), times_and_versions()].concat()
}

/// Archives with parts that are present or missing, and different references to them.
fn parts() -> Vec<(&'static str, Saved)> {
    let empty = || Some(Tar::new(Vec::new()).finish().expect("memory takes it"));
    let chain = two(layer(1), layer(2)).part(&id(3), &old(3, Some(&id(2))), empty());
    let with_repositories = |repositories: Value| Saved { repositories, ..chain.clone() };
    vec![
        ("one layer", one(&old(1, None))),
        ("two layers", two(layer(1), layer(2))),
        ("equal layers", two(layer(1), layer(1))),
        ("three layers, one empty", with_repositories(tags(3))),
        ("two tags", with_repositories(json!({"old": {"1": id(3), "2": id(3)}}))),
        ("shared parents", with_repositories(json!({"old": {"1": id(1)}, "quay.io/x/old": {"2": id(2), "3": id(3)}}))),
        ("no tags", with_repositories(json!({"old": {"1": id(3)}, "new": {}}))),
        ("a tag in the name", with_repositories(json!({"old:2": {"1": id(3)}}))),
        ("an odd name", with_repositories(json!({"Old Name": {"1": id(3)}}))),
        ("an odd tag", with_repositories(json!({"old": {"1/2": id(3)}}))),
        ("an unknown image", with_repositories(json!({"old": {"1": id(9)}}))),
        ("no object", with_repositories(json!([]))),
        (
            "ids that are not hex",
            Saved::new(json!({"old": {"1": "top"}})).part("base", &old(1, None), layer(1)).part(
                "top",
                &old(2, Some("base")),
                layer(2),
            ),
        ),
        ("a missing parent", Saved::new(tags(2)).part(&id(2), &old(2, Some(&id(1))), layer(2))),
        ("an absent layer", two(layer(1), None)),
        ("an absent layer below", two(None, layer(2))),
        ("a layer of no bytes", two(Some(Vec::new()), layer(2))),
        ("a layer of gzip", two(Some(gzip(&layer(1).expect("memory takes it")).expect("memory takes it")), layer(2))),
        ("a layer of bzip2", two(layer(1), Some(bzip2(&layer(2).expect("memory takes it")).expect("memory takes it")))),
        ("a layer of xz", two(layer(1), Some(xz(&layer(2).expect("memory takes it")).expect("memory takes it")))),
        (
            "a layer of half an xz",
            two(layer(1), Some(xz(&layer(2).expect("memory takes it")).expect("memory takes it")[..9000].to_vec())),
        ),
        (
            "json of rubbish",
            Saved::new(tags(1))
                .with(&format!("{}/json", id(1)), b"rubbish")
                .with(&format!("{}/layer.tar", id(1)), &layer(1).expect("memory takes it")),
        ),
    ]
}

/// Archives with different contents of `json`.
fn configs() -> Vec<(&'static str, Saved)> {
    let config = |fields: Value| changed(json!({"config": fields, "container_config": fields}));
    vec![
        ("json of little", one(&json!({}))),
        ("a list", one(&json!([]))),
        ("keys in another case", changed(json!({"AUTHOR": "x", "Comment": "y", "OS": "linux"}))),
        ("a comment", changed(json!({"comment": "<&> \u{2028} \"é\" \\ \t\u{c}\u{7f}\u{1}"}))),
        ("no config", changed(json!({"config": null, "container_config": null}))),
        ("an empty config", config(json!({}))),
        (
            "a full config",
            config(
                json!({"Hostname": "h", "Domainname": "d", "User": "u", "AttachStdin": true, "Tty": true, "OpenStdin": true,
            "StdinOnce": true, "AttachStdout": true, "AttachStderr": true, "Image": "i", "WorkingDir": "/w", "Entrypoint": ["/e"], "NetworkDisabled": true,
            "MacAddress": "m", "OnBuild": ["RUN x"], "Labels": {"b": "1", "a": "<"}, "StopSignal": "9", "StopTimeout": 0, "Shell": ["/bin/bash"],
            "ArgsEscaped": true, "Healthcheck": {"Test": ["CMD", "x"], "Interval": 5, "Retries": 3}}),
            ),
        ),
        (
            "nulls and empty lists",
            config(
                json!({"Env": [], "Cmd": null, "Entrypoint": [], "Volumes": {}, "ExposedPorts": {}, "OnBuild": null, "Labels": {},
            "Shell": [], "Healthcheck": {}, "StopTimeout": null}),
            ),
        ),
        ("commands that are one text", config(json!({"Cmd": "a b", "Entrypoint": "c"}))),
        ("commands with null", config(json!({"Cmd": ["a", null]}))),
        ("a command of numbers", config(json!({"Cmd": [1]}))),
        ("ports of numbers", config(json!({"ExposedPorts": {"80": 1}}))),
        ("ports of null", config(json!({"ExposedPorts": {"80": null}}))),
        ("a number for a text", changed(json!({"author": 5}))),
    ]
}

/// Archives with different creation times and versions of Docker.
fn times_and_versions() -> Vec<(&'static str, Saved)> {
    let new = |fields: Value| {
        let mut fields = fields;
        fields["docker_version"] = json!("1.9.1");
        changed(fields)
    };
    vec![
        ("no time", changed(json!({"created": null}))),
        ("an empty time", changed(json!({"created": ""}))),
        ("a time with zeros", changed(json!({"created": "2014-10-01T20:46:08.120000000Z"}))),
        ("a time with many digits", changed(json!({"created": "2014-10-01T20:46:08.1234567894Z"}))),
        ("a time elsewhere", changed(json!({"created": "2014-10-01T20:46:08-07:30"}))),
        ("a time at no place", changed(json!({"created": "2014-10-01T20:46:08+00:00"}))),
        ("no day", changed(json!({"created": "2014-02-30T20:46:08Z"}))),
        ("windows", changed(json!({"os": "windows"}))),
        ("no system", changed(json!({"os": null, "architecture": null, "variant": "v7"}))),
        ("no version", changed(json!({"docker_version": null}))),
        ("version 1.8.2", changed(json!({"docker_version": "1.8.2", "odd": 1}))),
        ("version 1.8.3", changed(json!({"docker_version": "1.8.3", "odd": 1}))),
        ("later", new(json!({}))),
        (
            "later, with other fields",
            new(
                json!({"odd": {"b": [1.50, 1e3, "<\u{8}é>"], "a": null}, "throwaway": true, "parent_id": "x", "layer_id": "y"}),
            ),
        ),
        ("later, a number for a text", new(json!({"comment": 5}))),
        ("later, of little", one(&json!({"docker_version": "1.10.0"}))),
        ("another file", one(&old(1, None)).with("readme", b"x")),
    ]
}

/// Archives that docker treats differently, with the reason, and whether this project accepts them.
fn otherwise() -> Vec<(&'static str, Saved, bool)> {
    vec![
        (
            "docker reads all directories; what no tag needs is nobody's matter",
            one(&old(1, None)).with("unrelated/", b""),
            true,
        ),
        ("manifest.json decides, and names no image", one(&old(1, None)).with("manifest.json", b"[]"), false),
    ]
}

#[test]
fn the_images_ids_are_dockers() {
    let docker = Docker::start().unwrap();
    let (mut wrong, mut taken) = (Vec::new(), 0);
    for (what, saved) in alike() {
        let archive = saved.archive();
        let (ours, dockers) = (opened(&archive), loaded(&docker, &archive));
        match (&ours, &dockers) {
            (Ok(ours), Ok(dockers)) if ours == dockers => taken += 1,
            (Err(_), Err(_)) => {}
            _ => wrong.push(format!("{what}: here {ours:?}\n    docker {dockers:?}")),
        }
    }
    for (what, saved, is_taken) in otherwise() {
        let archive = saved.archive();
        let (ours, dockers) = (opened(&archive), loaded(&docker, &archive));
        if ours.is_ok() != is_taken || dockers.is_ok() == is_taken {
            wrong.push(format!("{what}: here {ours:?}\n    docker {dockers:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} archives differ:\n{}", wrong.len(), wrong.join("\n"));
    assert!(taken > 30, "{taken} archives were taken by both");
}

#[test]
fn parents_in_a_circle_are_refused() {
    // These are not given to dockerd, which would loop until it dies.
    let circle =
        Saved::new(tags(1)).part(&id(1), &old(1, Some(&id(2))), layer(1)).part(&id(2), &old(2, Some(&id(1))), layer(2));
    let own = Saved::new(tags(1)).part(&id(1), &old(1, Some(&id(1))), layer(1));
    for saved in [circle, own] {
        let error = opened(&saved.archive()).unwrap_err().to_string();
        assert!(error.contains("parent of itself"), "{error}");
    }
    let mut long = Saved::new(tags(600));
    for number in 1..=600 {
        long = long.part(&id(number), &json!({"parent": (number > 1).then(|| id(number - 1))}), Some(Vec::new()));
    }
    let error = opened(&long.archive()).unwrap_err().to_string();
    assert!(error.contains("more than 500 parents"), "{error}");
}

#[test]
fn an_image_of_before_1_10_is_loaded_and_named_anew() {
    let site = Site::start().unwrap();
    let saved = two(layer(1), Some(gzip(&layer(2).unwrap()).unwrap()));
    let file = site.path().join("archive.xz");
    std::fs::write(&file, xz(&saved.archive()).unwrap()).unwrap();
    for arguments in [vec!["load"], vec!["load", "--name", "mine:3"]] {
        site.ctl().ok(&[&arguments[..], &[&file.to_string_lossy()]].concat()).unwrap();
    }
    let config = opened(&saved.archive()).unwrap().remove("old:1").unwrap();
    for name in ["old:1", "mine:3"] {
        site.wait_for_job(name, &["published"], TIMEOUT).unwrap();
        assert_eq!(site.ctl().json(&["image", name]).unwrap()["config"], config, "{name}");
    }
    // Docker accepts the exported image with the same id.
    let exported = site.path().join("exported.tar");
    site.ctl().ok(&["export", "old:1", &exported.to_string_lossy()]).unwrap();
    let docker = Docker::start().unwrap();
    assert_eq!(loaded(&docker, &std::fs::read(&exported).unwrap()).unwrap()["old:1"], config);
    // Links to layers of other images, as Docker wrote them.
    let mut tar = Tar::new(Vec::new());
    for (name, content) in &one(&old(1, None)).with("repositories", tags(1).to_string().as_bytes()).members {
        let name = name.replace(&format!("{}/layer.tar", id(1)), "elsewhere/layer.tar");
        tar.add(&Header::new(if name.ends_with('/') { Kind::Directory } else { Kind::File }, &name), content).unwrap();
    }
    let link = Header::new(Kind::Symlink, format!("{}/layer.tar", id(1))).link("../elsewhere/layer.tar");
    tar.add(&link, b"").unwrap();
    assert_eq!(opened(&tar.finish().unwrap()).unwrap(), opened(&one(&old(1, None)).archive()).unwrap());
}
