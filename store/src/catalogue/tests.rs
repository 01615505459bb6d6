//! Generations, references, startup packs and pins, replayed from their files.

use super::*;
use crate::chunk::Codec;
use crate::image::{LayerRecord, Platform, RequestedBy};
use crate::pack::Placed;
use crate::profile::Origin;

pub(crate) fn image(repository: &str, tag: Option<&str>, n: u8) -> Arc<ImageRecord> {
    let digest = Digest::of(&[n]);
    Arc::new(ImageRecord {
        repository: repository.into(),
        tag: tag.map(str::to_owned),
        target: digest,
        manifest: digest,
        media_type: "application/vnd.oci.image.manifest.v1+json".into(),
        config: Digest::of(&[n, n]),
        platform: Platform::host(),
        layers: vec![LayerRecord { diff_id: digest, size: 1, blob: digest, blob_size: 1, media_type: "t".into() }],
        published_at: u64::from(n),
        ordered_by: RequestedBy::Operator,
    })
}

#[test]
fn generations_replay_to_the_same_state() {
    let mut writer = Catalogue::default();
    let mut files = Vec::new();
    for n in 0..200u8 {
        let change = match n % 5 {
            4 => {
                Change::Remove { repository: "r/a".into(), tag: Some(format!("t{}", n % 7)), target: Digest::of(&[n]) }
            }
            3 => startup(image("r/a", None, n - 1).top_chain().unwrap(), u64::from(n)),
            _ => Change::Set(image("r/a", Some(&format!("t{}", n % 7)), n)),
        };
        let file = writer.next(3, vec![change]);
        files.push(file.encode().unwrap());
        writer.apply(file).unwrap();
    }
    let start = files.iter().rposition(|f| Generation::decode(f).unwrap().tags.is_some()).unwrap();
    assert_eq!(start as u64 % SNAPSHOT_EVERY, 0);
    let mut reader = Catalogue::default();
    for file in &files[start..] {
        reader.apply(Generation::decode(file).unwrap()).unwrap();
    }
    assert_eq!(reader.generation(), 200);
    assert_eq!(reader.tags().collect::<Vec<_>>(), writer.tags().collect::<Vec<_>>());
    assert_eq!(reader.startups().collect::<Vec<_>>(), writer.startups().collect::<Vec<_>>());
    assert!((1..=7).contains(&writer.startups().count()), "no more than there are images");
    for n in 0..200u8 {
        let chain = image("r/a", None, n).top_chain();
        let expected = reader.images().find(|image| image.top_chain() == chain);
        assert_eq!(reader.image_of_chain(&chain.unwrap()), expected, "{n}");
        assert_eq!(writer.image_of_chain(&chain.unwrap()), expected, "{n}");
    }
    assert!(reader.clone().apply(Generation::decode(&files[3]).unwrap()).is_err());
}

fn startup(chain: Digest, published_at: u64) -> Change {
    let digest = ContentDigest::of(&published_at.to_le_bytes());
    let table = Placed { offset: 16, stored_len: 1, raw_len: 1, codec: Codec::Plain, digest };
    let origin = Origin::default();
    let record = StartupRecord {
        chain,
        pack: digest,
        pack_len: 99,
        table,
        indexes_len: 0,
        head_len: 0,
        starts: 1,
        origin,
        content_bytes: 5,
        published_at,
    };
    Change::Startup(Arc::new(record))
}

#[test]
fn a_startup_pack_stays_as_long_as_some_image_has_its_chain() {
    let mut writer = Catalogue::default();
    let mut apply = |change: Change| -> Catalogue {
        let file = Generation::decode(&writer.next(1, vec![change]).encode().unwrap()).unwrap();
        writer.apply(file).unwrap();
        writer.clone()
    };
    let set = |tag: &str, n: u8| Change::Set(image("r/a", Some(tag), n));
    let remove = |tag: &str| {
        let target = Digest::of(&[0]);
        Change::Remove { repository: "r/a".into(), tag: Some(tag.into()), target }
    };
    let chain = image("r/a", None, 1).top_chain().unwrap();
    apply(set("one", 1));
    apply(set("two", 1));
    assert_eq!(apply(set("other", 2)).startup(&chain), None);
    assert_eq!(apply(startup(chain, 7)).startup(&chain).unwrap().published_at, 7);
    assert_eq!(apply(startup(chain, 8)).startup(&chain).unwrap().published_at, 8);
    assert!(apply(remove("one")).startup(&chain).is_some(), "two has the same layers");
    assert!(apply(set("two", 1)).startup(&chain).is_some(), "published once more");
    let image = apply(remove("other")).image_of_chain(&chain).cloned();
    assert_eq!(image.unwrap().tag.as_deref(), Some("two"));
    assert_eq!(apply(set("two", 3)).startups().count(), 0, "the tag moved away");
    apply(set("one", 1));
    apply(startup(chain, 9));
    assert_eq!(apply(remove("one")).startups().count(), 0);
}

#[test]
fn snapshots_keep_startup_packs_and_old_files_have_none() {
    let mut writer = Catalogue::default();
    let chain = image("r/a", None, 1).top_chain().unwrap();
    for change in [Change::Set(image("r/a", Some("t"), 1)), startup(chain, 7)] {
        let file = writer.next(1, vec![change]);
        writer.apply(file).unwrap();
    }
    let mut snapshots = 0;
    while writer.generation() < 2 * SNAPSHOT_EVERY + 2 {
        let file = Generation::decode(&writer.next(1, Vec::new()).encode().unwrap()).unwrap();
        snapshots += usize::from(file.tags.is_some());
        let mut reader = Catalogue::default();
        if file.tags.is_some() {
            reader.apply(file.clone()).unwrap();
            assert_eq!(reader.startup(&chain), writer.startup(&chain));
        }
        writer.apply(file).unwrap();
    }
    assert_eq!(snapshots, 2);
    let old = r#"{"generation":1,"epoch":1,"snapshot":1,"tags":[]}"#;
    assert_eq!(serde_json::from_str::<Generation>(old).unwrap().startups, []);
}

#[test]
fn references_find_images_and_history_remembers() {
    let mut catalogue = Catalogue::default();
    for change in [
        image("docker.io/library/a", Some("v1"), 1),
        image("docker.io/library/a", Some("v1"), 2),
        image("docker.io/library/a", None, 9),
    ] {
        let file = catalogue.next(1, vec![Change::Set(change)]);
        catalogue.apply(file).unwrap();
    }
    let find = |text: &str| catalogue.find(&text.parse().unwrap()).map(|s| s.image.published_at);
    assert_eq!(find("a:v1"), Some(2));
    assert_eq!(find("a"), None);
    assert_eq!(find(&format!("a@{}", Digest::of(&[9]))), Some(9));
    assert_eq!(find(&format!("a@{}", Digest::of(&[2]))), Some(2));
    // The digest decides; the tag beside it is for people.
    assert_eq!(find(&format!("a:v1@{}", Digest::of(&[9]))), Some(9));
    let state = catalogue.find(&"a:v1".parse().unwrap()).unwrap();
    assert_eq!(state.history.iter().map(|m| m.at).collect::<Vec<_>>(), [2, 1]);
}

#[test]
fn any_damage_is_refused() {
    let bytes = Catalogue::default().next(1, vec![Change::Set(image("r/a", None, 1))]).encode().unwrap();
    assert!(bytes.starts_with(b"cachefs-catalogue 1 "));
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 0x20;
        assert!(Generation::decode(&bad).is_err(), "byte {at}");
        assert!(Generation::decode(&bytes[..at]).is_err());
    }
}

#[test]
fn pins_stay_with_their_name_and_survive_snapshots() {
    let mut writer = Catalogue::default();
    let pin = |text: &str, since| Pin::of(&text.parse().unwrap(), since).unwrap();
    let first = vec![Change::Set(image("docker.io/library/a", Some("v1"), 1)), Change::Pin(pin("a:v1", 7))];
    for changes in [first, vec![Change::Pin(pin("b", 8)), Change::Collected(1)], vec![Change::Collected(2)]] {
        let file = Generation::decode(&writer.next(1, changes).encode().unwrap()).unwrap();
        writer.apply(file).unwrap();
    }
    assert!(writer.is_pinned(&image("docker.io/library/a", Some("v1"), 9)), "whatever it points to");
    assert!(!writer.is_pinned(&image("docker.io/library/a", None, 1)));
    while writer.generation() < SNAPSHOT_EVERY + 3 {
        let file = Generation::decode(&writer.next(1, Vec::new()).encode().unwrap()).unwrap();
        if file.tags.is_some() {
            let mut reader = Catalogue::default();
            reader.apply(file.clone()).unwrap();
            assert_eq!(reader.pins().collect::<Vec<_>>(), writer.pins().collect::<Vec<_>>());
            assert_eq!(reader.collected(), 2);
        }
        writer.apply(file).unwrap();
    }
    let names: Vec<_> = writer.pins().map(Pin::familiar_name).collect();
    assert_eq!(names, ["a:v1", "b:latest"]);
    let file = writer.next(1, vec![Change::Unpin(pin("a:v1", 0))]);
    writer.apply(file).unwrap();
    assert_eq!(writer.pins().map(|pin| pin.since).collect::<Vec<_>>(), [8]);
    let digest = Digest::of(b"x");
    assert!(Pin::of(&format!("a:v1@{digest}").parse().unwrap(), 0).is_err());
    assert_eq!(pin(&format!("a@{digest}"), 0).familiar_name(), format!("a@{digest}"));
}

#[test]
fn software_that_knows_no_pins_reads_the_images() {
    /// A generation's fields as they were before there were pins.
    #[derive(Deserialize)]
    struct Before {
        changes: Vec<Change>,
    }
    let mut writer = Catalogue::default();
    writer.apply(writer.next(1, Vec::new())).unwrap();
    let pin = Pin::of(&"a".parse().unwrap(), 1).unwrap();
    let set = Change::Set(image("r/a", Some("t"), 1));
    let bytes = writer.next(1, vec![Change::Pin(pin), set.clone(), Change::Collected(1)]).encode().unwrap();
    let json = &bytes[bytes.iter().position(|b| *b == b'\n').unwrap()..];
    assert_eq!(serde_json::from_slice::<Before>(json).unwrap().changes, [set]);
    let old = r#"{"generation":1,"epoch":1,"snapshot":1,"tags":[]}"#;
    let old: Generation = serde_json::from_str(old).unwrap();
    assert_eq!((old.pins, old.collected, old.keeping), (Vec::new(), 0, Vec::new()));
}

/// Older software took a registry's names for different registries. The generations below are as it wrote them.
#[test]
fn what_was_written_under_another_name_of_a_registry_is_read_under_the_one() {
    let old = |name: &str| image(name, Some("1"), 1);
    let newer = image("docker.io/library/a", Some("1"), 2);
    let find = |catalogue: &Catalogue, text: &str| catalogue.find(&text.parse().unwrap()).map(|s| s.image.published_at);
    let read = |generation: Generation| Generation::decode(&generation.encode().unwrap()).unwrap();
    for name in ["registry-1.docker.io/library/a", "index.docker.io/a"] {
        let pin = Pin { repository: name.into(), tag: Some("1".into()), target: None, since: 1 };
        let mut written = Catalogue::default();
        for change in [Change::Set(old(name)), Change::Pin(pin.clone())] {
            written.apply(written.next(1, vec![change])).unwrap();
        }
        let whole = read(written.next_whole(1, Vec::new()));
        let mut catalogue = Catalogue::default();
        catalogue.apply(whole.clone()).unwrap();
        assert_eq!(find(&catalogue, "a:1"), Some(1));
        assert_eq!(find(&catalogue, &format!("{name}:1")), Some(1));
        let found = catalogue.images().next().unwrap().clone();
        assert_eq!((found.familiar_name().as_str(), catalogue.is_pinned(&found)), ("a:1", true));
        // If one state has both names, the newer image counts, whichever comes first.
        for turned in [false, true] {
            let mut whole = whole.clone();
            let mut both = whole.tags.take().unwrap();
            both.push(TagState { image: Arc::clone(&newer), history: Vec::new() });
            if turned {
                both.reverse();
            }
            let mut catalogue = Catalogue::default();
            catalogue.apply(read(Generation { tags: Some(both), ..whole })).unwrap();
            assert_eq!((find(&catalogue, "a:1"), catalogue.images().count()), (Some(2), 1));
        }
        // A removal under the old name removes the image.
        let gone = Change::Remove { repository: name.into(), tag: Some("1".into()), target: found.target };
        let removal = Generation { changes: vec![gone], ..catalogue.next_change(1, Vec::new()) };
        catalogue.apply(read(removal)).unwrap();
        assert_eq!(catalogue.images().count(), 0);
    }
}
