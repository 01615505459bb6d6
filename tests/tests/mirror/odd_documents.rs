//! Documents that were pulled although they are odd: engines get them from the mirror, and users can see them.

use tests::registry::{BareLayer, CONFIG, Documents, MANIFEST};

use super::*;

const INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// Members that make a document odd, but that nothing reads.
const UNREAD: &[(&str, &[u8])] = &[
    ("no-utf-8", b"\"x\":\"caf\xe9\",\"k\xe9y\":1"),
    ("half-pair", b"\"x\":\"\\ud800\",\"\\udc00\":1"),
    ("large-number", b"\"x\":[1e999,123456789012345678901234567890]"),
    ("notes", b"\"annotations\":null"),
];

/// The document with these members added.
fn with(document: &Value, members: &[u8]) -> Vec<u8> {
    [&document.to_string().as_bytes()[..1], members, b",", &document.to_string().as_bytes()[1..]].concat()
}

fn capitals(document: &Value) -> Vec<u8> {
    let mut text = document.to_string();
    for key in ["schemaVersion", "mediaType", "config", "layers", "manifests", "digest", "size", "rootfs", "diff_ids"] {
        text = text.replace(&format!("\"{key}\":"), &format!("\"{}\":", key.to_uppercase()));
    }
    text.into_bytes()
}

/// Adds an image for each oddity in each of its documents, and returns their tags.
fn put_all(documents: &mut Documents, layer: &BareLayer) -> Vec<String> {
    let deep = [b"\"x\":".to_vec(), b"[".repeat(500), b"]".repeat(500)].concat();
    let unread = UNREAD.iter().copied().chain([("deep", deep.as_slice())]);
    let forms: Vec<(&str, Option<&[u8]>)> =
        unread.map(|(name, members)| (name, Some(members))).chain([("capitals", None)]).collect();
    let odd = |document: &Value, members: Option<&[u8]>| match members {
        Some(members) => with(document, members),
        None => capitals(document),
    };
    let platform = document!({"os": "linux", "architecture": "amd64"});
    let mut tags = Vec::new();
    for (name, members) in forms {
        for place in ["config", "manifest", "index"] {
            let tag = format!("{name}-{place}");
            let of =
                |here: &str, value: &Value| if here == place { odd(value, members) } else { value.to_string().into() };
            let config = document!({"os": "linux", "architecture": "amd64", "author": tag,
                "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]}});
            let config = documents.blob(CONFIG, of("config", &config));
            let manifest = document!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config,
                "layers": [layer.descriptor]});
            let mut entry = documents.manifest(MANIFEST, of("manifest", &manifest), &[]);
            entry["platform"] = platform.clone();
            let index = document!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]});
            documents.manifest(INDEX, of("index", &index), &[&tag]);
            tags.push(tag);
        }
    }
    // An index that names the image through a second index.
    let config = document!({"architecture": "amd64", "author": "nested",
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]}});
    let mut entry = documents.image(config.to_string().into_bytes(), layer, &[]);
    for tags in [&[][..], &["nested"]] {
        entry["platform"] = platform.clone();
        let index = document!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]});
        entry = documents.manifest(INDEX, index.to_string().into_bytes(), tags);
    }
    tags.push("nested".to_owned());
    tags
}

#[test]
fn whatever_was_pulled_is_served_and_shown() {
    let mut documents = Documents::default();
    let layer = documents.layer().unwrap();
    let tags = put_all(&mut documents, &layer);
    let registry = documents.serve().unwrap();
    let (site, address) = site_with("").unwrap();
    let mut docker = Docker::start().unwrap();
    docker.forward(&address).unwrap();
    let path = format!("{}/app", registry.address().replace(':', "_"));
    for tag in &tags {
        let reference = registry.reference("app", tag);
        site.ctl().ok(&["pull", &reference]).unwrap();
        site.ctl().ok(&["image", &reference]).unwrap();
        let shown = site.ctl().ok(&["--json", "image", &reference]).unwrap();
        let image = site.ctl().json(&["images"]).unwrap();
        let name = |image: &&Value| image["name"] == reference.as_str();
        let id = image["images"].as_array().unwrap().iter().find(name).unwrap()["config"].clone();
        assert!(shown.contains(id.as_str().unwrap()), "{tag}: {shown}");

        let index = get(&address, &format!("{path}/manifests/{tag}")).unwrap();
        assert_eq!(index.status, 200, "{tag}: {}", String::from_utf8_lossy(&index.body));
        let entry = json(&index).unwrap()["manifests"][0].clone();
        assert_eq!(entry["platform"], document!({"os": "linux", "architecture": "amd64"}), "{tag}");
        let manifest = get(&address, &format!("{path}/manifests/{}", entry["digest"].as_str().unwrap())).unwrap();
        assert_eq!(json(&manifest).unwrap()["config"]["digest"], id, "{tag}");

        let ours = format!("{address}/{path}:{tag}");
        docker.ok(&["pull", "--quiet", &ours]).unwrap();
        let there = docker.ok(&["image", "inspect", "--format", "{{.Id}}", &ours]).unwrap();
        assert_eq!(id, there.as_str(), "{tag}");
    }
}
