//! `docker save` archives as Docker has written them since 1.10, in every packing, and many odd ones.

use anyhow::Result;
use serde_json::{Value, json};
use tests::docker::Docker;
use tests::images::archive::{Archive as Tar, Header, Kind};
use tests::images::digest_of;
use tests::site::Site;

use crate::{OTHERWISE, PACKINGS, compare, gzip, loaded, opened, tar_of, tar_with, xz};

/// A config for layers with these diffIDs, with the fields of `odd` added.
fn config(diff_ids: &[String], odd: Value) -> Vec<u8> {
    let mut config = json!({"os": "linux", "architecture": "amd64", "config": {"Cmd": ["/x"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    if let (Some(config), Value::Object(odd)) = (config.as_object_mut(), odd) {
        config.extend(odd);
    }
    config.to_string().into_bytes()
}

/// The members of an archive that holds one image with one layer.
fn members(name: &str) -> Result<Vec<(String, Vec<u8>)>> {
    let tar = tar_with(name)?;
    let list = json!([{"Config": "c.json", "RepoTags": [format!("{name}:1")], "Layers": ["l.tar"]}]);
    Ok(vec![
        ("c.json".to_owned(), config(&[digest_of(&tar)], Value::Null)),
        ("l.tar".to_owned(), tar),
        ("manifest.json".to_owned(), list.to_string().into_bytes()),
    ])
}

#[test]
fn archives_and_their_layers_are_unpacked_as_docker_unpacks_them() {
    let docker = Docker::start().unwrap();
    for (number, (packing, pack)) in PACKINGS.iter().enumerate() {
        let whole = pack(&tar_of(&members(&format!("whole-{number}")).unwrap()).unwrap()).unwrap();
        let mut parts = members(&format!("part-{number}")).unwrap();
        parts[1].1 = pack(&parts[1].1).unwrap();
        for archive in [whole, tar_of(&parts).unwrap()] {
            let (ours, dockers) = (opened(&archive), loaded(&docker, &archive));
            if let (Ok(ours), Ok(dockers)) = (&ours, &dockers) {
                assert_eq!(ours, dockers, "{packing}");
            }
            let told = |images: Result<crate::Images>| images.map(|images| format!("{images:?}"));
            compare(packing, &told(ours), &told(dockers)).unwrap();
        }
    }
}

#[test]
fn packed_archives_are_loaded() {
    let site = Site::start().unwrap();
    let taken = |packing: &str| OTHERWISE.iter().all(|(other, taken, _)| *other != packing || *taken);
    for (number, (packing, pack)) in PACKINGS.iter().enumerate().filter(|(_, (packing, _))| taken(packing)) {
        let archive = pack(&tar_of(&members(&format!("loaded-{number}")).unwrap()).unwrap()).unwrap();
        let file = site.path().join("archive");
        std::fs::write(&file, &archive).unwrap();
        let load = site.ctl().run(&["load", &file.to_string_lossy()]).unwrap();
        match opened(&archive) {
            Ok(images) => {
                assert!(load.succeeded(), "{packing}: {}", load.stderr);
                let detail = site.ctl().json(&["image", &format!("loaded-{number}:1")]).unwrap();
                assert_eq!(Some(&detail["config"]), images.values().next().map(|id| json!(id)).as_ref(), "{packing}");
            }
            Err(error) => assert!(!load.succeeded() && load.stderr.contains("archive"), "{error}: {}", load.stderr),
        }
    }
}

#[test]
fn of_several_images_those_with_names_are_loaded_and_one_can_be_named() {
    let site = Site::start().unwrap();
    let mut members = members("with-a-name").unwrap();
    let layer = digest_of(&members[1].1);
    members.push(("d.json".to_owned(), config(&[layer], json!({"author": "another"}))));
    let named = json!({"Config": "c.json", "RepoTags": ["with-a-name:1"], "Layers": ["l.tar"]});
    let unnamed = json!({"Config": "d.json", "RepoTags": null, "Layers": ["l.tar"]});
    let file = site.path().join("archive");
    let mut load = |list: Value, name: &[&str]| {
        members[2].1 = self::list(&list);
        std::fs::write(&file, tar_of(&members).unwrap()).unwrap();
        site.ctl().run(&[&["load", &file.to_string_lossy()], name].concat()).unwrap()
    };
    let some = load(json!([named, unnamed]), &[]);
    assert!(some.succeeded() && some.stderr.contains("image d.json is left out: it has no name"), "{some:?}");
    assert_eq!(site.images().unwrap(), ["with-a-name:1"]);
    let both = load(json!([named, unnamed]), &["--name", "found:2"]);
    assert!(both.succeeded() && !both.stderr.contains("left out"), "{both:?}");
    assert_eq!(site.images().unwrap(), ["found:2", "with-a-name:1"]);
    let none = load(json!([unnamed, unnamed]), &[]);
    assert!(
        !none.succeeded() && none.stderr.contains("image d.json in it has no name: give one with --name"),
        "{none:?}"
    );
    for list in [json!([unnamed, unnamed]), json!([named, named])] {
        let many = load(list, &["--name", "found:2"]);
        assert!(!many.succeeded() && many.stderr.contains("--name can name only one"), "{many:?}");
    }
}

/// An archive that differs from what Docker writes.
struct Odd {
    what: &'static str,
    archive: Vec<u8>,
    /// Whether this project accepts it, if that differs from docker.
    otherwise: Option<bool>,
}

/// An archive of one image, with changes to its manifest.json, config or members.
fn odd(what: &'static str, change: impl FnOnce(&mut Vec<(String, Vec<u8>)>)) -> Odd {
    let mut members = members("odd").expect("memory takes it");
    change(&mut members);
    Odd { what, archive: tar_of(&members).expect("memory takes it"), otherwise: None }
}

fn list(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

/// An archive of one image with another manifest.json.
fn listed(what: &'static str, value: &Value) -> Odd {
    odd(what, |members| members[2].1 = list(value))
}

/// An archive of one image with fields of its config replaced.
fn configured(what: &'static str, fields: Value) -> Odd {
    odd(what, |members| members[0].1 = config(&[digest_of(&members[1].1)], fields))
}

fn linked(what: &'static str, kind: Kind, target: &str) -> Odd {
    let members = members("odd").expect("memory takes it");
    let mut tar = Tar::new(Vec::new());
    let mut add =
        |name: &str, content: &[u8]| tar.add(&Header::new(Kind::File, name), content).expect("memory takes it");
    add("c.json", &members[0].1);
    add("sub/real.tar", &members[1].1);
    tar.add(&Header::new(kind, "l.tar").link(target), b"").expect("memory takes it");
    tar.add(&Header::new(Kind::File, "manifest.json"), &members[2].1).expect("memory takes it");
    Odd { what, archive: tar.finish().expect("memory takes it"), otherwise: None }
}

fn otherwise(odd: Odd, taken: bool) -> Odd {
    Odd { otherwise: Some(taken), ..odd }
}

fn all() -> Vec<Odd> {
    let image = |tags: Value| json!([{"Config": "c.json", "RepoTags": tags, "Layers": ["l.tar"]}]);
    let layers = |layers: Value| json!([{"Config": "c.json", "RepoTags": ["odd:1"], "Layers": layers}]);
    let good = image(json!(["odd:1"]));
    vec![
        odd("good", |_| {}),
        listed("two tags", &image(json!(["odd:1", "odd:2"]))),
        listed("two repositories", &image(json!(["odd:1", "quay.io/x/odd:1", "docker.io/library/odd:3"]))),
        // Docker keeps images without names. This project does not.
        otherwise(listed("no tags", &image(Value::Null)), false),
        // Docker refuses a name without a tag. Everywhere else such a name means `latest`.
        otherwise(listed("a name without a tag", &image(json!(["odd"]))), true),
        listed("an odd name", &image(json!(["Odd Name:1"]))),
        otherwise(listed("no images", &json!([])), false),
        listed("no list", &json!({})),
        listed("too many layers", &layers(json!(["l.tar", "l.tar"]))),
        listed("too few layers", &layers(json!([]))),
        listed("an absent layer", &layers(json!(["x.tar"]))),
        listed("a layer elsewhere", &layers(json!(["./sub/../l.tar"]))),
        // Names of members are only keys here and do not lead to files.
        otherwise(listed("a layer above", &layers(json!(["../../l.tar"]))), true),
        listed("keys in another case", &json!([{"config": "c.json", "REPOTAGS": ["odd:1"], "layers": ["l.tar"]}])),
        odd("rubbish after the list", |members| members[2].1.extend(b"\n{")),
        odd("another list first", |members| members.insert(0, ("manifest.json".to_owned(), list(&json!([]))))),
        odd("a list of before 1.10, too", |members| {
            members.push(("repositories".to_owned(), list(&json!({"old": {"1": "abc"}}))));
        }),
        odd("another directory", |members| members.push(("unrelated/".to_owned(), Vec::new()))),
        odd("names begin with a dot", |members| members.iter_mut().for_each(|(name, _)| *name = format!("./{name}"))),
        odd("an empty layer", |members| {
            members[1].1.clear();
            members[0].1 = config(&[digest_of(b"")], Value::Null);
        }),
        odd("another layer's diffID", |members| members[0].1 = config(&[digest_of(b"x")], Value::Null)),
        odd("no config", |members| drop(members.remove(0))),
        odd("a config of rubbish", |members| members[0].1 = b"rubbish".to_vec()),
        odd("a config that is empty", |members| members[0].1 = b"{}".to_vec()),
        configured("a config for windows", json!({"os": "windows"})),
        configured("a config without a system", json!({"os": ""})),
        configured("a config for arm64", json!({"architecture": "arm64"})),
        configured("too much history", json!({"history": [{"created_by": "a"}, {"created_by": "b"}]})),
        configured(
            "history of no layer",
            json!({"history": [{"created_by": "a"}, {"created_by": "b", "empty_layer": true}]}),
        ),
        configured("null history", json!({"history": null})),
        linked("a symbolic link", Kind::Symlink, "sub/real.tar"),
        linked("an absolute link", Kind::Symlink, "/sub/real.tar"),
        linked("a link above", Kind::Symlink, "../../sub/real.tar"),
        linked("a link to itself", Kind::Symlink, "l.tar"),
        linked("a hard link", Kind::HardLink, "sub/real.tar"),
        odd("a layer of xz", |members| {
            members[1].1 = xz(&members[1].1).expect("memory takes it");
            members[2].1 = list(&good);
        }),
        Odd {
            what: "cut",
            archive: gzip(&tar_of(&members("odd").expect("memory takes it")).expect("memory takes it")[..20_000])
                .expect("memory takes it"),
            otherwise: None,
        },
    ]
}

#[test]
fn odd_archives_become_the_images_that_docker_makes_of_them() {
    let docker = Docker::start().unwrap();
    let mut wrong = Vec::new();
    for Odd { what, archive, otherwise } in all() {
        let (ours, dockers) = (opened(&archive), loaded(&docker, &archive));
        let same = match (otherwise, &ours, &dockers) {
            (None, Ok(ours), Ok(dockers)) => ours == dockers,
            (None, ours, dockers) => ours.is_ok() == dockers.is_ok(),
            (Some(taken), ours, dockers) => ours.is_ok() == taken && dockers.is_ok() != taken,
        };
        if !same {
            wrong.push(format!("{what}: here {ours:?}\n    docker {dockers:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} archives differ:\n{}", wrong.len(), wrong.join("\n"));
}
