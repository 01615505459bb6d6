//! One image as a docker-save tar, as a stream of known length.

use std::io::{self, Write};
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use coordinator_api::error::ErrorBody;
use coordinator_api::route;
use futures::stream;
use http::header;
use store::image::ImageRef;
use tokio::sync::mpsc;

use crate::access::Caller;
use crate::archive_writer::ArchivePlan;
use crate::server::App;
use crate::server::images::{NameQuery, find};
use crate::server::problem::{ApiQuery, Problem};

/// Blocks under way between the writing thread and the connection.
pub(super) const CAPACITY: usize = 16;
/// The size of a block.
const BLOCK: usize = 256 << 10;

/// One image as a tar that `docker load` accepts. An answer that ends before its `Content-Length` is not whole.
#[utoipa::path(get, path = route::EXPORT, params(NameQuery),
    responses((status = 200, content_type = "application/x-tar", body = Vec<u8>), (status = 404, body = ErrorBody)))]
pub async fn export(
    State(app): State<Arc<App>>,
    caller: Caller,
    ApiQuery(query): ApiQuery<NameQuery>,
) -> Result<Response, Problem> {
    let reference: ImageRef = query.name.parse()?;
    caller.check(&reference)?;
    let plan = app
        .blocking(move |app| {
            let catalogue = app.read_catalogue()?;
            Ok::<_, Problem>(ArchivePlan::new(&app.store, &find(&catalogue, &reference)?.image)?)
        })
        .await?;
    let headers =
        [(header::CONTENT_TYPE, "application/x-tar".to_owned()), (header::CONTENT_LENGTH, plan.length().to_string())];
    let (sender, receiver) = mpsc::channel(CAPACITY);
    tokio::task::spawn_blocking(move || {
        let mut writer = ChannelWriter::new(sender.clone());
        let written = plan.write(&app.store, &mut writer).and_then(|()| Ok(writer.flush()?));
        if let Err(error) = written {
            tracing::warn!("an export broke off: {error}");
            // The connection is then cut, which the client sees as an answer that is too short.
            let _ = sender.blocking_send(Err(io::Error::other(error.to_string())));
        }
    });
    let blocks = stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) });
    Ok((headers, Body::from_stream(blocks)).into_response())
}

/// Sends what is written, block by block.
pub(super) struct ChannelWriter {
    sender: mpsc::Sender<io::Result<Bytes>>,
    block: Vec<u8>,
}

impl ChannelWriter {
    /// Sends to `sender`.
    pub(super) fn new(sender: mpsc::Sender<io::Result<Bytes>>) -> ChannelWriter {
        ChannelWriter { sender, block: Vec::with_capacity(BLOCK) }
    }
}

impl Write for ChannelWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(BLOCK - self.block.len());
        self.block.extend_from_slice(&bytes[..count]);
        if self.block.len() == BLOCK {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.block.is_empty() {
            return Ok(());
        }
        let block = std::mem::replace(&mut self.block, Vec::with_capacity(BLOCK));
        let gone = |_| io::Error::new(io::ErrorKind::BrokenPipe, "the client has gone");
        self.sender.blocking_send(Ok(block.into())).map_err(gone)
    }
}
