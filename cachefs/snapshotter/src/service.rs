//! The snapshots service: containerd's messages in and out of [`Snapshotter`], each on a thread that may wait.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use tokio::sync::Notify;
use tokio::task::spawn_blocking;
use tokio_stream::Iter;
use tonic::{Code, Request, Response, Status};

use crate::error::{Error, Result};
use crate::mounts;
use crate::record::{self, Labels, Record, Snapshot};
use crate::snapshotter::Snapshotter;
use crate::wire::snapshots_server::Snapshots;
use crate::wire::{
    CleanupRequest, CommitSnapshotRequest, Info, Kind, ListSnapshotsRequest, ListSnapshotsResponse, Mount,
    MountsRequest, MountsResponse, PrepareSnapshotRequest, PrepareSnapshotResponse, RemoveSnapshotRequest,
    StatSnapshotRequest, StatSnapshotResponse, UpdateSnapshotRequest, UpdateSnapshotResponse, UsageRequest,
    UsageResponse, ViewSnapshotRequest, ViewSnapshotResponse,
};

/// How many snapshots one message of a listing holds, as in containerd.
const LIST_CHUNK: usize = 100;

/// The service.
#[derive(Clone)]
pub struct Service {
    snapshotter: Arc<Snapshotter>,
    /// Told when the database takes nothing any more.
    broken: Arc<Notify>,
}

impl Service {
    /// The service of a snapshotter.
    pub fn new(snapshotter: Arc<Snapshotter>) -> Service {
        Service { snapshotter, broken: Arc::default() }
    }

    /// Told when the database takes nothing any more, as after a full disk, until it is opened again.
    pub fn broken(&self) -> Arc<Notify> {
        Arc::clone(&self.broken)
    }

    /// Runs one operation on a thread that may wait.
    async fn run<R: Send + 'static>(
        &self,
        operation: impl FnOnce(&Snapshotter) -> Result<R> + Send + 'static,
    ) -> std::result::Result<R, Status> {
        let snapshotter = Arc::clone(&self.snapshotter);
        let ended = spawn_blocking(move || operation(&snapshotter)).await;
        ended.map_err(|error| Status::internal(format!("the operation did not end: {error}")))?.map_err(|error| {
            if error.is_final() {
                self.broken.notify_one();
            }
            status(error)
        })
    }
}

/// An error as gRPC says it; the class is what containerd acts on.
fn status(error: Error) -> Status {
    let code = match &error {
        Error::NotFound(_) => Code::NotFound,
        Error::AlreadyExists(_) => Code::AlreadyExists,
        Error::InvalidArgument(_) | Error::Filter(_) => Code::InvalidArgument,
        Error::FailedPrecondition(_) | Error::Gone { .. } => Code::FailedPrecondition,
        Error::Tree { .. } => Code::Unavailable,
        Error::InUse(_) | Error::Io { .. } | Error::Metadata(_) | Error::Record { .. } => Code::Internal,
    };
    if matches!(code, Code::Unavailable | Code::Internal) {
        tracing::error!("{error}");
    }
    Status::new(code, error.to_string())
}

/// An empty name means none.
fn name(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn labels(labels: HashMap<String, String>) -> Labels {
    labels.into_iter().collect()
}

fn timestamp(time: Timestamp) -> prost_types::Timestamp {
    // Both have whole seconds towards the past; a time before 1970 does not occur.
    prost_types::Timestamp { seconds: time.as_second(), nanos: time.subsec_nanosecond() }
}

fn info(name: String, record: Record) -> Info {
    let kind = match record.kind {
        record::Kind::View => Kind::View,
        record::Kind::Active => Kind::Active,
        record::Kind::Committed => Kind::Committed,
    };
    Info {
        name,
        parent: record.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: Some(timestamp(record.created)),
        updated_at: Some(timestamp(record.updated)),
        labels: record.labels.into_iter().collect(),
    }
}

fn wire_mounts(mounts: Vec<mounts::Mount>) -> Vec<Mount> {
    let mount = |mount: mounts::Mount| Mount {
        r#type: mount.kind.to_owned(),
        source: mount.source,
        target: String::new(),
        options: mount.options,
    };
    mounts.into_iter().map(mount).collect()
}

type Answer<R> = std::result::Result<Response<R>, Status>;

#[tonic::async_trait]
impl Snapshots for Service {
    async fn prepare(&self, request: Request<PrepareSnapshotRequest>) -> Answer<PrepareSnapshotResponse> {
        let PrepareSnapshotRequest { key, parent, labels: wanted, .. } = request.into_inner();
        let made =
            self.run(move |snapshotter| snapshotter.prepare(&key, name(parent).as_deref(), labels(wanted))).await?;
        Ok(Response::new(PrepareSnapshotResponse { mounts: wire_mounts(made) }))
    }

    async fn view(&self, request: Request<ViewSnapshotRequest>) -> Answer<ViewSnapshotResponse> {
        let ViewSnapshotRequest { key, parent, labels: wanted, .. } = request.into_inner();
        let made = self.run(move |snapshotter| snapshotter.view(&key, name(parent).as_deref(), labels(wanted))).await?;
        Ok(Response::new(ViewSnapshotResponse { mounts: wire_mounts(made) }))
    }

    async fn mounts(&self, request: Request<MountsRequest>) -> Answer<MountsResponse> {
        let MountsRequest { key, .. } = request.into_inner();
        let mounts = self.run(move |snapshotter| snapshotter.mounts(&key)).await?;
        Ok(Response::new(MountsResponse { mounts: wire_mounts(mounts) }))
    }

    async fn commit(&self, request: Request<CommitSnapshotRequest>) -> Answer<()> {
        let CommitSnapshotRequest { name, key, labels: wanted, .. } = request.into_inner();
        self.run(move |snapshotter| snapshotter.commit(&name, &key, labels(wanted))).await.map(Response::new)
    }

    async fn remove(&self, request: Request<RemoveSnapshotRequest>) -> Answer<()> {
        let RemoveSnapshotRequest { key, .. } = request.into_inner();
        self.run(move |snapshotter| snapshotter.remove(&key)).await.map(Response::new)
    }

    async fn stat(&self, request: Request<StatSnapshotRequest>) -> Answer<StatSnapshotResponse> {
        let StatSnapshotRequest { key, .. } = request.into_inner();
        let info = self.run(move |snapshotter| Ok(info(key.clone(), snapshotter.stat(&key)?))).await?;
        Ok(Response::new(StatSnapshotResponse { info: Some(info) }))
    }

    async fn update(&self, request: Request<UpdateSnapshotRequest>) -> Answer<UpdateSnapshotResponse> {
        let UpdateSnapshotRequest { info: wanted, update_mask, .. } = request.into_inner();
        let wanted = wanted.ok_or_else(|| Status::invalid_argument("the update names no snapshot"))?;
        let paths = update_mask.map(|mask| mask.paths).unwrap_or_default();
        let updated = self.run(move |snapshotter| {
            let record = snapshotter.update(&wanted.name, &labels(wanted.labels), &paths)?;
            Ok(info(wanted.name, record))
        });
        Ok(Response::new(UpdateSnapshotResponse { info: Some(updated.await?) }))
    }

    type ListStream = Iter<std::vec::IntoIter<std::result::Result<ListSnapshotsResponse, Status>>>;

    async fn list(&self, request: Request<ListSnapshotsRequest>) -> Answer<Self::ListStream> {
        let ListSnapshotsRequest { filters, .. } = request.into_inner();
        let found = self.run(move |snapshotter| snapshotter.list(&filters)).await?;
        let infos: Vec<Info> = found.into_iter().map(|Snapshot { name, record }| info(name, record)).collect();
        let chunks = infos.chunks(LIST_CHUNK).map(|chunk| Ok(ListSnapshotsResponse { info: chunk.to_vec() }));
        Ok(Response::new(tokio_stream::iter(chunks.collect::<Vec<_>>())))
    }

    async fn usage(&self, request: Request<UsageRequest>) -> Answer<UsageResponse> {
        let UsageRequest { key, .. } = request.into_inner();
        let usage = self.run(move |snapshotter| snapshotter.usage(&key)).await?;
        let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        Ok(Response::new(UsageResponse { size: number(usage.size), inodes: number(usage.inodes) }))
    }

    async fn cleanup(&self, _: Request<CleanupRequest>) -> Answer<()> {
        self.run(Snapshotter::cleanup).await.map(Response::new)
    }
}
