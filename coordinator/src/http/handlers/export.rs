//! Exports one image as a docker-save tar, streamed with a known length.

use std::io;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use coordinator_api::error::ErrorBody;
use coordinator_api::route;
use http::{Method, header};
use store::image::ImageRef;
use tokio::runtime::Handle;

use crate::http::api_state::ApiState;
use crate::http::error::ApiError;
use crate::http::extract::ApiQuery;
use crate::http::handlers::images::{NameQuery, find};
use crate::http::quota::{Holder, Share};
use crate::http::streams::{BLOCK, Blocks, DOCUMENT, HeldIndex, TAR};
use crate::identity::caller::Caller;
use crate::registries::archive::writer::{ArchivePlan, Member};
use crate::unpack::LayerTar;

/// Exports an image as a tar that `docker load` accepts. An answer shorter than its `Content-Length` is incomplete.
#[utoipa::path(get, path = route::EXPORT, params(NameQuery),
    responses((status = 200, content_type = "application/x-tar", body = Vec<u8>), (status = 404, body = ErrorBody)))]
pub async fn export(
    State(app): State<Arc<ApiState>>,
    caller: Caller,
    method: Method,
    ApiQuery(query): ApiQuery<NameQuery>,
) -> Result<Response, ApiError> {
    let reference: ImageRef = query.name.parse()?;
    caller.check(&reference)?;
    let holder = Holder::from(&caller);
    let share = app.streams.share(&holder, TAR + DOCUMENT).await?;
    let plan = app
        .blocking(move |app| {
            let catalogue = app.read_catalogue()?;
            Ok::<_, ApiError>(ArchivePlan::new(&app.store, &find(&catalogue, &reference)?.image)?)
        })
        .await?;
    let headers =
        [(header::CONTENT_TYPE, "application/x-tar".to_owned()), (header::CONTENT_LENGTH, plan.length().to_string())];
    if method == Method::HEAD {
        return Ok((headers, Body::empty()).into_response());
    }
    let members = plan.into_members();
    let archive = Archive { app: Arc::clone(&app), holder, share, members, layer: None, runtime: Handle::current() };
    Ok((headers, app.streams.body(archive)).into_response())
}

/// An archive that is being streamed.
struct Archive<M> {
    app: Arc<ApiState>,
    holder: Holder,
    share: Share,
    members: M,
    /// The current layer with its index, and how many bytes of it are left.
    layer: Option<(LayerTar, Arc<HeldIndex>, u64)>,
    runtime: Handle,
}

impl<M: Iterator<Item = io::Result<Member>> + Send + 'static> Archive<M> {
    /// The next bytes of the current layer.
    fn layer_block(&mut self) -> io::Result<Option<Bytes>> {
        let Some((tar, _, left)) = &mut self.layer else { return Ok(None) };
        let mut block = Vec::with_capacity(BLOCK);
        let more = tar.fill(&mut block, BLOCK).map_err(|error| io::Error::other(error.to_string()))?;
        let fits = left.checked_sub(block.len() as u64).filter(|left| more || *left == 0);
        *left = fits.ok_or_else(|| {
            io::Error::other("a layer has another length than the catalogue says: run cachefsctl fsck")
        })?;
        if !more {
            self.layer = None;
        }
        Ok((!block.is_empty()).then(|| block.into()))
    }
}

impl<M: Iterator<Item = io::Result<Member>> + Send + 'static> Blocks for Archive<M> {
    fn next_block(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            if let Some(block) = self.layer_block()? {
                return Ok(Some(block));
            }
            match self.members.next().transpose()? {
                None => return Ok(None),
                Some(Member::Bytes(bytes)) => return Ok(Some(bytes.into())),
                Some(Member::Layer(layer)) => {
                    let index = self.app.streams.index(&self.holder, &self.share, &layer.diff_id);
                    let held =
                        self.runtime.block_on(index).map_err(|error| io::Error::other(error.message().to_owned()))?;
                    let tar = LayerTar::open(&self.app.store, Arc::clone(&held.index));
                    let tar = tar.map_err(|error| io::Error::other(error.to_string()))?;
                    self.layer = Some((tar, held, layer.size));
                }
            }
        }
    }
}
