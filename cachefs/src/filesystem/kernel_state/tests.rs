//! What one worker has told the kernel, asked of the next ones.

use std::collections::BTreeMap;
use std::io::{Read, Seek as _, SeekFrom, Write as _};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use proptest::prelude::*;
use store::layer::{S_IFDIR, S_IFMT, S_IFREG};
use tempfile::TempDir;

use super::*;
use crate::filesystem::node::{Attributes, CATALOGUE, Node};
use crate::filesystem::tests::{entries, host, image};
use crate::fixture::{Host, TestStore};
use crate::source::failure::{Failure, Result};

/// The two files, as a keeper has them.
struct Kept(File, File);

impl Kept {
    fn new() -> Kept {
        let (records, references) = files().unwrap();
        Kept(records, references)
    }

    fn open(&self) -> io::Result<Arc<KernelState>> {
        KernelState::open(self.0.try_clone()?, &self.1).map(Arc::new)
    }

    /// A worker that serves the mount next.
    fn worker(&self, store: &TestStore, cache: &TempDir) -> Host {
        host(store, cache).resuming(&self.open().unwrap())
    }

    fn text(&self) -> String {
        let (mut records, mut text) = (self.0.try_clone().unwrap(), String::new());
        records.seek(SeekFrom::Start(0)).unwrap();
        records.read_to_string(&mut text).unwrap();
        text
    }
}

/// All that a kernel can ask about a number.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Told {
    attributes: Attributes,
    listed: Vec<(Vec<u8>, u64, u32)>,
    content: Vec<u8>,
}

fn ask(host: &Host, number: u64) -> Result<Told> {
    let filesystem = &host.filesystem;
    let node = filesystem.numbers().node(number);
    let (send, receive) = channel();
    filesystem.answer(node, move |this| this.attributes(node), move |answer| send.send(answer).unwrap());
    let mut attributes = receive.recv().unwrap()?;
    if node.slot() == CATALOGUE {
        // When this worker first saw the catalogue.
        attributes.mtime = (0, 0);
    }
    assert_eq!(filesystem.numbers().of(attributes.node), number);
    let is = |kind| attributes.mode & S_IFMT == kind;
    let listed = if is(S_IFDIR) { host.list_by(node, 3)? } else { Vec::new() };
    let listed = listed.into_iter().map(|(name, node, kind)| (name, filesystem.numbers().of(node), kind));
    let content = if is(S_IFREG) { host.read(node, 0, attributes.size as usize)? } else { Vec::new() };
    Ok(Told { attributes, listed: listed.collect(), content })
}

/// Walks the whole mount as a kernel does, which learns a number for each name that it looks up.
fn walk(host: &Host, learned: &mut Vec<u64>) -> BTreeMap<u64, Told> {
    let (mut told, mut stack) = (BTreeMap::new(), vec![Node::ROOT]);
    while let Some(node) = stack.pop() {
        let number = host.filesystem.numbers().of(node);
        let seen = ask(host, number).unwrap();
        for (name, ..) in seen.listed.iter().skip(2) {
            let crate::filesystem::node::Found::Entry(attributes, _) = host.lookup(node, name).unwrap() else {
                panic!("listed, but not found")
            };
            host.filesystem.learns(attributes.node.slot(), 1);
            learned.push(host.filesystem.numbers().of(attributes.node));
            stack.push(attributes.node);
        }
        // What a number means is asked after its names were looked up: until then a layer is not open.
        told.insert(number, ask(host, number).unwrap());
    }
    told
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    /// SEMANTICS: "A number that the kernel knows means the same to the next worker."
    /// Whatever the kernel asks first, and whatever the next workers are asked before they die.
    #[test]
    fn a_number_means_the_same_to_every_worker(
        layers in proptest::collection::vec(entries(), 1..5),
        order in proptest::collection::vec(any::<prop::sample::Index>(), 1..60),
    ) {
        let (store, cache, _, _) = image(&layers);
        let kept = Kept::new();
        let first = kept.worker(&store, &cache);
        let mut learned = Vec::new();
        let told = walk(&first, &mut learned);
        let in_use = first.filesystem.in_use();
        drop(first);
        let numbers: Vec<u64> = told.keys().copied().collect();
        for part in order.chunks(20) {
            let next = kept.worker(&store, &cache);
            prop_assert_eq!(&next.filesystem.in_use(), &in_use, "before anything is asked");
            for index in part {
                let number = index.get(&numbers);
                prop_assert_eq!(&ask(&next, *number), &Ok(told[number].clone()));
            }
        }
        let last = kept.worker(&store, &cache);
        prop_assert_eq!(walk(&last, &mut learned), told);
        // What the kernel has learned of either worker it forgets.
        for number in learned {
            let node = last.filesystem.numbers().node(number);
            last.filesystem.forgets(node, 1);
        }
        prop_assert!(last.filesystem.in_use().is_empty());
    }
}

/// The content of a native tree's data file is where it was.
#[test]
fn a_data_file_has_the_same_content_in_the_next_worker() {
    let (store, cache, chain, _) = image(&crate::filesystem::native_tree::tests::contents());
    let kept = Kept::new();
    let first = kept.worker(&store, &cache);
    first.find(&chain).unwrap();
    let id = Digest::from_hex(chain.strip_prefix("chains/").unwrap()).unwrap();
    let metadata = tempfile::tempfile().unwrap();
    let tree = first.filesystem.write_native_tree(&id, &metadata, 1 << 20).unwrap();
    let read = |host: &Host, content: &Arc<_>| {
        let (send, receive) = channel();
        let done = move |bytes: Result<&[u8]>| send.send(bytes.map(<[u8]>::to_vec)).unwrap();
        host.filesystem.read_data(content, 0, 1 << 30, done);
        receive.recv().unwrap().unwrap()
    };
    let expected = read(&first, &tree.content);
    assert!(expected.len() > 1000);
    drop(first);
    let next = kept.worker(&store, &cache);
    let (send, receive) = channel();
    next.filesystem.content_of_chain(id, move |content| send.send(content).unwrap());
    let content = receive.recv_timeout(Duration::from_secs(30)).unwrap().unwrap();
    assert_eq!(content.blocks(), tree.content.blocks());
    assert!(read(&next, &content) == expected);
    next.filesystem
        .content_of_chain(Digest::of(b"another"), |content| assert_eq!(content.err(), Some(Failure::UnknownNode)));
}

#[test]
fn a_record_that_was_not_finished_is_cut_off() {
    let mut kept = Kept::new();
    let (one, two) = (Record::Block(7), Record::Trees(Way::Loops));
    kept.open().unwrap().record(&one);
    let whole = kept.text();
    for cut in 1..10 {
        kept.0.write_all(&br#"{"block":9}"#[..cut]).unwrap();
        assert_eq!(kept.open().unwrap().earlier, std::slice::from_ref(&one));
        assert_eq!(kept.text(), whole);
    }
    kept.open().unwrap().record(&two);
    assert_eq!(kept.open().unwrap().earlier, [one, two]);
}

#[test]
fn records_of_another_version_are_refused_and_left_alone() {
    for text in [
        "",
        "cachefs kernel state 2\n",
        "cachefs kernel state 1",
        "cachefs kernel state 1\n{\"block\":\"x\"}\n",
        "cachefs kernel state 1\n{\"new\":1}\n",
    ] {
        let mut kept = Kept::new();
        kept.0.set_len(0).unwrap();
        kept.0.seek(SeekFrom::Start(0)).unwrap();
        kept.0.write_all(text.as_bytes()).unwrap();
        let error = kept.open().unwrap_err().to_string();
        assert!(error.starts_with("its records "), "{text}: {error}");
        assert_eq!(kept.text(), text);
    }
}
