//! Hosts and their leases: layers in use are held, over TLS, until a host unmounts or falls silent.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use tests::cluster::{Mount, binary};
use tests::hosts::{load, status};
use tests::images::{ImageFiles, small};
use tests::process::{TIMEOUT, run, wait_until};
use tests::secured::Secured;
use tests::site::SiteSpec;

/// A site with this lease duration, the small image, and a host's token.
fn site(lease: &str) -> Result<(Secured, ImageFiles, String)> {
    let settings = format!("host_lease = '{lease}'\n");
    let secured = Secured::start(&SiteSpec { settings, ..SiteSpec::default() })?;
    let image = small()?;
    load(&secured.site, &image)?;
    let token = secured.token("node", "host", &[])?;
    Ok((secured, image, token))
}

/// The hosts as an admin sees them.
fn hosts(secured: &Secured) -> Result<Vec<Value>> {
    let list = secured.site.ctl().json(&["hosts"])?;
    Ok(list["hosts"].as_array().context("no list of hosts")?.clone())
}

fn host(secured: &Secured, name: &str) -> Result<Value> {
    Ok(hosts(secured)?.into_iter().find(|host| host["name"] == name).unwrap_or(Value::Null))
}

/// Waits until the host is in this state.
fn wait_for(secured: &Secured, name: &str, state: &str) -> Result<Value> {
    let mut last = Value::Null;
    let waited = wait_until(&format!("host {name} to be {state}"), TIMEOUT, || {
        last = host(secured, name)?;
        Ok(last["state"] == state)
    });
    waited.with_context(|| format!("the host is {last}")).map(|()| last)
}

fn layers(host: &Value) -> BTreeSet<String> {
    host["layers"].as_array().into_iter().flatten().filter_map(|layer| layer.as_str().map(str::to_owned)).collect()
}

fn diff_ids(image: &ImageFiles) -> BTreeSet<String> {
    image.layers.iter().map(|layer| layer.diff_id.clone()).collect()
}

/// The number of events of a kind about a host.
fn told(secured: &Secured, kind: &str, name: &str) -> Result<usize> {
    let list = secured.site.ctl().json(&["events", "--since", "0", "-n", "1000"])?;
    let events = list["events"].as_array().context("no list of events")?;
    Ok(events.iter().filter(|event| event["kind"] == kind && event["subject"] == name).count())
}

/// Reads the whole image through the mount.
fn read(mount: &Mount, image: &ImageFiles) -> Result<()> {
    let chain = image.chain_ids().pop().context("no chain")?;
    run(Command::new("find").arg(mount.chain(&chain)).args(["-type", "f", "-exec", "cat", "{}", "+"]))?.ok().map(drop)
}

/// Reads the image repeatedly until its layers are held, because the kernel may drop unused inodes at any time.
fn read_until_held(secured: &Secured, mount: &Mount, image: &ImageFiles) -> Result<()> {
    wait_until("the layers to be held", TIMEOUT, || {
        read(mount, image)?;
        Ok(layers(&host(secured, "one")?) == diff_ids(image))
    })
}

#[test]
fn a_host_holds_what_it_uses_until_it_unmounts() {
    let (secured, image, token) = site("15m").unwrap();
    let spec = secured.host("one", &token).unwrap();
    let mut mount = Mount::start(spec.clone()).unwrap();
    let fresh = wait_for(&secured, "one", "live").unwrap();
    assert_eq!((layers(&fresh), &fresh["caller"]), (BTreeSet::new(), &Value::from("token node")));
    // The lease is long, so this renewal can only be caused by the new use of layers.
    read_until_held(&secured, &mount, &image).unwrap();
    let shown = host(&secured, "one").unwrap();
    assert_eq!(shown["images"], Value::from(vec![secured.site.images().unwrap().remove(0)]));
    assert!(shown["cache_limit"].as_u64() > shown["cache_used"].as_u64(), "{shown}");
    let text = secured.site.ctl().ok(&["hosts"]).unwrap();
    for word in ["NAME", "HIT RATIO", "one", "small", "live", env!("CARGO_PKG_VERSION")] {
        assert!(text.contains(word), "no {word} in {text}");
    }
    assert!(status(&spec).unwrap()["lease_renewed_seconds_ago"].is_u64());
    mount.stop().unwrap();
    let gone = wait_for(&secured, "one", "unmounted").unwrap();
    assert_eq!(layers(&gone), BTreeSet::new());
    mount.restart().unwrap();
    wait_for(&secured, "one", "live").unwrap();
    assert_eq!(hosts(&secured).unwrap().len(), 1, "it is the same host");
    assert_eq!(told(&secured, "host.registered", "one").unwrap(), 2);
    assert_eq!(told(&secured, "host.unmounted", "one").unwrap(), 1);
}

#[test]
fn a_silent_host_expires_once_and_comes_back() {
    let (secured, image, token) = site("3s").unwrap();
    let mut mount = Mount::start(secured.host("one", &token).unwrap()).unwrap();
    read_until_held(&secured, &mount, &image).unwrap();
    mount.kill9().unwrap();
    wait_for(&secured, "one", "expired").unwrap();
    assert_eq!(told(&secured, "host.expired", "one").unwrap(), 1);
    mount.restart().unwrap();
    wait_for(&secured, "one", "live").unwrap();
    assert_eq!((told(&secured, "host.expired", "one").unwrap(), hosts(&secured).unwrap().len()), (1, 1));
}

#[test]
fn what_the_kernel_forgets_is_let_go_of() {
    let (secured, image, token) = site("3s").unwrap();
    let mount = Mount::start(secured.host("one", &token).unwrap()).unwrap();
    read_until_held(&secured, &mount, &image).unwrap();
    wait_until("the layers to be let go of", TIMEOUT, || {
        mount.forget()?;
        Ok(layers(&host(&secured, "one")?).is_empty())
    })
    .unwrap();
    let file = std::fs::File::open(mount.chain(&image.chain_ids().pop().unwrap())).unwrap();
    let top = BTreeSet::from([image.layers.last().unwrap().diff_id.clone()]);
    wait_until("what is open to be held", TIMEOUT, || {
        mount.forget()?;
        Ok(layers(&host(&secured, "one")?).is_superset(&top))
    })
    .unwrap();
    for _ in 0..3 {
        mount.forget().unwrap();
        let seen = host(&secured, "one").unwrap()["last_seen_at"].clone();
        wait_until("a renewal", TIMEOUT, || Ok(host(&secured, "one")?["last_seen_at"] != seen)).unwrap();
        assert!(layers(&host(&secured, "one").unwrap()).is_superset(&top));
    }
    drop(file);
}

#[test]
fn without_the_coordinator_hosts_read_on_and_come_back_to_it() {
    let (mut secured, image, token) = site("3s").unwrap();
    let spec = secured.host("one", &token).unwrap();
    let mut mount = Mount::start(spec.clone()).unwrap();
    wait_for(&secured, "one", "live").unwrap();
    secured.site.coordinator().kill9().unwrap();
    read(&mount, &image).unwrap();
    wait_until("the daemon to say so", TIMEOUT, || Ok(status(&spec)?["lease_error"].is_string())).unwrap();
    secured.site.coordinator().restart().unwrap();
    read_until_held(&secured, &mount, &image).unwrap();
    wait_until("the error to go", TIMEOUT, || Ok(status(&spec)?["lease_error"].is_null())).unwrap();
    // Without a coordinator, an unmount must not take longer than usual.
    secured.site.coordinator().kill9().unwrap();
    assert!(mount.process().terminate(Duration::from_secs(20)).unwrap().success());
}

#[test]
fn a_revoked_host_reads_on_and_says_why_it_holds_nothing() {
    let (secured, image, token) = site("3s").unwrap();
    let spec = secured.host("one", &token).unwrap();
    let mount = Mount::start(spec.clone()).unwrap();
    wait_for(&secured, "one", "live").unwrap();
    secured.site.ctl().ok(&["token", "revoke", "node"]).unwrap();
    // What the host reported with the token is dropped when the lease is over.
    wait_until("the record to go", TIMEOUT, || Ok(host(&secured, "one")?.is_null())).unwrap();
    let said = status(&spec).unwrap()["lease_error"].as_str().unwrap_or_default().to_owned();
    assert!(said.contains("the token is not known here"), "{said}");
    read(&mount, &image).unwrap();
}

#[test]
fn layers_that_a_data_root_leads_to_are_held() {
    let (secured, image, token) = site("3s").unwrap();
    let mount = Mount::start(secured.host("one", &token).unwrap()).unwrap();
    let root = secured.site.path().join("docker");
    std::fs::create_dir(&root).unwrap();
    let data_root = |arguments: &[&str], path: &Path| -> Result<String> {
        run(Command::new(binary("cachefs")?).arg("data-root").args(arguments).arg(path))?.ok()
    };
    let at = mount.path().to_string_lossy().into_owned();
    data_root(&["init", "--mount", &at], &root).unwrap();
    wait_until("the layers to be held", TIMEOUT, || {
        // Drops the inodes that the kernel knows from the creation of the links.
        mount.forget()?;
        Ok(layers(&host(&secured, "one")?) == diff_ids(&image))
    })
    .unwrap();
    secured.site.ctl().ok(&["remove", &secured.site.images().unwrap()[0]]).unwrap();
    wait_until("the daemon to know of the removal", TIMEOUT, || {
        Ok(std::fs::read_dir(mount.path().join("images"))?.count() == 0)
    })
    .unwrap();
    for _ in 0..2 {
        let seen = host(&secured, "one").unwrap()["last_seen_at"].clone();
        wait_until("a renewal", TIMEOUT, || Ok(host(&secured, "one")?["last_seen_at"] != seen)).unwrap();
        assert_eq!(layers(&host(&secured, "one").unwrap()), diff_ids(&image), "dockerd may still start it");
    }
    data_root(&["sync"], &root).unwrap();
    wait_until("the layers to be let go of", TIMEOUT, || {
        mount.forget()?;
        Ok(layers(&host(&secured, "one")?).is_empty())
    })
    .unwrap();
}
