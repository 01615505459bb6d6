//! Whether the store has a layer, and whether the registry was seen to have it.

use std::sync::Arc;

use store::Digest;
use store::publisher::Publisher;

use crate::jobs::pull::error::PullError;
use crate::jobs::pull::verified::VerifiedBlobs;
use crate::registries::RemoteLayer;

/// Whether the store has a layer.
pub(super) async fn has_layer(publisher: &Arc<Publisher>, diff_id: Digest) -> Result<bool, PullError> {
    let publisher = Arc::clone(publisher);
    Ok(blocking(move || publisher.store().has_layer(&diff_id)).await??)
}

/// The size of a layer's blob, if the store has the layer and the registry `host` once sent the blob, which was found to be that layer.
pub(super) async fn verified_size(
    publisher: &Arc<Publisher>,
    verified: &Arc<VerifiedBlobs>,
    host: &str,
    layer: &RemoteLayer,
) -> Result<Option<u64>, PullError> {
    if !has_layer(publisher, layer.diff_id).await? {
        return Ok(None);
    }
    let (verified, host, layer) = (Arc::clone(verified), host.to_owned(), layer.clone());
    blocking(move || verified.size(&host, &layer)).await?
}

/// Runs disk work on a thread that may block. Work that the end of the runtime drops counts as cancelled.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, PullError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| PullError::Cancelled)
}
