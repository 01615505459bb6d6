//! The coordinator's side of learned prefetching: traces arrive over HTTP, profiles and startup packs result.
//!
//! The traces are made by hand from the indexes in the store. What hosts record is tested elsewhere.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use store::Digest;
use store::blocks::Blocks;
use store::image::ImageRecord;
use store::layer::{InodeIndex, LayerIndex, ROOT};
use store::profile::{PieceKey, StartupTable};
use store::reader::Store;
use store::trace::{AccessTrace, Touch};
use tests::cluster::Coordinator;
use tests::http::Answer;
use tests::images::{image, small};
use tests::process::{TIMEOUT, wait_until};
use tests::registry::{Registry, free_port};
use tests::site::{Site, SiteSpec, coordinator_spec};

use traces::{TRACES, post};

#[path = "profiles/traces.rs"]
mod traces;

/// A site that also listens on TCP and has pulled one image.
struct Traced {
    site: Site,
    address: String,
    reference: String,
    store: Store,
    image: ImageRecord,
}

impl Traced {
    fn start(name: &str) -> Result<Traced> {
        let address = format!("127.0.0.1:{}", free_port()?);
        let spec = SiteSpec { listen: Some(address.clone()), ..SiteSpec::default() };
        let (registry, site) = (Registry::start()?, Site::start_with(&spec)?);
        let files = if name == "small" { small()? } else { image(name)? };
        let reference = registry.push(&files, name, "v1")?;
        site.ctl().ok(&["pull", &reference])?;
        let store = Store::open(&site.store())?;
        let image = store.catalogue()?.images().next().context("no image")?.as_ref().clone();
        Ok(Traced { site, address, reference, store, image })
    }

    fn chain(&self) -> Digest {
        self.image.top_chain().expect("every test image has layers")
    }

    fn index(&self, layer: u16) -> Result<LayerIndex> {
        Ok(self.store.index(&self.image.layers[usize::from(layer)].diff_id)?)
    }

    fn some_touches(&self, step: usize) -> Result<Vec<Touch>> {
        traces::touches(&self.store, &self.image, step)
    }

    fn trace(&self, host: &str, touches: Vec<Touch>) -> AccessTrace {
        traces::trace(&self.image, host, touches)
    }

    fn send(&self, trace: &AccessTrace) -> Result<Value> {
        let answer = post(&self.address, &trace.encode()?)?;
        let body = String::from_utf8_lossy(&answer.body);
        ensure!(answer.status == 200, "{}: {body}", answer.status);
        Ok(serde_json::from_str(&body)?)
    }

    fn profile(&self) -> Result<Value> {
        self.site.ctl().json(&["profile", "--files", "100000", &self.reference])
    }

    /// Waits until the startup pack is published.
    fn wait_for_pack(&self) -> Result<Value> {
        let mut profile = Value::Null;
        wait_until("a startup pack", Duration::from_secs(300), || {
            profile = self.profile()?;
            Ok(!profile["pack"].is_null())
        })?;
        Ok(profile)
    }

    /// The published table, after each of its pieces has been compared with the digest in its layer's index.
    fn checked_table(&self) -> Result<StartupTable> {
        let catalogue = self.store.catalogue()?;
        let record = catalogue.startup(&self.chain()).context("no startup pack in the catalogue")?;
        let path = self.store.layout().pack(&record.pack);
        ensure!(std::fs::metadata(&path)?.len() == record.pack_len, "the pack has another length");
        store::pack::verify(&path, &record.pack)?;
        let table = self.store.startup_table(record)?;
        let layers = self.image.diff_ids();
        let front = self.store.startup_front(record, &layers)?;
        ensure!(front.table == table && front.indexes.len() == layers.len(), "the pack has all indexes");
        for (position, sealed) in &front.indexes {
            let mut raw = Vec::new();
            sealed.unpack_into(&mut raw)??;
            ensure!(raw == self.store.raw_index(&layers[usize::from(*position)])?, "index {position} is another one");
        }
        let mut end = record.content_offset();
        for chunk in &table.chunks {
            ensure!(chunk.offset == end, "chunks lie back to back");
            end += u64::from(chunk.stored_len);
        }
        let chunks = table.chunks.iter().map(|chunk| self.store.read_chunk(chunk)).collect::<Result<Vec<_>, _>>()?;
        let mut content = 0;
        let indexes = (0..self.image.layers.len() as u16).map(|n| self.index(n)).collect::<Result<Vec<_>>>()?;
        for piece in &table.pieces {
            let index = &indexes[usize::from(piece.key.layer)];
            let expected = index.piece(&index.inode(piece.key.inode)?, piece.key.piece)?;
            let place = piece.place.context("a pack of this size holds all that it names")?;
            let (chunk, len) = (&chunks[place.chunk as usize], piece.blocks.packed_len(expected.len));
            let packed = chunk.piece(place.start, len).context("outside its chunk")?;
            ensure!(piece.blocks.verify(packed, expected.len, &expected.digest), "{piece:?} holds other bytes");
            content += u64::from(piece.blocks.content_len(expected.len));
        }
        ensure!(
            content == record.content_bytes,
            "{content} bytes of content, the record says {}",
            record.content_bytes
        );
        Ok(table)
    }
}

/// Checks the status and code of a refusal, and that its one sentence contains these words.
fn check_refused(answer: &Answer, status: u16, code: &str, words: &str) -> Result<()> {
    let body: Value = serde_json::from_slice(&answer.body)?;
    let message = body["error"]["message"].as_str().unwrap_or_default();
    ensure!(answer.status == status && body["error"]["code"] == code, "{}: {body}", answer.status);
    ensure!(message.contains(words) && !message.contains('\n'), "{message}");
    Ok(())
}

/// All paths of a layer that lead to files, by inode. A file with hard links has several.
fn paths(index: &LayerIndex) -> Result<BTreeMap<u32, Vec<String>>> {
    fn walk(index: &LayerIndex, at: InodeIndex, prefix: &Path, found: &mut BTreeMap<u32, Vec<String>>) -> Result<()> {
        for entry in index.entries(&index.inode(at)?, 0) {
            let entry = entry?;
            let path = prefix.join(String::from_utf8_lossy(&entry.name).as_ref());
            if index.inode(entry.inode)?.is_dir() {
                walk(index, entry.inode, &path, found)?
            } else {
                found.entry(entry.inode.0).or_default().push(path.display().to_string())
            }
        }
        Ok(())
    }
    let mut found = BTreeMap::new();
    walk(index, ROOT, Path::new(""), &mut found)?;
    Ok(found)
}

#[test]
fn traces_become_a_startup_pack_whose_every_piece_is_right() {
    let traced = Traced::start("python3").unwrap();
    let untraced = traced.site.ctl().ok(&["profile", &traced.reference]).unwrap();
    assert_eq!(untraced.lines().count(), 1, "{untraced}");
    assert!(untraced.starts_with("No start of ") && untraced.contains(&traced.reference), "{untraced}");

    let touches = traced.some_touches(7).unwrap();
    assert!(touches.len() > 200, "{} touches", touches.len());
    let trace = traced.trace("one", touches.clone());
    assert_eq!(traced.send(&trace).unwrap()["starts"], 1);
    let profile = traced.wait_for_pack().unwrap();
    let table = traced.checked_table().unwrap();
    assert_eq!(table.pieces.len(), touches.len());
    assert!(
        table.chunks.iter().rev().skip(1).all(|chunk| chunk.raw_len >= 256 * 1024),
        "all chunks but the last are full"
    );
    // The pieces are in the order of the first touches, except those that share their bytes with an earlier one.
    let key = |touch: &Touch| PieceKey { layer: touch.layer, inode: touch.inode, piece: touch.piece };
    let mut order: Vec<_> = touches.iter().map(key).collect();
    let mut seen = std::collections::HashSet::new();
    let shares: Vec<_> = table.pieces.iter().filter(|piece| !seen.insert(piece.place)).map(|piece| piece.key).collect();
    let mut packed: Vec<_> = table.pieces.iter().map(|piece| piece.key).collect();
    order.retain(|key| !shares.contains(key));
    packed.retain(|key| !shares.contains(key));
    assert_eq!(packed, order);

    let number = |name: &str| profile[name].as_u64().unwrap_or_default();
    assert_eq!((number("starts"), number("pieces")), (1, touches.len() as u64));
    assert!(number("pack_bytes") < number("content_bytes"), "{profile}");
    let files = profile["files"].as_array().unwrap();
    assert_eq!(files.len() as u64, number("files_total"));
    assert_eq!(files.iter().map(|file| file["bytes"].as_u64().unwrap()).sum::<u64>(), number("content_bytes"));
    let indexes: Vec<_> =
        (0..traced.image.layers.len() as u16).map(|n| paths(&traced.index(n).unwrap()).unwrap()).collect();
    let first = &table.pieces[0];
    assert!(
        indexes[usize::from(first.key.layer)][&first.key.inode.0].iter().any(|path| files[0]["path"] == path.as_str())
    );
    for file in files {
        let layer = &indexes[file["layer"].as_u64().unwrap() as usize];
        assert!(layer.values().flatten().any(|path| file["path"] == path.as_str()), "{file}");
        assert_eq!(file["weight"], 1.0);
    }

    assert_eq!(traced.send(&trace).unwrap()["starts"], 1, "the same trace again is no other start");
    assert_eq!(traced.send(&traced.trace("two", touches)).unwrap()["starts"], 2);
    let text = traced.site.ctl().ok(&["profile", "--files", "3", &traced.reference]).unwrap();
    assert!(text.contains("Startup pack: ") && text.contains("WEIGHT"), "{text}");
    assert_eq!(text.split("FILE\n").nth(1).unwrap().lines().count(), 3, "{text}");
}

#[test]
fn removing_the_last_image_of_a_chain_drops_its_startup_pack() {
    let traced = Traced::start("small").unwrap();
    traced.send(&traced.trace("h", traced.some_touches(1).unwrap())).unwrap();
    traced.wait_for_pack().unwrap();
    traced.checked_table().unwrap();
    traced.site.ctl().ok(&["remove", &traced.reference]).unwrap();
    assert_eq!(traced.store.catalogue().unwrap().startups().count(), 0);
    let gone = traced.site.ctl().run(&["profile", &traced.reference]).unwrap();
    assert_eq!(gone.code, 1);
    assert!(gone.stderr.contains("is not in the store"), "{}", gone.stderr);
    let trace = traced.trace("h", Vec::new()).encode().unwrap();
    check_refused(&post(&traced.address, &trace).unwrap(), 404, "not_found", "no image of the store has the chain")
        .unwrap();
}

#[test]
fn what_is_no_trace_of_an_image_here_is_refused_in_a_sentence() {
    let traced = Traced::start("small").unwrap();
    let good = traced.trace("h", traced.some_touches(1).unwrap());
    let top = good.layers.len() as u16 - 1;
    let refused = |bytes: &[u8], status, code, words: &str| {
        check_refused(&post(&traced.address, bytes).unwrap(), status, code, words).unwrap();
    };
    let mut foreign = good.clone();
    foreign.layers = vec![Digest::of(b"foreign")];
    foreign.chain = foreign.layers[0];
    foreign.touches.clear();
    refused(&foreign.encode().unwrap(), 404, "not_found", "no image of the store has the chain sha256:");
    let encoded = good.encode().unwrap();
    let text = String::from_utf8(encoded.clone()).unwrap();
    let wrong = text.replacen(&good.layers[0].to_string(), &Digest::of(b"other").to_string(), 1);
    refused(wrong.as_bytes(), 400, "invalid_request", "its layers do not make up its chain");
    for (inode, piece) in [(u32::MAX, 0), (0, 0), (good.touches[0].inode.0, 1_000_000)] {
        let mut bad = good.clone();
        bad.touches.push(Touch { layer: top, inode: InodeIndex(inode), piece, blocks: Blocks::ALL, at_ms: 0 });
        refused(
            &bad.encode().unwrap(),
            400,
            "invalid_request",
            &format!("piece {piece} of inode {inode} of layer sha256:"),
        );
    }
    refused(b"", 400, "invalid_request", "its first line is not cachefs-trace 1");
    refused(&encoded[..encoded.len() - 1], 400, "invalid_request", "an access trace is damaged");
    refused(&vec![b' '; AccessTrace::ENCODED_MAX + 1], 413, "too_large", "a trace is at most");
    let profile = traced.profile().unwrap();
    assert_eq!((&profile["starts"], &profile["pack"]), (&Value::from(0), &Value::Null), "nothing was merged");
    assert_eq!(traced.send(&good).unwrap()["starts"], 1, "and the coordinator goes on");
}

#[test]
fn a_crowded_coordinator_says_when_to_come_again() {
    let traced = Traced::start("small").unwrap();
    let mut waiting = Vec::new();
    wait_until("a refusal for want of places", TIMEOUT, || {
        // Each connection takes a place and never sends its body.
        let mut stream = TcpStream::connect(&traced.address)?;
        stream
            .write_all(format!("POST {TRACES} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n").as_bytes())?;
        waiting.push(stream);
        let answer = post(&traced.address, b"")?;
        if answer.status == 429 {
            check_refused(&answer, 429, "busy", "send this one again")?;
            ensure!(answer.head.header("Retry-After").is_some_and(|seconds| seconds.parse::<u32>().is_ok()), "no time");
        }
        Ok(answer.status == 429)
    })
    .unwrap();
    assert!(traced.site.images().is_ok(), "others are served meanwhile");
    drop(waiting);
    let trace = traced.trace("h", traced.some_touches(1).unwrap());
    wait_until("a free place", TIMEOUT, || Ok(traced.send(&trace).is_ok())).unwrap();
    traced.wait_for_pack().unwrap();
    traced.checked_table().unwrap();
}

#[test]
fn a_standby_takes_no_traces_and_shows_what_is_published() {
    let traced = Traced::start("small").unwrap();
    let trace = traced.trace("h", traced.some_touches(1).unwrap());
    let address = format!("127.0.0.1:{}", free_port().unwrap());
    let spec = SiteSpec { listen: Some(address.clone()), ..SiteSpec::default() };
    let second = Coordinator::start(coordinator_spec(traced.site.path(), "second", &spec).unwrap()).unwrap();
    check_refused(&post(&address, &trace.encode().unwrap()).unwrap(), 503, "standby", "stands by").unwrap();
    traced.send(&trace).unwrap();
    let leaders = traced.wait_for_pack().unwrap();
    let standbys = second.ctl().json(&["profile", "--files", "100000", &traced.reference]).unwrap();
    assert_eq!(standbys, leaders);
}

#[test]
fn killed_while_it_makes_a_pack_it_makes_it_later() {
    let mut traced = Traced::start("python3").unwrap();
    let touches = traced.some_touches(1).unwrap();
    traced.send(&traced.trace("one", touches.clone())).unwrap();
    wait_until("a startup pack in staging", TIMEOUT, || Ok(!traced.site.staged()?.is_empty())).unwrap();
    traced.site.coordinator().kill9().unwrap();
    assert_eq!(traced.store.catalogue().unwrap().startups().count(), 0, "it was killed too late for this test");
    traced.site.coordinator().restart().unwrap();
    assert_eq!(traced.site.images().unwrap().len(), 1);
    traced.send(&traced.trace("two", touches.clone())).unwrap();
    let profile = traced.wait_for_pack().unwrap();
    assert_eq!(profile["starts"], 2, "what was learned before the kill is not lost");
    assert_eq!(traced.checked_table().unwrap().pieces.len(), touches.len());
    wait_until("an empty staging", TIMEOUT, || Ok(traced.site.staged()?.is_empty())).unwrap();
}
