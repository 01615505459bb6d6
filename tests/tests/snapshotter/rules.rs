//! containerd's own overlay snapshotter and ours, asked the same through the same containerd.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::Result;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use snapshotter::wire::snapshots_client::SnapshotsClient;
use snapshotter::wire::{
    CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
    StatSnapshotRequest, UpdateSnapshotRequest, ViewSnapshotRequest,
};
use tests::containerd::{Containerd, Snapshotter};
use tests::site::Site;
use tests::{cri, hosts};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// Keeps containerd's garbage collection away from what a test makes.
const ROOT_LABEL: &str = "containerd.io/gc.root";
/// Names of snapshots and of keys.
const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

#[derive(Debug, Clone)]
enum Step {
    Prepare(usize, Option<usize>),
    View(usize, Option<usize>),
    Commit(usize, usize),
    Remove(usize),
    Mounts(usize),
    Stat(usize),
    Update(usize, BTreeMap<String, String>, Vec<String>),
    List(Vec<String>),
}

fn name() -> impl Strategy<Value = usize> {
    0..NAMES.len()
}

fn label() -> impl Strategy<Value = String> {
    proptest::sample::select(vec!["l1", "l2", "with.stop", "q\"uote"]).prop_map(str::to_owned)
}

fn pick(values: &'static [&'static str]) -> proptest::sample::Select<&'static str> {
    proptest::sample::select(values)
}

/// Filters, most of them right, of these fields.
fn filter(fields: &'static [&'static str]) -> impl Strategy<Value = String> {
    const OPERATORS: &[&str] = &["=", "=!", " == ", "==="];
    const VALUES: &[&str] = &[
        "",
        "x y",
        "\u{e9}",
        "\"",
        "\"\\q\"",
        "(",
        "/(/",
        "/v1/",
        "v1.v2",
        "v1,",
        "'v1'",
        "\"v1\"x",
        "\"\\x76\\061\"",
        "\"\\u0076\\U00000031\"",
    ];
    let operator = prop_oneof![4 => pick(&["==", "!=", "~=", ""]), 1 => pick(OPERATORS)];
    let value = prop_oneof![
        2 => pick(&["a", "\"a\"", "committed", "active", "v1", "\"v2\"", "\"\""]),
        1 => pick(&["/^[ab]/", "|c|", "/v[12]$/", "v", "\"v2|a\""]),
        1 => pick(VALUES),
    ];
    let selector = (pick(fields), operator, value).prop_map(|(field, operator, value)| match operator {
        "" => field.to_owned(),
        _ => format!("{field}{operator}{value}"),
    });
    proptest::collection::vec(selector, 0..3).prop_map(|selectors| selectors.join(","))
}

/// All fields that a client of containerd knows.
const FIELDS: &[&str] =
    &["name", "parent", "kind", "labels", "labels.l1", "labels.\"with.stop\"", "labels.\"q\\\"uote\"", "x", "l.", ""];

fn step() -> impl Strategy<Value = Step> {
    let labels = || {
        proptest::collection::btree_map(
            label(),
            proptest::sample::select(vec!["v1", "v2", ""]).prop_map(str::to_owned),
            0..3,
        )
    };
    let paths = proptest::collection::vec(
        prop_oneof![
            label().prop_map(|label| format!("labels.{label}")),
            Just("labels".to_owned()),
            Just("parent".to_owned()),
        ],
        0..3,
    );
    prop_oneof![
        3 => (name(), proptest::option::of(name())).prop_map(|(key, parent)| Step::Prepare(key, parent)),
        1 => (name(), proptest::option::of(name())).prop_map(|(key, parent)| Step::View(key, parent)),
        3 => (name(), name()).prop_map(|(to, key)| Step::Commit(to, key)),
        1 => name().prop_map(Step::Remove),
        1 => name().prop_map(Step::Mounts),
        1 => name().prop_map(Step::Stat),
        2 => (name(), labels(), paths).prop_map(|(key, labels, paths)| Step::Update(key, labels, paths)),
        2 => proptest::collection::vec(filter(FIELDS), 0..3).prop_map(Step::List),
    ]
}

/// One of containerd's snapshotters.
struct Asked {
    client: SnapshotsClient<Channel>,
    snapshotter: &'static str,
}

/// What is compared of an answer: everything but times, sources and paths.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Mounts(Vec<(String, Vec<String>)>),
    Infos(Vec<(String, String, i32, BTreeMap<String, String>)>),
    Done,
    Refused(Code),
}

fn mounts(mounts: Vec<snapshotter::wire::Mount>) -> Answer {
    let shown = |mount: snapshotter::wire::Mount| {
        // Of an option with paths, their number.
        let option = |option: String| match option.split_once('=') {
            Some((name, paths)) if paths.starts_with('/') => format!("{name}={}", paths.split(':').count()),
            _ => option,
        };
        // containerd 1.6 and 2.0 differ in their order.
        let mut options: Vec<String> = mount.options.into_iter().map(option).collect();
        options.sort();
        (mount.r#type, options)
    };
    Answer::Mounts(mounts.into_iter().map(shown).collect())
}

fn infos(infos: Vec<Info>) -> Answer {
    let shown = |info: Info| {
        let labels = info.labels.into_iter().filter(|(name, _)| name != ROOT_LABEL).collect();
        (info.name, info.parent, info.kind, labels)
    };
    let mut infos: Vec<_> = infos.into_iter().map(shown).collect();
    infos.sort();
    Answer::Infos(infos)
}

impl Asked {
    async fn answer(&mut self, step: &Step) -> Answer {
        self.ask(step).await.unwrap_or_else(|status| Answer::Refused(status.code()))
    }

    async fn ask(&mut self, step: &Step) -> Result<Answer, Status> {
        let snapshotter = self.snapshotter.to_owned();
        let name = |number: &usize| NAMES[*number].to_owned();
        let parent = |parent: &Option<usize>| parent.as_ref().map(name).unwrap_or_default();
        let labels = HashMap::from([(ROOT_LABEL.to_owned(), "yes".to_owned())]);
        Ok(match step {
            Step::Prepare(key, above) => {
                let message = PrepareSnapshotRequest { snapshotter, key: name(key), parent: parent(above), labels };
                mounts(self.client.prepare(in_namespace(message)).await?.into_inner().mounts)
            }
            Step::View(key, above) => {
                let message = ViewSnapshotRequest { snapshotter, key: name(key), parent: parent(above), labels };
                mounts(self.client.view(in_namespace(message)).await?.into_inner().mounts)
            }
            Step::Commit(to, key) => {
                let message = CommitSnapshotRequest { snapshotter, name: name(to), key: name(key), labels };
                self.client.commit(in_namespace(message)).await?;
                Answer::Done
            }
            Step::Remove(key) => {
                let message = RemoveSnapshotRequest { snapshotter, key: name(key) };
                self.client.remove(in_namespace(message)).await?;
                Answer::Done
            }
            Step::Mounts(key) => {
                let message = MountsRequest { snapshotter, key: name(key) };
                mounts(self.client.mounts(in_namespace(message)).await?.into_inner().mounts)
            }
            Step::Stat(key) => {
                let message = StatSnapshotRequest { snapshotter, key: name(key) };
                infos(self.client.stat(in_namespace(message)).await?.into_inner().info.into_iter().collect())
            }
            Step::Update(key, changed, paths) => {
                let mut labels: HashMap<String, String> = changed.clone().into_iter().collect();
                labels.insert(ROOT_LABEL.to_owned(), "yes".to_owned());
                let info = Info { name: name(key), labels, ..Info::default() };
                let update_mask = Some(prost_types::FieldMask { paths: paths.clone() });
                let message = UpdateSnapshotRequest { snapshotter, info: Some(info), update_mask };
                infos(self.client.update(in_namespace(message)).await?.into_inner().info.into_iter().collect())
            }
            Step::List(filters) => {
                let message = ListSnapshotsRequest { snapshotter, filters: filters.clone() };
                let mut stream = self.client.list(in_namespace(message)).await?.into_inner();
                let mut found = Vec::new();
                while let Some(some) = stream.message().await? {
                    found.extend(some.info);
                }
                infos(found)
            }
        })
    }
}

fn in_namespace<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", tonic::metadata::MetadataValue::from_static("k8s.io"));
    request
}

async fn ask_both(socket: &Path, steps: &[Step]) -> Result<()> {
    let channel = cri::connect(socket).await?;
    let asked = |snapshotter| Asked { client: SnapshotsClient::new(channel.clone()), snapshotter };
    let (mut theirs, mut ours) = (asked("overlayfs"), asked("cachefs"));
    for (number, step) in steps.iter().enumerate() {
        let (expected, answer) = (theirs.answer(step).await, ours.answer(step).await);
        assert_eq!(answer, expected, "step {number} of {:#?}", &steps[..=number]);
    }
    Ok(())
}

/// Fields that containerd hands on to a snapshotter as they are.
const HANDED_ON: &[&str] = &[
    "kind",
    "labels",
    "labels.\"containerd.io/snapshot/l1\"",
    "labels.\"containerd.io/snapshot/q\\\"uote\"",
    "x",
    "\"kind\"",
    "k.ind",
];

/// What a listing finds, without names: containerd gives snapshotters names of its own. `None` if the filter is refused.
async fn found(client: &mut SnapshotsClient<Channel>, snapshotter: &str, filter: &str) -> Option<Vec<String>> {
    let message = ListSnapshotsRequest { snapshotter: snapshotter.to_owned(), filters: vec![filter.to_owned()] };
    let mut stream = client.list(in_namespace(message)).await.ok()?.into_inner();
    let mut found = Vec::new();
    while let Some(some) = stream.message().await.ok()? {
        let shown = |info: Info| {
            let labels: BTreeMap<_, _> = info.labels.into_iter().filter(|(name, _)| name != ROOT_LABEL).collect();
            format!("{} {labels:?}", info.kind)
        };
        found.extend(some.info.into_iter().map(shown));
    }
    found.sort();
    Some(found)
}

/// Ours is asked directly: containerd reads its clients' filters itself.
#[test]
fn filters_mean_what_they_mean_to_containerd() {
    let site = Site::start().unwrap();
    let mount = hosts::mount(&site, "one").unwrap();
    let snapshotter = Snapshotter::start(&site.path().join("host-one"), mount.path()).unwrap();
    let containerd = Containerd::start(&snapshotter, "none").unwrap();
    let mut runner = TestRunner::default();
    let filters = proptest::collection::vec(filter(HANDED_ON), 2000).new_tree(&mut runner).unwrap().current();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut theirs = SnapshotsClient::new(cri::connect(&containerd.socket()).await.unwrap());
        let mut ours = SnapshotsClient::new(cri::connect(snapshotter.socket()).await.unwrap());
        for snapshotter in ["overlayfs", "cachefs"] {
            for (key, values) in
                [("a", vec![]), ("b", vec![("l1", "v1")]), ("c", vec![("l1", "v2"), ("q\"uote", "v1")])]
            {
                let mut labels = HashMap::from([(ROOT_LABEL.to_owned(), "yes".to_owned())]);
                labels.extend(
                    values.iter().map(|(name, value)| (format!("containerd.io/snapshot/{name}"), (*value).to_owned())),
                );
                let snapshotter = snapshotter.to_owned();
                let message =
                    PrepareSnapshotRequest { snapshotter, key: key.to_owned(), parent: String::new(), labels };
                theirs.prepare(in_namespace(message)).await.unwrap();
            }
        }
        let mut matched = 0;
        for filter in filters {
            let expected = found(&mut theirs, "overlayfs", &filter).await;
            matched += usize::from(expected.as_ref().is_some_and(|found| (1..3).contains(&found.len())));
            assert_eq!(found(&mut ours, "", &filter).await, expected, "{filter:?}");
        }
        assert!(matched > 50, "only {matched} filters chose some");
    });
}

/// Through containerd, whose metadata stands between: what a client of containerd sees.
#[test]
fn a_client_of_containerd_sees_no_difference() {
    let site = Site::start().unwrap();
    let mount = hosts::mount(&site, "one").unwrap();
    let snapshotter = Snapshotter::start(&site.path().join("host-one"), mount.path()).unwrap();
    let containerd = Containerd::start(&snapshotter, "none").unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut runner = TestRunner::default();
    let steps = proptest::collection::vec(step(), 600).new_tree(&mut runner).unwrap().current();
    runtime.block_on(ask_both(&containerd.socket(), &steps)).unwrap();
}
