//! Tags that point to an index of several platforms in the registry, of which the store has one: how engines and tools
//! use the mirror's answer.

use std::process::Command;

use anyhow::Result;
use tests::docker::Docker;
use tests::images::{ImageBuilder, IndexFiles, MediaTypes, Pools};
use tests::process::{Output, run};
use tests::registry::Registry;
use tests::site::Site;

use super::*;

/// The tag `multi:1` in a registry, for amd64 and arm64, and a site that pulled amd64.
pub(super) struct Multi {
    // Holds the files of the images.
    _directory: TempDir,
    registry: Registry,
    pub(super) index: IndexFiles,
    pub(super) site: Site,
    address: String,
}

impl Multi {
    pub(super) fn start(settings: &str, family: MediaTypes, platforms: &[&str]) -> Result<Multi> {
        let (registry, directory, small) = (Registry::start()?, tempfile::tempdir()?, small()?);
        let pools = Pools::open(directory.path())?;
        let layer = pools.layer(&std::fs::read(&small.layers[0].tar)?, images::Compression::Gzip)?;
        let of = |platform: &&str| {
            let builder = ImageBuilder::new("multi").platform("linux", platform, "").media_types(family);
            builder.cmd(&["/bin/busybox", "true"]).layer(layer.clone()).build(&pools, &directory.path().join(platform))
        };
        let all = platforms.iter().map(of).collect::<Result<Vec<ImageFiles>>>()?;
        let index = images::index("multi", family, &all, &pools, &directory.path().join("index"))?;
        let reference = registry.push_index(&index, "multi", "1")?;
        let (site, address) = site_with(settings)?;
        site.ctl().ok(&["pull", "--platform", "linux/amd64", &reference])?;
        Ok(Multi { _directory: directory, registry, index, site, address })
    }

    fn path(&self) -> String {
        path_of(&self.registry, "multi")
    }

    /// The config of the image that the store has.
    fn config(&self) -> &str {
        &self.index.images[0].config.digest
    }

    pub(super) fn manifest(&self, name: &str, accept: &[(&str, &str)]) -> Result<Answer> {
        http::get(&self.address, &format!("/v2/{}/manifests/{name}", self.path()), accept)
    }

    /// Copies the image that skopeo selects with these options before the verb, or everything if there are none.
    fn skopeo(&self, options: &[&str]) -> Result<Output> {
        let target = tempfile::tempdir()?;
        let mut command = Command::new("skopeo");
        command.args(options).args(["copy", "--src-tls-verify=false"]);
        command.args(options.is_empty().then_some("--all"));
        command.arg(format!("docker://{}/{}:1", self.address, self.path()));
        run(command.arg(format!("dir:{}", target.path().display())))
    }
}

const FORMS: [(&str, MediaTypes); 4] = [
    ("", MediaTypes::Oci),
    ("", MediaTypes::Docker),
    ("blob_cache = '1G'\n", MediaTypes::Oci),
    ("blob_cache = '1G'\n", MediaTypes::Docker),
];

#[test]
fn an_index_names_what_the_store_has_and_nothing_else() {
    for (settings, family) in FORMS {
        let multi = Multi::start(settings, family, &["amd64", "arm64"]).unwrap();
        let index = multi.manifest("1", &[]).unwrap();
        assert_eq!(index.head.header("Content-Type"), Some(multi.index.index.media_type.as_str()), "{family:?}");
        let digest = digest_of(&index.body);
        assert_eq!(index.head.header("Docker-Content-Digest"), Some(digest.as_str()));
        check_head(&multi.address, &format!("/v2/{}/manifests/1", multi.path())).unwrap();
        let list = json(&index).unwrap();
        let entries = list["manifests"].as_array().unwrap();
        assert_eq!(entries.len(), 1, "{list}");
        assert_eq!(entries[0]["platform"], document!({"os": "linux", "architecture": "amd64"}));
        // The image that the index names can be read by its digest and has the stated length. The index itself can be read by digest too.
        let child = multi.manifest(entries[0]["digest"].as_str().unwrap(), &[]).unwrap();
        assert_eq!((child.status, entries[0]["size"].as_u64()), (200, Some(child.body.len() as u64)));
        assert_eq!(child.head.header("Content-Type"), entries[0]["mediaType"].as_str());
        assert_eq!(json(&child).unwrap()["config"]["digest"], multi.config());
        assert_eq!(multi.manifest(&digest, &[]).unwrap().body, index.body);
        // A client that does not accept an index gets the manifest, as from a registry.
        let accept = [("Accept", entries[0]["mediaType"].as_str().unwrap())];
        assert_eq!(multi.manifest("1", &accept).unwrap().body, child.body);
        // The registry's own index is served unchanged by its digest, if its image can be served as it was pushed.
        let original = multi.manifest(&multi.index.index.digest, &[]).unwrap();
        assert_eq!(original.status, if settings.is_empty() { 404 } else { 200 }, "{settings}");
        assert_eq!(
            multi.manifest(&multi.index.images[1].manifest.digest, &[]).unwrap().status,
            404,
            "the other platform"
        );
    }
}

#[test]
fn an_index_of_one_platform_is_served_as_it_was_pushed() {
    for family in [MediaTypes::Oci, MediaTypes::Docker] {
        let multi = Multi::start("blob_cache = '1G'\n", family, &["amd64"]).unwrap();
        assert_eq!(digest_of(&multi.manifest("1", &[]).unwrap().body), multi.index.index.digest);
        check_head(&multi.address, &format!("/v2/{}/manifests/1", multi.path())).unwrap();
    }
}

#[test]
fn skopeo_copies_all_that_there_is_and_says_which_platform_there_is_not() {
    for (settings, family) in FORMS {
        let multi = Multi::start(settings, family, &["amd64", "arm64"]).unwrap();
        multi.skopeo(&[]).unwrap().ok().unwrap();
        multi.skopeo(&["--override-arch=amd64"]).unwrap().ok().unwrap();
        check_fails(&multi.skopeo(&["--override-arch=arm64"]).unwrap(), &["arm64"]).unwrap();
        let listed = run(Command::new("skopeo").args([
            "list-tags",
            "--tls-verify=false",
            &format!("docker://{}/{}", multi.address, multi.path()),
        ]));
        assert!(listed.unwrap().ok().unwrap().contains("\"1\""));
        let inspected = run(Command::new("skopeo").args([
            "--override-arch=amd64",
            "inspect",
            "--tls-verify=false",
            &format!("docker://{}/{}:1", multi.address, multi.path()),
        ]));
        assert!(inspected.unwrap().ok().unwrap().contains("\"Architecture\": \"amd64\""));
    }
}

#[test]
fn engines_pull_their_platform_from_an_index_and_are_told_when_it_is_not_there() {
    let mut docker = Docker::start().unwrap();
    for (settings, family) in FORMS {
        let mut multi = Multi::start(settings, family, &["amd64", "arm64"]).unwrap();
        docker.forward(&multi.address).unwrap();
        let reference = format!("{}/{}:1", multi.address, multi.path());
        docker.ok(&["pull", &reference]).unwrap();
        let id = docker.ok(&["image", "inspect", "--format", "{{.Id}}", &reference]).unwrap();
        assert_eq!(id, multi.config(), "{settings} {family:?}");
        check_fails(&docker.run(&["pull", "--platform=linux/arm64", &reference]).unwrap(), &["no matching manifest"])
            .unwrap();
        docker.ok(&["image", "rm", "--force", &id]).unwrap();

        // containerd, while the registry behind the mirror is down.
        let pull = |multi: &Multi, more: &[&str]| {
            let containerd = Containerd::start().unwrap();
            let hosts =
                containerd.mirrors(&multi.registry.address(), &format!("http://{}", multi.address), "").unwrap();
            let reference = multi.registry.reference("multi", "1");
            let pull = ["images", "pull", "--hosts-dir", &hosts, "--snapshotter", "native"];
            containerd.ctr(&[&pull, more, &[reference.as_str()]].concat())?;
            containerd.ctr(&["content", "ls", "--quiet"])
        };
        multi.registry.stop().unwrap();
        assert!(pull(&multi, &["--platform", "linux/amd64"]).unwrap().contains(multi.config()));
        assert!(pull(&multi, &["--platform", "linux/arm64"]).is_err());
        // While the registry is up, it delivers what the mirror does not have, if the mirror has the original index.
        multi.registry.restart().unwrap();
        let all = pull(&multi, &["--all-platforms"]).unwrap();
        assert!(all.contains(multi.config()), "{all}");
        if !settings.is_empty() {
            assert!(all.contains(&multi.index.index.digest), "{all}");
            let other = pull(&multi, &["--platform", "linux/arm64"]).unwrap();
            assert!(other.contains(&multi.index.images[1].config.digest), "{other}");
        }
        multi.site.coordinator().stop().unwrap();
    }
}

#[test]
fn an_index_without_a_media_type_is_an_index() {
    let multi = Multi::start("blob_cache = '1G'\n", MediaTypes::Oci, &["amd64"]).unwrap();
    let manifest = &multi.index.images[0].manifest;
    let bare =
        document!({"schemaVersion": 2, "manifests": [{"mediaType": manifest.media_type, "digest": manifest.digest,
        "size": manifest.size, "platform": {"os": "linux", "architecture": "amd64"}}]})
        .to_string();
    let media_type = "application/vnd.oci.image.index.v1+json";
    let put = http::request(
        &multi.registry.address(),
        "PUT",
        "/v2/multi/manifests/bare",
        &[("Content-Type", media_type)],
        bare.len() as u64,
        bare.as_bytes(),
    );
    assert_eq!(put.unwrap().status, 201);
    multi.site.ctl().ok(&["pull", &multi.registry.reference("multi", "bare")]).unwrap();
    let found = multi.manifest("bare", &[]).unwrap();
    assert_eq!((found.head.header("Content-Type"), found.body), (Some(media_type), bare.into_bytes()));
}
