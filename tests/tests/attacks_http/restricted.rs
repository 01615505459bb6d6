//! A token restricted to some images reveals nothing about other images, whatever is requested with it.

use tests::images::{ImageFiles, small};
use tests::registry::Registry;

use super::*;

/// A site with four images, three of them tags of one repository. Its catalogue, jobs and hosts contain names of images
/// that a restricted token must not reveal.
struct Neighbours {
    site: Site,
    address: String,
    registry: Registry,
    own: ImageFiles,
    secret: ImageFiles,
    // Dropped last: it holds the images.
    directory: tempfile::TempDir,
}

/// An image with one layer that no other image has.
fn unique(directory: &Path, name: &str, seed: u64) -> Result<ImageFiles> {
    let pools = Pools::open(directory)?;
    let mut tar = Archive::new(Vec::new());
    tar.add(&Header::new(Kind::File, name), oddities::noise(seed, 100_000))?;
    let layer = pools.layer(&tar.finish()?, Compression::Gzip)?;
    ImageBuilder::new(name).layer(layer).build(&pools, &directory.join(name))
}

impl Neighbours {
    fn start() -> Result<Neighbours> {
        let (registry, directory) = (Registry::start()?, tempfile::tempdir()?);
        let (site, address) = open_site("blob_cache = '1G'\n")?;
        let own = small()?;
        let [version, secret, hidden] =
            [("version", 11), ("secret", 12), ("quagga", 13)].map(|(name, seed)| unique(directory.path(), name, seed));
        let (version, secret, hidden) = (version?, secret?, hidden?);
        for (image, name, tag) in [
            (&own, "app", "latest"),
            (&version, "app", "v1"),
            (&secret, "app", "secret"),
            (&hidden, "quagga/thing", "1"),
        ] {
            site.ctl().ok(&["pull", &registry.push(image, name, tag)?])?;
        }
        let hidden_name = registry.reference("quagga/thing", "1");
        site.ctl().ok(&["pin", &hidden_name])?;
        site.ctl().ok(&["schedule", "add", "quagga-order", "--image", &hidden_name, "--cron", "0 4 1 1 *"])?;
        let _ = site.ctl().run(&["pull", &registry.reference("quagga/absent", "1")])?;
        // A host with another token runs the hidden image.
        let other = token(&site, "other", "host", &[])?;
        let lease = serde_json::json!({
            "id": "i1", "version": "1", "mountpoint": "/m", "images": [hidden_name], "layers": hidden.diff_ids(),
            "cache_used": 0, "cache_limit": 0, "reads_hit": 0, "reads_missed": 0, "uptime_seconds": 0,
        });
        let headers = [("Authorization", other.as_str()), ("Content-Type", "application/json")];
        let body = lease.to_string();
        let (status, answer) = ask(&address, "POST", "/v1/hosts/quaggahost/lease", &headers, body.as_bytes())?;
        ensure!(status == 200, "{}", String::from_utf8_lossy(&answer));
        Ok(Neighbours { site, address, registry, own, secret, directory })
    }

    /// Words that are known only to those who may see the other images.
    fn foreign(&self) -> Result<Vec<String>> {
        let mut words: Vec<String> =
            ["quagga", "app:secret", "\"secret\"", "quaggahost", "quagga-order"].map(str::to_owned).to_vec();
        for name in ["version", "secret", "quagga"] {
            let image = ImageFiles::open(&self.directory.path().join(name))?;
            words.extend([image.manifest.digest, image.config.digest]);
            words.extend(image.layers.iter().flat_map(|layer| [layer.diff_id.clone(), layer.blob.digest.clone()]));
        }
        Ok(words)
    }

    fn get(&self, token: &str, path: &str) -> Result<Answer> {
        ask(&self.address, "GET", path, &[("Authorization", token)], b"")
    }

    fn mirror_path(&self, name: &str) -> String {
        format!("/v2/{}/{name}", self.registry.address().replace(':', "_"))
    }
}

/// All readable paths that the coordinator's OpenAPI document lists, with values in place of their parameters.
fn readable_paths(neighbours: &Neighbours, own: &str) -> Result<Vec<String>> {
    let (_, document) = ask(&neighbours.address, "GET", "/openapi.json", &[], b"")?;
    let document: Value = serde_json::from_slice(&document)?;
    let jobs = neighbours.site.ctl().json(&["jobs"])?;
    let count = jobs["jobs"].as_array().context("no jobs")?.len();
    let mut paths = Vec::new();
    for (path, item) in document["paths"].as_object().context("no paths")? {
        if item["get"].is_null() {
            continue;
        }
        let own = own.replace('/', "%2F").replace(':', "%3A");
        let query = format!("name={own}&timeout_seconds=0&after=0&limit=1000&wait_seconds=0");
        let in_place = |parameter: &str, values: Vec<String>| -> Vec<String> {
            values.iter().map(|value| path.replace(parameter, value)).collect()
        };
        let filled = match path {
            _ if path.contains("{id}") => in_place("{id}", (1..=count + 1).map(|id| id.to_string()).collect()),
            _ if path.contains("{name}") => in_place("{name}", vec!["quagga-order".to_owned()]),
            _ if path.contains("{path}") => {
                let repository = format!("{}/app", neighbours.registry.address().replace(':', "_"));
                let below = ["tags/list", "manifests/latest", &format!("manifests/{}", neighbours.own.manifest.digest)];
                let mut values: Vec<String> = below.iter().map(|below| format!("{repository}/{below}")).collect();
                values.push("_catalog".to_owned());
                in_place("{path}", values)
            }
            _ => vec![path.clone()],
        };
        paths.extend(filled.into_iter().map(|path| format!("{path}?{query}")));
    }
    Ok(paths)
}

#[test]
fn no_route_tells_a_restricted_token_of_other_images() {
    let mut neighbours = Neighbours::start().unwrap();
    let own = neighbours.registry.reference("app", "latest");
    let foreign = neighbours.foreign().unwrap();
    let watch = Watch::begin(neighbours.site.coordinator()).unwrap();
    let paths = readable_paths(&neighbours, &own).unwrap();
    assert!(paths.len() > 25, "{paths:?}");
    // The words can be found: an administrator's answers contain them.
    let everything: String = paths
        .iter()
        .map(|path| String::from_utf8_lossy(&ask(&neighbours.address, "GET", path, &[], b"").unwrap().1).into_owned())
        .collect();
    for word in foreign.iter().filter(|word| !word.starts_with("sha256:")) {
        assert!(everything.contains(word.as_str()), "nothing tells of {word}: this test would prove nothing");
    }
    for role in ["viewer", "host"] {
        let token = token(&neighbours.site, &format!("limited-{role}"), role, &["--images", &own]).unwrap();
        let mut served = 0;
        for path in &paths {
            let (status, body) = neighbours.get(&token, path).unwrap();
            let text = String::from_utf8_lossy(&body);
            served += usize::from(status == 200);
            for word in &foreign {
                // A word that the request itself contains is not revealed by the answer.
                let told = text.contains(word.as_str()) && !path.contains(word.as_str());
                assert!(!told, "{role}: {path} ({status}) tells of {word}: {text}");
            }
        }
        assert!(served >= 8, "{role}: only {served} of {} are served", paths.len());
    }
    watch.check(64 * MIB).unwrap();
}

#[test]
fn jobs_of_other_images_are_as_unknown_as_jobs_that_are_not() {
    let neighbours = Neighbours::start().unwrap();
    let own = neighbours.registry.reference("app", "latest");
    let token = token(&neighbours.site, "limited", "viewer", &["--images", &own]).unwrap();
    let foreign = neighbours.site.job(&neighbours.registry.reference("app", "secret")).unwrap()["id"].to_string();
    let answer = |id: &str| {
        let (status, body) = neighbours.get(&token, &format!("/v1/jobs/{id}")).unwrap();
        (status, String::from_utf8(body).unwrap().replace(id, "N"))
    };
    let unknown = answer("999999");
    assert_eq!(unknown.0, 404);
    assert_eq!(answer(&foreign), unknown);
    let ours = neighbours.site.job(&own).unwrap()["id"].to_string();
    assert_eq!(answer(&ours).0, 200);
}

#[test]
fn the_mirror_decides_by_the_image_and_not_by_its_repository() {
    let neighbours = Neighbours::start().unwrap();
    let pattern = |tag: &str| format!("{}/app:{tag}", neighbours.registry.address());
    let latest = token(&neighbours.site, "latest", "viewer", &["--images", &pattern("latest")]).unwrap();
    let versions = token(&neighbours.site, "versions", "viewer", &["--images", &pattern("v*")]).unwrap();
    let path = neighbours.mirror_path("app");
    let status = |token: &str, below: &str| neighbours.get(token, &format!("{path}/{below}")).unwrap().0;
    let tags = |token: &str| {
        let (_, body) = neighbours.get(token, &format!("{path}/tags/list")).unwrap();
        serde_json::from_slice::<Value>(&body).unwrap()["tags"].clone()
    };
    assert_eq!((tags(&latest), tags(&versions)), (serde_json::json!(["latest"]), serde_json::json!(["v1"])));
    let version = ImageFiles::open(&neighbours.directory.path().join("version")).unwrap();
    for (token, image, tag, others) in
        [(&latest, &neighbours.own, "latest", ["v1", "secret"]), (&versions, &version, "v1", ["latest", "secret"])]
    {
        assert_eq!(status(token, &format!("manifests/{tag}")), 200, "{tag}");
        let digests = [&image.config.digest, &image.layers[0].diff_id, &image.layers[0].blob.digest];
        for digest in digests {
            assert_eq!(status(token, &format!("blobs/{digest}")), 200, "{tag} {digest}");
        }
        assert_eq!(status(token, &format!("manifests/{}", image.manifest.digest)), 200, "by digest");
        for other in others {
            assert_eq!(status(token, &format!("manifests/{other}")), 403, "{tag} asks for {other}");
        }
        let secret = &neighbours.secret;
        for digest in [&secret.config.digest, &secret.layers[0].diff_id, &secret.layers[0].blob.digest] {
            assert_eq!(status(token, &format!("blobs/{digest}")), 404, "{tag} {digest}");
        }
        assert_eq!(status(token, &format!("manifests/{}", secret.manifest.digest)), 404);
    }
}
