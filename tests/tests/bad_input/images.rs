//! Images that cannot be pulled or loaded.

use super::*;

/// A tar of one file.
fn tar_of(path: &str) -> Result<Vec<u8>> {
    let mut tar = Archive::new(Vec::new());
    tar.add(&Header::new(Kind::File, path), "content")?;
    Ok(tar.finish()?)
}

/// A registry, and a place to make images with one defect each.
struct Workshop {
    registry: Registry,
    pools: Pools,
    directory: tempfile::TempDir,
}

impl Workshop {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        Ok(Self { registry: Registry::start()?, pools: Pools::open(directory.path())?, directory })
    }

    /// Pushes an image with this one layer.
    fn push(&self, name: &str, layer: Layer) -> Result<String> {
        let image = ImageBuilder::new(name).layer(layer).build(&self.pools, &self.directory.path().join(name))?;
        self.registry.push(&image, name, "1")
    }

    /// A layer with the blob `blob` and the correct diffID of `tar`.
    fn raw(&self, blob: &[u8], compression: Compression, tar: &[u8]) -> Result<Layer> {
        self.pools.raw_layer(blob, compression.layer_type(), &digest_of(tar))
    }

    fn packed(&self, tar: &[u8], compression: Compression) -> Result<(Layer, Vec<u8>)> {
        let layer = self.pools.layer(tar, compression)?;
        let blob = std::fs::read(self.pools.blobs.path(&layer.blob.digest))?;
        Ok((layer, blob))
    }
}

#[test]
fn layers_that_are_damaged_or_lie_are_refused() {
    let shop = Workshop::new().unwrap();
    let mut noise = Archive::new(Vec::new());
    noise.add(&Header::new(Kind::File, "noise"), oddities::noise(1, 400_000)).unwrap();
    let tar = noise.finish().unwrap();
    let (good, gzip) = shop.packed(&tar, Compression::Gzip).unwrap();
    let (_, zstd) = shop.packed(&tar, Compression::Zstd).unwrap();
    let flipped = |blob: &[u8]| {
        let mut blob = blob.to_vec();
        let middle = blob.len() / 2;
        blob[middle..middle + 8].iter_mut().for_each(|byte| *byte ^= 0x5a);
        blob
    };
    let (half, wrong) = (gzip.len() / 2, digest_of(b"something else"));
    let raw = |blob: &[u8], compression| shop.raw(blob, compression, &tar).unwrap();
    let both = [wrong.as_str(), good.diff_id.as_str()];
    let rows: Vec<(&str, Layer, &[&str])> = vec![
        ("truncated-gzip", raw(&gzip[..half], Compression::Gzip), &["truncated"]),
        ("truncated-zstd", raw(&zstd[..half], Compression::Zstd), &["truncated"]),
        ("corrupt-gzip", raw(&flipped(&gzip), Compression::Gzip), &["corrupt"]),
        ("corrupt-zstd", raw(&flipped(&zstd), Compression::Zstd), &["corrupt"]),
        ("trailing", raw(&[&gzip[..], &[b'x'; 100]].concat(), Compression::Gzip), &["more"]),
        ("not-packed", raw(b"this is no archive at all", Compression::Gzip), &["media type"]),
        ("truncated-tar", shop.packed(&tar[..200_000], Compression::Gzip).unwrap().0, &["ends"]),
        ("diff-id", Layer { diff_id: wrong.clone(), ..good.clone() }, &both),
    ];
    for (name, layer, words) in rows {
        // Each row gets its own coordinator, so that knowledge from one row cannot help with the next.
        let site = Site::start_with(&impatient()).unwrap();
        let blob = layer.blob.digest.clone();
        let reference = shop.push(name, layer).unwrap();
        check_pull(&site, &reference, &[words, &[blob.as_str()]].concat()).unwrap();
    }
}

#[test]
fn hostile_tars_are_refused_by_the_name_of_the_entry() {
    let shop = Workshop::new().unwrap();
    let site = Site::start_with(&impatient()).unwrap();
    let with = |entries: &[(Header, &str)]| {
        let mut tar = Archive::new(Vec::new());
        entries.iter().for_each(|(header, content)| tar.add(header, content).unwrap());
        tar.finish().unwrap()
    };
    let file = |path: &str| Header::new(Kind::File, path);
    let rows = [
        ("up", with(&[(file("../../../evil-up"), "x")]), "../../../evil-up"),
        ("up-inside", with(&[(file("a/../../evil-inside"), "x")]), "a/../../evil-inside"),
        ("hard-link", with(&[(Header::new(Kind::HardLink, "evil-link").link("../../../etc/passwd"), "")]), "evil-link"),
        ("nowhere", with(&[(Header::new(Kind::HardLink, "evil-nothing").link("not/there"), "")]), "evil-nothing"),
        ("unknown", with(&[(Header::new(Kind::Unknown, "evil-kind"), "")]), "evil-kind"),
    ];
    for (name, tar, entry) in rows {
        let layer = shop.pools.layer(&tar, Compression::Gzip).unwrap();
        let reference = shop.push(name, layer).unwrap();
        check_pull(&site, &reference, &[entry]).unwrap();
    }
}

#[test]
fn names_that_lead_elsewhere_are_contained() {
    let shop = Workshop::new().unwrap();
    let site = Site::start().unwrap();
    let mut tar = Archive::new(Vec::new());
    let name = format!("contained-{}", std::process::id());
    tar.add(&Header::new(Kind::File, format!("/tmp/{name}")), "inside").unwrap();
    tar.add(&Header::new(Kind::HardLink, "/tmp/link").link(format!("/tmp/{name}")), "").unwrap();
    tar.add(&Header::new(Kind::Symlink, "out").link("/"), "").unwrap();
    tar.add(&Header::new(Kind::File, format!("out/tmp/through-{name}")), "inside").unwrap();
    let layer = shop.pools.layer(&tar.finish().unwrap(), Compression::Gzip).unwrap();
    let diff_id = layer.diff_id.clone();
    let reference = shop.push("elsewhere", layer).unwrap();
    site.ctl().ok(&["pull", &reference]).unwrap();
    let through = format!("through-{name}");
    assert!([&name, &through].iter().all(|name| !Path::new("/tmp").join(name).exists()));
    let mount = Mount::start(MountSpec::new(&site.path().join("host"), &site.store())).unwrap();
    for path in [name.as_str(), "link", through.as_str()] {
        assert_eq!(std::fs::read_to_string(mount.layer(&diff_id).join("tmp").join(path)).unwrap(), "inside");
    }
}

#[test]
fn what_registries_do_not_have_or_mean_is_refused() {
    let shop = Workshop::new().unwrap();
    let (registry, image) = (&shop.registry, small().unwrap());
    let site = Site::start_with(&impatient()).unwrap();
    registry.push(&image, "known", "1").unwrap();
    check_pull(&site, &registry.reference("unknown", "1"), &["check the name"]).unwrap();
    check_pull(&site, &registry.reference("known", "2"), &["check the name"]).unwrap();
    let absent = format!("{}/known@{}", registry.address(), digest_of(b"absent"));
    check_pull(&site, &absent, &["check the name"]).unwrap();

    let down = format!("127.0.0.1:{}/known:1", free_port().unwrap());
    check_pull(&site, &down, &["cannot reach registry", "is it running"]).unwrap();

    let chart = "application/vnd.cncf.helm.chart.content.v1.tar+gzip";
    let layer = shop.pools.raw_layer(b"chart", chart, &digest_of(b"chart")).unwrap();
    check_pull(&site, &shop.push("chart", layer).unwrap(), &["unsupported media type", chart]).unwrap();

    for wrong in ["Upper/Case", "a:b:c d", "known@sha256:12"] {
        let output = site.ctl().run(&["pull", wrong]).unwrap();
        check_refusal(&output, "cachefsctl", &[wrong.split('@').next_back().unwrap(), "is not a valid"]).unwrap();
    }
    let output = site.ctl().run(&["pull", "--platform", "toaster", &registry.reference("known", "1")]).unwrap();
    check_refusal(&output, "cachefsctl", &["toaster", "platform"]).unwrap();
    check_nothing_published(&site).unwrap();
}

#[test]
fn documents_that_registries_get_wrong_are_refused() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let faulty = FaultyRegistry::start(&registry.address()).unwrap();
    let site = Site::start_with(&impatient()).unwrap();
    registry.push(&image, "image", "1").unwrap();
    let (reference, config) = (faulty.reference("image", "1"), Match::Blob(image.config.digest.clone()));
    let schema_1 = json!({"schemaVersion": 1, "name": "image", "tag": "1", "fsLayers": [], "history": []});
    let v1 = "application/vnd.docker.distribution.manifest.v1+prettyjws";
    let artifact = json!({"schemaVersion": 2, "mediaType": image.manifest.media_type, "layers": [],
        "config": {"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": digest_of(b"{}"), "size": 2}});
    let answer = |kind: &str, body: &str| Fault::Answer(kind.to_owned(), body.as_bytes().to_vec());
    let oci = image.manifest.media_type.as_str();
    let rows: [(Match, Fault, &[&str]); 7] = [
        (Match::Manifests, answer(v1, &schema_1.to_string()), &["unsupported media type", "schema 1"]),
        (Match::Manifests, answer(oci, &artifact.to_string()), &["unsupported media type", "helm"]),
        (Match::Manifests, answer(oci, "{\"schemaVersion\": 2"), &["manifest", "cannot be understood"]),
        (Match::Manifests, answer("text/html", "<html>log in</html>"), &["manifest", "cannot be understood"]),
        (Match::Manifests, Fault::Corrupt(40), &["manifest"]),
        (config.clone(), answer("application/json", "{}"), &["digest", &image.config.digest]),
        (config, Fault::Status(500, Vec::new()), &["500"]),
    ];
    for (matches, fault, words) in rows {
        faulty.inject(matches, fault, 99);
        check_pull(&site, &reference, words).unwrap();
        faulty.heal();
    }
    let by_digest = format!("{}/image@{}", faulty.address(), image.manifest.digest);
    faulty.inject(Match::Manifests, answer(oci, &artifact.to_string()), 99);
    check_pull(&site, &by_digest, &["has digest", &image.manifest.digest]).unwrap();
}

#[test]
fn a_blob_that_is_not_what_its_digest_says_is_refused_wherever_it_was_damaged() {
    let shop = Workshop::new().unwrap();
    let mut tar = Archive::new(Vec::new());
    tar.add(&Header::new(Kind::File, "noise"), oddities::noise(3, 300_000)).unwrap();
    let tar = tar.finish().unwrap();
    for (name, compression) in [("gzip", Compression::Gzip), ("zstd", Compression::Zstd), ("none", Compression::None)] {
        let layer = shop.pools.layer(&tar, compression).unwrap();
        let digest = layer.blob.digest.clone();
        let reference = shop.push(name, layer).unwrap();
        // Damaged in transit ...
        let faulty = FaultyRegistry::start(&shop.registry.address()).unwrap();
        let site = Site::start_with(&impatient()).unwrap();
        faulty.inject(Match::Blob(digest.clone()), Fault::Corrupt(150_000), 99);
        check_pull(&site, &faulty.reference(name, "1"), &["has digest", &digest]).unwrap();
        // ... and damaged in the registry's storage. The bytes are copied over others, so that every length stays correct.
        let file = shop.registry.blob_file(&digest);
        let mut blob = std::fs::read(&file).unwrap();
        blob.copy_within(1000..2000, 200_000);
        std::fs::write(&file, blob).unwrap();
        check_pull(&site, &reference, &["has digest", &digest]).unwrap();
    }
}

#[test]
fn the_wrong_credentials_are_refused_by_the_users_name() {
    let image = small().unwrap();
    let (user, password) = ("eve".to_owned(), "apple".to_owned());
    let accesses = [
        Access::Password { user: user.clone(), password: password.clone() },
        Access::Token { user: user.clone(), password },
    ];
    for access in accesses {
        let registry = Registry::start_with(&access, Transport::Http).unwrap();
        let reference = registry.push(&image, "private", "1").unwrap();
        let wrong = vec![(registry.address(), user.clone(), "secret-pear".to_owned())];
        for (logins, who) in [(wrong, "eve"), (Vec::new(), "anonymous")] {
            let mut site = Site::start_with(&SiteSpec { logins, ..impatient() }).unwrap();
            check_pull(&site, &reference, &["refuses", who, &registry.address()]).unwrap();
            assert!(!site.coordinator().process().log().contains("secret-pear"), "secrets are not logged");
        }
    }
    // A token is not requested over plain HTTP for a registry that was reached over TLS.
    let token = Access::Token { user: user.clone(), password: "apple".to_owned() };
    let careless = Registry::start_with(&token, Transport::Https).unwrap();
    let authorities = careless.authority().map(|authority| authority.pem().to_owned()).into_iter().collect();
    let site = Site::start_with(&SiteSpec { authorities, ..impatient() }).unwrap();
    check_pull(&site, &careless.push(&image, "private", "1").unwrap(), &["token service without TLS"]).unwrap();

    let stranger = Registry::start_with(&Access::Anonymous, Transport::Https).unwrap();
    let site = Site::start_with(&impatient()).unwrap();
    check_pull(&site, &stranger.push(&image, "private", "1").unwrap(), &["certificate", "ca_certificates"]).unwrap();
}

#[test]
fn archives_that_are_none_are_refused() {
    let (image, directory) = (small().unwrap(), tempfile::tempdir().unwrap());
    let site = Site::start_with(&impatient()).unwrap();
    let path = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
    let write = |name: &str, bytes: &[u8]| std::fs::write(path(name), bytes).unwrap();
    let docker = std::fs::read(image.docker_archive().unwrap()).unwrap();
    write("text", b"hello");
    write("empty", b"");
    write("half", &docker[..docker.len() / 2]);
    write("no-image", &tar_of("file").unwrap());
    let mut damaged = docker.clone();
    let noise = oddities::noise(9, 64);
    let at = damaged.windows(64).position(|bytes| bytes == noise).unwrap();
    damaged[at] ^= 1;
    write("damaged", &damaged);
    for name in ["absent", "text", "empty", "half", "no-image", "damaged"] {
        let output = site.ctl().run(&["load", &path(name)]).unwrap();
        let word = if name == "damaged" { "small" } else { name };
        let words: &[&str] = if ["absent", "damaged"].contains(&name) { &[word] } else { &["archive"] };
        check_refusal(&output, "cachefsctl", words).with_context(|| name.to_owned()).unwrap();
        // In the archive with one damaged layer the other layers are intact, but no image may be made of them.
        assert_eq!(site.images().unwrap(), Vec::<String>::new(), "{name}");
        let bad = hex(&image.layers[1].diff_id).to_owned();
        assert!(!site.layers().unwrap().contains(&bad), "{name}");
        wait_until("an empty staging", TIMEOUT, || Ok(site.staged()?.is_empty())).unwrap();
        let spools = std::fs::read_dir(site.path().join("state/spool")).unwrap().count();
        assert!(spools == 0 || name == "damaged", "{name} is kept, though nobody can use it");
    }
}

#[test]
fn mistakes_on_the_command_line_are_usage() {
    let absent = Ctl { server: "unix:/nonexistent/coordinator.sock".to_owned(), environment: Vec::new() };
    let output = absent.run(&["images"]).unwrap();
    check_refusal(&output, "cachefsctl", &["/nonexistent/coordinator.sock", "is cachefs-coordinator running?"])
        .unwrap();
    let rows: [(&str, &[&str]); 7] = [
        ("cachefsctl", &[]),
        ("cachefsctl", &["frobnicate"]),
        ("cachefsctl", &["pull"]),
        ("cachefsctl", &["job", "seven"]),
        ("cachefsctl", &["--server", "ftp://x", "images"]),
        ("cachefs-coordinator", &["serve", "--listen", "nowhere"]),
        ("cachefs", &["mount"]),
    ];
    for (program, arguments) in rows {
        let output = run(Command::new(binary(program).unwrap()).args(arguments)).unwrap();
        assert_eq!(output.code, 2, "{program} {arguments:?}: {}", output.stderr);
        assert!(!output.stderr.is_empty());
    }
}
