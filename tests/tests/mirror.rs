//! The coordinator as a registry: for plain HTTP clients, skopeo, a real dockerd with a mirror, and a real containerd.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json as document};
use tempfile::TempDir;
use tests::docker::{Docker, DockerSpec};
use tests::hosts;
use tests::http::{self, Answer};
use tests::images::{self, ImageFiles, digest_of, digest_of_reader, small};
use tests::mounts;
use tests::process::{Output, Process, TIMEOUT, run};
use tests::registry::{Registry, free_port};
use tests::secured::Secured;
use tests::site::{Site, SiteSpec};

#[path = "mirror/indexes.rs"]
mod indexes;
#[path = "mirror/odd_documents.rs"]
mod odd_documents;
#[path = "mirror/pull_through.rs"]
mod pull_through;

/// A site with a TCP address and these settings, and the address.
fn site_with(settings: &str) -> Result<(Site, String)> {
    let address = format!("127.0.0.1:{}", free_port()?);
    let spec = SiteSpec { listen: Some(address.clone()), settings: settings.to_owned(), ..SiteSpec::default() };
    Ok((Site::start_with(&spec)?, address))
}

/// The repository's name in the mirror's paths.
fn path_of(registry: &Registry, name: &str) -> String {
    format!("{}/{name}", registry.address().replace(':', "_"))
}

fn get(address: &str, path: &str) -> Result<Answer> {
    http::get(address, &format!("/v2/{path}"), &[])
}

fn json(answer: &Answer) -> Result<Value> {
    serde_json::from_slice(&answer.body).with_context(|| String::from_utf8_lossy(&answer.body).into_owned())
}

#[test]
fn a_layer_has_its_true_length_whatever_its_manifest_says() {
    let (registry, directory) = (Registry::start().unwrap(), tempfile::tempdir().unwrap());
    let (site, address) = site_with("blob_cache = '1G'\n").unwrap();
    let (small, pools) = (small().unwrap(), images::Pools::open(directory.path()).unwrap());
    let pack = |tar: &Path| pools.layer(&std::fs::read(tar).unwrap(), images::Compression::Gzip).unwrap();
    // The sizes claimed for the lower and the upper layer. The second and third image find both layers in the store.
    for (name, claims) in [("first", [1, 0]), ("second", [0, 1 << 40]), ("third", [u64::MAX >> 1, 1000])] {
        let mut layers = [&small.layers[0], &small.layers[1]].map(|layer| pack(&layer.tar));
        let sizes: Vec<u64> = layers.iter().map(|layer| layer.blob.size).collect();
        layers.iter_mut().zip(claims).for_each(|(layer, claim)| layer.blob.size = claim);
        let blobs: Vec<String> = layers.iter().map(|layer| layer.blob.digest.clone()).collect();
        let builder = layers.into_iter().fold(images::ImageBuilder::new(name), |builder, layer| builder.layer(layer));
        let image = builder.cmd(&[name]).build(&pools, &directory.path().join(name)).unwrap();
        let reference = registry.push(&image, name, "1").unwrap();
        site.ctl().ok(&["pull", &reference]).unwrap();
        let shown = site.ctl().json(&["image", &reference]).unwrap();
        assert_eq!(shown["compressed_size"].as_u64(), Some(sizes.iter().sum()), "{shown}");
        let of_layers =
            shown["layers_detail"].as_array().unwrap().iter().map(|layer| layer["compressed_size"].as_u64());
        assert_eq!(of_layers.collect::<Option<Vec<_>>>().unwrap(), sizes, "{shown}");
        for (blob, size) in blobs.iter().zip(&sizes) {
            let answer = get(&address, &format!("{}/blobs/{blob}", path_of(&registry, name))).unwrap();
            assert_eq!(answer.head.header("Content-Length"), Some(size.to_string().as_str()));
            assert_eq!(&digest_of(&answer.body), blob);
        }
    }
}

#[test]
fn the_protocol_is_answered_from_the_store() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let (site, address) = site_with("").unwrap();
    let reference = registry.push(&image, "team/small", "1").unwrap();
    site.ctl().ok(&["pull", &reference]).unwrap();
    let path = path_of(&registry, "team/small");
    let version = http::get(&address, "/v2/", &[]).unwrap();
    assert_eq!((version.status, version.head.header("Docker-Distribution-Api-Version")), (200, Some("registry/2.0")));

    let manifest = get(&address, &format!("{path}/manifests/1")).unwrap();
    assert_eq!(manifest.status, 200);
    let digest = digest_of(&manifest.body);
    assert_eq!(manifest.head.header("Docker-Content-Digest"), Some(digest.as_str()));
    let head = http::request(&address, "HEAD", &format!("/v2/{path}/manifests/1"), &[], 0, std::io::empty()).unwrap();
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(head.head.header("Docker-Content-Digest"), Some(digest.as_str()));
    assert_eq!(get(&address, &format!("{path}/manifests/{digest}")).unwrap().body, manifest.body);
    let by_namespace = format!("team/small/manifests/1?ns={}", registry.address());
    assert_eq!(get(&address, &by_namespace).unwrap().body, manifest.body, "as containerd asks");

    let document = json(&manifest).unwrap();
    assert_eq!(manifest.head.header("Content-Type"), document["mediaType"].as_str());
    assert_eq!(document["config"]["digest"], image.config.digest, "the image ID is the same");
    let config = get(&address, &format!("{path}/blobs/{}", image.config.digest)).unwrap();
    assert_eq!(config.body, image.blob(&image.config.digest).unwrap());
    for (described, layer) in document["layers"].as_array().unwrap().iter().zip(&image.layers) {
        assert_eq!(described["digest"], layer.diff_id, "layers are named by their diffIDs");
        let tar = std::fs::read(&layer.tar).unwrap();
        assert_eq!(described["size"], tar.len());
        let blob = format!("/v2/{path}/blobs/{}", layer.diff_id);
        assert!(http::get(&address, &blob, &[]).unwrap().body == tar, "the tar, byte for byte");
        let part = http::get(&address, &blob, &[("Range", "bytes=100-611")]).unwrap();
        let range = format!("bytes 100-611/{}", tar.len());
        assert_eq!((part.status, part.head.header("Content-Range")), (206, Some(range.as_str())));
        assert!(part.body == tar[100..612]);
        let head = http::request(&address, "HEAD", &blob, &[], 0, std::io::empty()).unwrap();
        assert_eq!(head.head.header("Content-Length"), Some(tar.len().to_string().as_str()));
    }
    assert_eq!(json(&get(&address, &format!("{path}/tags/list")).unwrap()).unwrap()["tags"], serde_json::json!(["1"]));
    assert_eq!(json(&get(&address, "_catalog").unwrap()).unwrap()["repositories"], serde_json::json!([path]));
    let beyond = [("Range", "bytes=99999999-")];
    let config = format!("/v2/{path}/blobs/{}", image.config.digest);
    assert_eq!(http::get(&address, &config, &beyond).unwrap().status, 416);
}

#[test]
fn what_the_store_has_not_is_not_found() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let (site, address) = site_with("").unwrap();
    site.ctl().ok(&["pull", &registry.push(&image, "one", "1").unwrap()]).unwrap();
    let (one, two) = (path_of(&registry, "one"), path_of(&registry, "two"));
    for (path, code) in [
        (format!("{one}/manifests/2"), "MANIFEST_UNKNOWN"),
        (format!("{two}/manifests/1"), "MANIFEST_UNKNOWN"),
        (format!("{two}/tags/list"), "NAME_UNKNOWN"),
        // A blob of another repository, and one whose layer is kept only unpacked.
        (format!("{two}/blobs/{}", image.config.digest), "BLOB_UNKNOWN"),
        (format!("{one}/blobs/{}", image.layers[0].blob.digest), "BLOB_UNKNOWN"),
        // The original manifest names blobs that are not kept, so clients must get it from the registry.
        (format!("{one}/manifests/{}", image.manifest.digest), "MANIFEST_UNKNOWN"),
        ("library/nothing/manifests/latest".to_owned(), "MANIFEST_UNKNOWN"),
        ("nonsense".to_owned(), "NAME_UNKNOWN"),
    ] {
        let answer = get(&address, &path).unwrap();
        let document = json(&answer).unwrap();
        assert_eq!((answer.status, document["errors"][0]["code"].as_str()), (404, Some(code)), "{path}: {document}");
    }
}

/// Checks that HEAD answers like GET.
fn check_head(address: &str, url: &str) -> Result<()> {
    let whole = http::get(address, url, &[])?;
    let head = http::request(address, "HEAD", url, &[], 0, std::io::empty())?;
    assert_eq!((whole.status, head.status, head.body.len()), (200, 200, 0), "{url}");
    for name in ["Content-Length", "Content-Type", "Docker-Content-Digest"] {
        assert_eq!(head.head.header(name), whole.head.header(name), "{name} of {url}");
        assert!(whole.head.header(name).is_some(), "{name} of {url}");
    }
    assert_eq!(whole.head.header("Docker-Content-Digest"), Some(digest_of(&whole.body).as_str()), "{url}");
    Ok(())
}

#[test]
fn the_pull_side_is_what_the_distribution_specification_says() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let (site, address) = site_with("").unwrap();
    let tags = ["1.0", "1.1", "2", "latest"];
    let references = tags.map(|tag| registry.push(&image, "team/small", tag).unwrap());
    let other = registry.push(&image, "another", "1").unwrap();
    site.ctl().ok(&[&["pull", &other], references.each_ref().map(String::as_str).as_slice()].concat()).unwrap();
    let path = path_of(&registry, "team/small");
    // Lists are sorted, and come in parts with a link to the next part.
    let list = |query: &str| {
        let answer = get(&address, &format!("{path}/tags/list{query}")).unwrap();
        assert_eq!(answer.head.header("Docker-Distribution-Api-Version"), Some("registry/2.0"));
        let document = json(&answer).unwrap();
        assert_eq!(document["name"], path.as_str());
        let tags: Vec<String> = serde_json::from_value(document["tags"].clone()).unwrap();
        (tags.join(" "), answer.head.header("Link").map(str::to_owned))
    };
    assert_eq!(list(""), ("1.0 1.1 2 latest".to_owned(), None));
    let next = format!("</v2/{path}/tags/list?n=2&last=1.1>; rel=\"next\"");
    assert_eq!(list("?n=2"), ("1.0 1.1".to_owned(), Some(next)));
    assert_eq!(list("?n=2&last=1.1"), ("2 latest".to_owned(), None));
    assert_eq!(list("?last=1.05"), ("1.1 2 latest".to_owned(), None));
    assert_eq!(list("?n=0"), (String::new(), None));
    let by_namespace = get(&address, &format!("team/small/tags/list?n=1&ns={}", registry.address())).unwrap();
    assert!(
        by_namespace.head.header("Link").is_some_and(|link| link.contains("ns=127.0.0.1%3A")),
        "the way is the same"
    );
    let catalog = get(&address, "_catalog?n=1").unwrap();
    let another = path_of(&registry, "another");
    assert_eq!(json(&catalog).unwrap()["repositories"], serde_json::json!([another]));
    assert!(catalog.head.header("Link").is_some_and(|link| link.starts_with("</v2/_catalog?n=1&last=")));
    // Errors have the shape that the specification requires.
    let digest = &image.config.digest;
    for (method, below, status, code) in [
        ("GET", "tags/list?n=many", 400, "PAGINATION_NUMBER_INVALID"),
        ("GET", "blobs/sha256:1", 400, "DIGEST_INVALID"),
        ("GET", "manifests/a/b", 400, "MANIFEST_INVALID"),
        ("GET", "manifests/absent", 404, "MANIFEST_UNKNOWN"),
        ("GET", "referrers/x", 404, "NAME_UNKNOWN"),
        ("POST", "blobs/uploads/", 405, "UNSUPPORTED"),
        ("PUT", "manifests/1.0", 405, "UNSUPPORTED"),
        ("DELETE", "manifests/1.0", 405, "UNSUPPORTED"),
        ("PATCH", "blobs/uploads/1", 405, "UNSUPPORTED"),
    ] {
        let answer = http::request(&address, method, &format!("/v2/{path}/{below}"), &[], 0, std::io::empty()).unwrap();
        let document = json(&answer).unwrap();
        let error = &document["errors"][0];
        assert_eq!((answer.status, error["code"].as_str()), (status, Some(code)), "{method} {below}: {document}");
        assert!(error["message"].is_string() && document["errors"].as_array().unwrap().len() == 1, "{document}");
        assert_eq!(answer.head.header("Docker-Distribution-Api-Version"), Some("registry/2.0"));
        assert_eq!(answer.head.header("Allow"), (status == 405).then_some("GET, HEAD"), "{method} {below}");
    }
    assert_eq!(get(&address, "UPPER/tags/list").unwrap().status, 400);
    let heads =
        [format!("manifests/{}", tags[0]), format!("blobs/{digest}"), format!("blobs/{}", image.layers[0].diff_id)];
    heads.iter().try_for_each(|below| check_head(&address, &format!("/v2/{path}/{below}"))).unwrap();
    let absent =
        http::request(&address, "HEAD", &format!("/v2/{path}/manifests/no"), &[], 0, std::io::empty()).unwrap();
    assert_eq!(absent.status, 404);
}

#[test]
fn with_the_original_layers_kept_an_image_is_served_as_it_was_pushed() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let (mut site, address) = site_with("blob_cache = '1G'\n").unwrap();
    site.ctl().ok(&["pull", &registry.push(&image, "small", "1").unwrap()]).unwrap();
    let path = path_of(&registry, "small");
    let original = image.blob(&image.manifest.digest).unwrap();
    for name in ["1", &image.manifest.digest] {
        assert_eq!(get(&address, &format!("{path}/manifests/{name}")).unwrap().body, original, "{name}");
    }
    // The original content is also served after a restart.
    site.coordinator().restart().unwrap();
    for layer in &image.layers {
        let blob = format!("/v2/{path}/blobs/{}", layer.blob.digest);
        let bytes = image.blob(&layer.blob.digest).unwrap();
        assert!(http::get(&address, &blob, &[]).unwrap().body == bytes);
        let part = http::get(&address, &blob, &[("Range", "bytes=-10")]).unwrap();
        assert!(part.status == 206 && part.body == bytes[bytes.len() - 10..]);
    }
    let fetched = registry.blob_bytes();
    check_skopeo(&format!("{address}/{path}:1"), &image, Some(&image.manifest.digest)).unwrap();
    assert_eq!(registry.blob_bytes(), fetched, "nothing more was asked of the registry");

    // Without one of the blobs the image is served with uncompressed layers, and its original digest is no longer served.
    let kept = site.coordinator().spec().state.join("blobs").join(tests::images::hex(&image.layers[0].blob.digest));
    std::fs::remove_file(kept).unwrap();
    site.coordinator().restart().unwrap();
    assert_ne!(get(&address, &format!("{path}/manifests/1")).unwrap().body, original);
    assert_eq!(get(&address, &format!("{path}/manifests/{}", image.manifest.digest)).unwrap().status, 404);
}

/// Copies an image with skopeo and compares the copy with the pushed image.
fn check_skopeo(reference: &str, image: &ImageFiles, manifest: Option<&str>) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut copy = Command::new("skopeo");
    copy.args(["copy", "--src-tls-verify=false", "--preserve-digests", &format!("docker://{reference}")]);
    run(copy.arg(format!("dir:{}", directory.path().display())))?.ok()?;
    check_copy(&directory, image, manifest)
}

/// Compares the directory that skopeo wrote with the pushed image.
fn check_copy(directory: &TempDir, image: &ImageFiles, manifest: Option<&str>) -> Result<()> {
    let file = |digest: &str| directory.path().join(tests::images::hex(digest));
    let written = std::fs::read(directory.path().join("manifest.json"))?;
    ensure!(manifest.is_none_or(|digest| digest_of(&written) == digest), "the manifest is another one");
    ensure!(std::fs::read(file(&image.config.digest))? == image.blob(&image.config.digest)?, "the config");
    let document: Value = serde_json::from_slice(&written)?;
    for (layer, expected) in document["layers"].as_array().context("no layers")?.iter().zip(&image.layers) {
        let digest = layer["digest"].as_str().context("no digest")?;
        ensure!([&expected.diff_id, &expected.blob.digest].iter().any(|one| *one == digest), "layer {digest}");
        ensure!(digest_of_reader(std::fs::File::open(file(digest))?)? == digest, "the bytes of layer {digest}");
    }
    Ok(())
}

#[test]
fn skopeo_copies_from_the_share() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let (site, address) = site_with("").unwrap();
    site.ctl().ok(&["pull", &registry.push(&image, "small", "1").unwrap()]).unwrap();
    check_skopeo(&format!("{address}/{}:1", path_of(&registry, "small")), &image, None).unwrap();
}

#[test]
fn a_real_dockerd_pulls_through_the_mirror_and_goes_upstream_for_the_rest() {
    let (image, (site, address)) = (small().unwrap(), site_with("").unwrap());
    // The image has the name docker.io/library/small, as if it had been pulled from Docker Hub.
    hosts::load(&site, &image).unwrap();
    let spec = DockerSpec { arguments: vec![format!("--registry-mirror=http://{address}")], ..DockerSpec::default() };
    let mut docker = Docker::start_with(spec).unwrap();
    docker.forward(&address).unwrap();
    docker.ok(&["pull", "small"]).unwrap();
    let id = docker.ok(&["image", "inspect", "--format", "{{.Id}}", "small:latest"]).unwrap();
    assert_eq!(id, image.config.digest, "the image ID is the config's digest, as from the registry itself");
    docker.ok(&["run", "--rm", "--network=none", "small", "/bin/busybox", "true"]).unwrap();
    // There is no network here, but the attempt shows where dockerd looks for the image.
    let elsewhere = docker.run(&["pull", "nothing-like-it"]).unwrap();
    assert!(!elsewhere.succeeded() && elsewhere.stderr.contains("registry-1.docker.io"), "{}", elsewhere.stderr);
}

/// A real containerd of this test, and `ctr` for it.
struct Containerd {
    // Declared first, so that it ends before its directory is unmounted and removed.
    process: Process,
    directory: tempfile::TempDir,
}

impl Containerd {
    fn start() -> Result<Containerd> {
        let directory = tempfile::Builder::new().prefix("containerd-").tempdir()?;
        let path = directory.path();
        let config = format!(
            "version = 2\nroot = '{0}/root'\nstate = '{0}/state'\ndisabled_plugins = ['io.containerd.grpc.v1.cri']\n\
             [grpc]\n  address = '{0}/containerd.sock'\n",
            path.display()
        );
        std::fs::write(path.join("config.toml"), config)?;
        let mut command = Command::new("containerd");
        command.arg("--config").arg(path.join("config.toml"));
        let mut process = Process::spawn("containerd", &mut command, &path.join("containerd.log"))?;
        let socket = path.join("containerd.sock");
        process.wait_ready(TIMEOUT, || {
            let mut version = Command::new("ctr");
            Ok(run(version.arg("--address").arg(&socket).arg("version"))?.succeeded())
        })?;
        Ok(Containerd { process, directory })
    }

    fn ctr(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("ctr");
        run(command.arg("--address").arg(self.directory.path().join("containerd.sock")).args(arguments))?.ok()
    }

    /// Makes `mirror` (a URL) a mirror for a registry with a `hosts.toml`, as for all engines on containerd. `more` are
    /// further lines of it.
    fn mirrors(&self, registry: &str, mirror: &str, more: &str) -> Result<String> {
        let hosts = self.directory.path().join("hosts");
        std::fs::create_dir_all(hosts.join(registry))?;
        let file = format!(
            "server = 'http://{registry}'\n[host.'{mirror}']\n  capabilities = ['pull', 'resolve']\n{}",
            more.replace("MIRROR", mirror)
        );
        std::fs::write(hosts.join(registry).join("hosts.toml"), file)?;
        Ok(hosts.display().to_string())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.process.terminate(TIMEOUT);
        mounts::detach_below(self.directory.path());
    }
}

#[test]
fn a_real_containerd_pulls_from_the_share_while_the_registry_is_gone() {
    let (mut registry, image) = (Registry::start().unwrap(), small().unwrap());
    for settings in ["", "blob_cache = '1G'\n"] {
        registry.restart().unwrap();
        let (site, address) = site_with(settings).unwrap();
        let reference = registry.push(&image, "small", "1").unwrap();
        site.ctl().ok(&["pull", &reference]).unwrap();
        let containerd = Containerd::start().unwrap();
        let hosts = containerd.mirrors(&registry.address(), &format!("http://{address}"), "").unwrap();
        registry.stop().unwrap();
        let pull = ["images", "pull", "--hosts-dir", &hosts, "--snapshotter", "native", &reference];
        containerd.ctr(&pull).unwrap();
        let listed = containerd.ctr(&["content", "ls", "--quiet"]).unwrap();
        assert!(listed.contains(&image.config.digest), "{listed}");
        if !settings.is_empty() {
            assert!(listed.contains(&image.manifest.digest), "the original, with its digest: {listed}");
        }
        let target = containerd.directory.path().join("mounted");
        std::fs::create_dir(&target).unwrap();
        let target = target.display().to_string();
        containerd.ctr(&["images", "mount", "--snapshotter", "native", &reference, &target]).unwrap();
        let greeting = std::fs::read_to_string(Path::new(&target).join("data/greeting")).unwrap();
        assert_eq!(greeting, "hello again\n");
    }
}

/// A site behind TLS with two images from a registry, and certificates for clients.
struct Guarded {
    secured: Secured,
    registry: Registry,
    image: ImageFiles,
    certificates: TempDir,
}

impl Guarded {
    fn start() -> Result<Guarded> {
        let (secured, registry, image) = (Secured::start(&SiteSpec::default())?, Registry::start()?, small()?);
        let pushed = ["team/app", "other/app"].map(|name| registry.push(&image, name, "1"));
        for reference in pushed {
            secured.site.ctl().ok(&["pull", &reference?])?;
        }
        // A directory like those below `/etc/containers/certs.d` and `/etc/docker/certs.d`.
        let certificates = tempfile::tempdir()?;
        std::fs::copy(secured.authority_file(), certificates.path().join("ca.crt"))?;
        Ok(Guarded { secured, registry, image, certificates })
    }

    /// A token for the team's images only.
    fn token(&self, role: &str) -> Result<String> {
        self.secured.token(role, role, &["--images", &format!("{}/team/*", self.registry.address())])
    }

    /// `127.0.0.1:PORT` of the coordinator.
    fn address(&self) -> String {
        self.secured.url().replace("https://", "")
    }

    fn reference(&self, name: &str) -> String {
        format!("{}/{}:1", self.address(), path_of(&self.registry, name))
    }

    /// Runs skopeo, which trusts only the coordinator's authority.
    fn skopeo(&self, verb: &str, token: Option<&str>, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new("skopeo");
        command.arg(verb);
        let (source, creds) = if verb == "copy" { ("src-", "--src-creds") } else { ("", "--creds") };
        command.arg(format!("--{source}cert-dir={}", self.certificates.path().display()));
        command.args(token.map(|token| format!("{creds}=anybody:{token}")));
        run(command.args(arguments))
    }

    fn copy(&self, token: Option<&str>, name: &str, target: &TempDir) -> Result<Output> {
        let (from, to) = (format!("docker://{}", self.reference(name)), format!("dir:{}", target.path().display()));
        self.skopeo("copy", token, &[&from, &to])
    }
}

/// Checks that a client failed and showed these words to its user.
fn check_fails(output: &Output, words: &[&str]) -> Result<()> {
    ensure!(!output.succeeded(), "{} succeeded", output.command);
    words.iter().try_for_each(|word| {
        ensure!(output.stderr.contains(word), "no {word:?} in: {}", output.stderr);
        Ok(())
    })
}

#[test]
fn over_tls_skopeo_copies_what_its_token_is_for_and_is_told_why_it_may_not_copy_the_rest() {
    let guarded = Guarded::start().unwrap();
    for role in ["viewer", "host"] {
        let (token, target) = (guarded.token(role).unwrap(), tempfile::tempdir().unwrap());
        guarded.copy(Some(&token), "team/app", &target).unwrap().ok().unwrap();
        check_copy(&target, &guarded.image, None).unwrap();
        let refused = guarded.copy(Some(&token), "other/app", &target).unwrap();
        check_fails(&refused, &["denied", &format!("token {role} may not use image"), "/other/app"]).unwrap();
        let tags = |name: &str| {
            let repository = format!("docker://{}", guarded.reference(name).trim_end_matches(":1"));
            guarded.skopeo("list-tags", Some(&token), &[&repository]).unwrap()
        };
        assert!(tags("team/app").ok().unwrap().contains("\"1\""));
        check_fails(&tags("other/app"), &["403 (Forbidden)"]).unwrap();

        let wrong = format!("{}0", token);
        check_fails(&guarded.copy(Some(&wrong), "team/app", &target).unwrap(), &["unauthorized"]).unwrap();
        guarded.secured.site.ctl().ok(&["token", "revoke", role]).unwrap();
        check_fails(&guarded.copy(Some(&token), "team/app", &target).unwrap(), &["unauthorized"]).unwrap();
    }
    let target = tempfile::tempdir().unwrap();
    check_fails(&guarded.copy(None, "team/app", &target).unwrap(), &["unauthorized"]).unwrap();
    std::fs::remove_file(guarded.certificates.path().join("ca.crt")).unwrap();
    let token = guarded.secured.token("admin", "admin", &[]).unwrap();
    check_fails(&guarded.copy(Some(&token), "team/app", &target).unwrap(), &["x509"]).unwrap();
}

#[test]
fn a_real_dockerd_pulls_what_its_login_is_for() {
    let guarded = Guarded::start().unwrap();
    let (token, address) = (guarded.token("host").unwrap(), guarded.address());
    let mut docker = Docker::start().unwrap();
    docker.forward(&address).unwrap();
    let [ours, theirs] = ["team/app", "other/app"].map(|name| guarded.reference(name));
    // dockerd also tries loopback addresses without TLS, and then reports the error of that attempt.
    check_fails(&docker.run(&["pull", &ours]).unwrap(), &["malformed HTTP response"]).unwrap();
    let login =
        |password: &str| docker.run(&["login", "--username", "anybody", "--password", password, &address]).unwrap();
    check_fails(&login("cfs_wrong_0"), &["401 Unauthorized"]).unwrap();
    login(&token).ok().unwrap();
    docker.ok(&["pull", &ours]).unwrap();
    let id = docker.ok(&["image", "inspect", "--format", "{{.Id}}", &ours]).unwrap();
    assert_eq!(id, guarded.image.config.digest);
    check_fails(&docker.run(&["pull", &theirs]).unwrap(), &["denied", "token host may not use image"]).unwrap();
}

#[test]
fn a_real_containerd_shows_its_token_to_the_share() {
    let mut guarded = Guarded::start().unwrap();
    let token = guarded.token("host").unwrap();
    let containerd = Containerd::start().unwrap();
    let lines = format!(
        "  ca = '{}'\n[host.'MIRROR'.header]\n  authorization = ['Basic {}']\n",
        guarded.secured.authority_file().display(),
        STANDARD.encode(format!("anybody:{token}"))
    );
    let hosts = containerd.mirrors(&guarded.registry.address(), &guarded.secured.url(), &lines).unwrap();
    let [ours, theirs] = ["team/app", "other/app"].map(|name| guarded.registry.reference(name, "1"));
    let pull = |reference: &str| {
        containerd.ctr(&["images", "pull", "--hosts-dir", &hosts, "--snapshotter", "native", reference])
    };
    guarded.registry.stop().unwrap();
    pull(&ours).unwrap();
    assert!(containerd.ctr(&["content", "ls", "--quiet"]).unwrap().contains(&guarded.image.config.digest));
    assert!(pull(&theirs).is_err(), "the share refuses it, and the registry is gone");
    // What the mirror refuses is pulled from the registry itself, which decides about access on its own.
    guarded.registry.restart().unwrap();
    pull(&theirs).unwrap();
}

#[test]
fn a_real_dockerd_shows_its_login_at_docker_hub_to_a_mirror() {
    let (secured, image) = (Secured::start(&SiteSpec::default()).unwrap(), small().unwrap());
    hosts::load(&secured.site, &image).unwrap();
    let token = secured.token("host", "host", &["--images", "small"]).unwrap();
    let arguments = vec![format!("--registry-mirror={}", secured.url())];
    let mut docker = Docker::start_with(DockerSpec { arguments, ..DockerSpec::default() }).unwrap();
    docker.forward(&secured.url().replace("https://", "")).unwrap();
    check_fails(&docker.run(&["pull", "small"]).unwrap(), &["registry-1.docker.io"]).unwrap();
    let login =
        document!({"auths": {"https://index.docker.io/v1/": {"auth": STANDARD.encode(format!("anybody:{token}"))}}});
    let (_, directory) = docker.environment().into_iter().find(|(name, _)| name == "DOCKER_CONFIG").unwrap();
    std::fs::write(Path::new(&directory).join("config.json"), login.to_string()).unwrap();
    docker.ok(&["pull", "small"]).unwrap();
    let id = docker.ok(&["image", "inspect", "--format", "{{.Id}}", "small"]).unwrap();
    assert_eq!(id, image.config.digest);
}
