//! Images that the store lacks: with pulls on demand an engine that asks for one waits while the coordinator pulls it.

use super::indexes::Multi;
use super::*;

/// A site that pulls on demand, and its address.
fn on_demand() -> Result<(Site, String)> {
    let (site, address) = site_with("")?;
    pull_on_demand(&site)?;
    Ok((site, address))
}

fn pull_on_demand(site: &Site) -> Result<()> {
    let document = site.path().join("settings.yaml");
    std::fs::write(&document, "pull_on_demand: true\n")?;
    site.ctl().ok(&["apply", &document.to_string_lossy()]).map(drop)
}

/// How many pull jobs there have been.
fn jobs(site: &Site) -> Result<usize> {
    Ok(site.ctl().json(&["jobs"])?["jobs"].as_array().context("no list of jobs")?.len())
}

#[test]
fn many_hosts_that_start_one_new_image_cause_one_fetch() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let (site, address) = on_demand().unwrap();
    registry.push(&image, "new", "1").unwrap();
    let (path, before) = (format!("{}/manifests/1", path_of(&registry, "new")), registry.accesses().len());
    let answers: Vec<Answer> = std::thread::scope(|scope| {
        let ask = || scope.spawn(|| get(&address, &path).unwrap());
        let hosts: Vec<_> = (0..30).map(|_| ask()).collect();
        hosts.into_iter().map(|host| host.join().unwrap()).collect()
    });
    for answer in &answers {
        assert_eq!((answer.status, &answer.body), (200, &answers[0].body));
    }
    assert_eq!(json(&answers[0]).unwrap()["config"]["digest"], image.config.digest);
    for layer in &image.layers {
        assert_eq!(registry.blob_fetches(&layer.blob.digest), 1);
    }
    let asked = registry.accesses().len() - before;
    assert!(asked < 15, "{asked} requests for 30 hosts");
    assert_eq!(jobs(&site).unwrap(), 1);
}

#[test]
fn what_cannot_be_pulled_is_not_found_at_once_and_the_registry_is_left_alone() {
    let registry = Registry::start().unwrap();
    registry.push(&small().unwrap(), "app", "1").unwrap();
    let (site, address) = site_with("").unwrap();
    let manifest = |tag: &str| get(&address, &format!("{}/manifests/{tag}", path_of(&registry, "app"))).unwrap();
    assert_eq!(manifest("1").status, 404, "nothing is pulled on demand unless that is configured");
    assert_eq!(jobs(&site).unwrap(), 0);
    pull_on_demand(&site).unwrap();
    assert_eq!(manifest("absent").status, 404);
    let before = registry.accesses().len();
    for _ in 0..5 {
        assert_eq!(manifest("absent").status, 404);
    }
    assert_eq!((registry.accesses().len(), jobs(&site).unwrap()), (before, 1), "a name that is not there rests");
    assert_eq!(manifest("1").status, 200);
}

#[test]
fn an_image_of_another_platform_is_no_image_that_the_store_lacks() {
    let multi = Multi::start("", images::MediaTypes::Oci, &["amd64", "arm64"]).unwrap();
    pull_on_demand(&multi.site).unwrap();
    let before = jobs(&multi.site).unwrap();
    let other = &multi.index.images[1].manifest.digest;
    assert_eq!(multi.manifest(other, &[]).unwrap().status, 404);
    assert_eq!(
        multi.manifest(&multi.index.images[0].manifest.digest, &[]).unwrap().status,
        404,
        "its layers are unpacked"
    );
    assert_eq!(jobs(&multi.site).unwrap(), before);
}

#[test]
fn a_real_containerd_waits_and_asks_the_registry_when_no_coordinator_answers() {
    let (registry, image) = (Registry::start().unwrap(), small().unwrap());
    let (mut site, address) = on_demand().unwrap();
    let reference = registry.push(&image, "new", "1").unwrap();
    let containerd = Containerd::start().unwrap();
    let hosts = containerd.mirrors(&registry.address(), &format!("http://{address}"), "").unwrap();
    let pull = |reference: &str| {
        containerd.ctr(&["images", "pull", "--hosts-dir", &hosts, "--snapshotter", "native", reference]).unwrap()
    };
    pull(&reference);
    assert_eq!(site.ctl().json(&["image", &reference]).unwrap()["config"], image.config.digest);
    for layer in &image.layers {
        assert_eq!(registry.blob_fetches(&layer.blob.digest), 1, "containerd has the layers from the mirror");
    }
    let later = registry.push(&image, "later", "1").unwrap();
    site.coordinator().kill9().unwrap();
    pull(&later);
}
