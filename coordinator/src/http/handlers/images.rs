//! Lists, shows and removes images, and waits for them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use coordinator_api::client::Forced;
use coordinator_api::error::{ErrorBody, ErrorCode};
use coordinator_api::event::Severity;
use coordinator_api::image::{Image, ImageDetail, ImageLayer, ImageList, ImageVersion};
use coordinator_api::job::JobState;
use coordinator_api::route;
use serde::Deserialize;
use serde_json::value::RawValue;
use store::catalogue::{Catalogue, TagState};
use store::image::{ImageRecord, ImageRef};
use store::{Digest, go_json};
use tokio::sync::watch;
use utoipa::IntoParams;

use crate::http::access::Access::Hosts as ForHosts;
use crate::http::api_state::{ApiState, Leader};
use crate::http::error::ApiError;
use crate::http::extract::ApiQuery;
use crate::http::extract::{Leading, Sender};
use crate::http::handlers::pull_admission::{check_host, ordered_by, tell};
use crate::http::handlers::wanted;
use crate::http::pages::PageQuery;
use crate::identity::caller::{Caller, Peer};
use crate::state::clock::timestamp;
use crate::state::events::NewEvent;
use crate::state::job::JobId;

/// How often a waiting request looks at the store itself, for images that another coordinator publishes.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// The first look may take this long, even if the requested wait is shorter.
const FIRST_LOOK: Duration = Duration::from_secs(10);
/// The longest wait.
const MAX_WAIT: Duration = Duration::from_secs(24 * 3600);

/// Names one image.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct NameQuery {
    /// The image, as `docker pull` takes it.
    pub name: String,
}

/// Names one image to remove.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct RemoveQuery {
    /// The image, as `docker pull` takes it.
    pub name: String,
    /// Removes the name even if it is pinned, and the pin with it.
    #[serde(default)]
    pub force: bool,
}

/// Names one image to wait for.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct WaitQuery {
    /// The image, as `docker pull` takes it.
    pub name: String,
    /// How many seconds to wait.
    pub timeout_seconds: f64,
    /// Whether to pull it if no job does.
    #[serde(default)]
    pub pull: bool,
}

/// An image's position in the catalogue's order.
fn sort_key(image: &ImageRecord) -> (String, Option<String>, Option<Digest>) {
    let target = image.tag.is_none().then_some(image.target);
    (image.repository.clone(), image.tag.clone(), target)
}

/// Lists the images that the caller may see.
#[utoipa::path(get, path = route::IMAGES, params(PageQuery),
    responses((status = 200, body = ImageList), (status = 400, body = ErrorBody)))]
pub async fn list(
    State(app): State<Arc<ApiState>>,
    caller: Caller,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<ImageList>, ApiError> {
    let after = query.after()?;
    let list = app.blocking(move |app| {
        let catalogue = app.read_catalogue()?;
        let rest = catalogue.images().skip_while(|image| after.as_ref().is_some_and(|after| sort_key(image) <= *after));
        let images = rest.map(|record| (sort_key(record), view(&catalogue, record)));
        let (images, next_page) = query.cut(images.filter(|(_, image)| caller.images.contain_name(&image.name)));
        Ok::<_, store::Error>(ImageList { generation: catalogue.generation(), images, next_page })
    });
    list.await.map(Json)
}

/// Shows one image with its layers, config and history.
#[utoipa::path(get, path = route::IMAGE, params(NameQuery),
    responses((status = 200, body = ImageDetail), (status = 404, body = ErrorBody)))]
pub async fn detail(
    State(app): State<Arc<ApiState>>,
    caller: Caller,
    ApiQuery(query): ApiQuery<NameQuery>,
) -> Result<Json<ImageDetail>, ApiError> {
    let reference: ImageRef = query.name.parse()?;
    caller.check(&reference)?;
    app.blocking(move |app| {
        let catalogue = app.read_catalogue()?;
        let TagState { image, history } = find(&catalogue, &reference)?;
        let config = app.store.blob(&image.config)?;
        let config_document = RawValue::from_string(go_json::readable(&config))
            .map_err(|error| ApiError::internal(format!("the config of {reference} cannot be read: {error}")))?;
        Ok::<_, ApiError>(Json(ImageDetail {
            image: view(&catalogue, image),
            layers_detail: image.layers.iter().map(layer_view).collect(),
            history: history
                .iter()
                .map(|step| ImageVersion { manifest: step.manifest.to_string(), published_at: timestamp(step.at) })
                .collect(),
            config_document,
        }))
    })
    .await
}

/// Removes an image's name; its layers stay until garbage collection.
#[utoipa::path(delete, path = route::IMAGE, params(RemoveQuery),
    responses((status = 200, body = Image), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn remove(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    caller: Caller,
    ApiQuery(query): ApiQuery<RemoveQuery>,
) -> Result<Json<Image>, ApiError> {
    let reference: ImageRef = query.name.parse()?;
    caller.check(&reference)?;
    app.blocking(move |app| {
        let catalogue = app.read_catalogue()?;
        let image = Arc::clone(&find(&catalogue, &reference)?.image);
        leader.garbage.remove(&reference, &image, if query.force { Forced::Yes } else { Forced::No })?;
        let name = image.familiar_name();
        let message = format!("image {name} was taken out of the catalogue");
        leader.events.record(NewEvent::new(Severity::Info, "image.removed", name, message).by(caller.actor()));
        Ok::<_, ApiError>(Json(view(&catalogue, &image)))
    })
    .await
}

/// Answers once the image is published, or refuses when the time is over.
#[utoipa::path(get, path = route::WAIT, params(WaitQuery),
    responses((status = 200, body = Image), (status = 408, body = ErrorBody)))]
pub async fn wait(
    State(app): State<Arc<ApiState>>,
    caller: Caller,
    Sender(peer): Sender,
    ApiQuery(query): ApiQuery<WaitQuery>,
) -> Result<Json<Image>, ApiError> {
    let reference: ImageRef = query.name.parse()?;
    caller.check(&reference)?;
    let timeout = Duration::try_from_secs_f64(query.timeout_seconds)
        .map_err(|_| ApiError::invalid("timeout_seconds is a number of seconds, 0 or more"))?
        .min(MAX_WAIT);
    // A viewer may wait, but changes nothing by it.
    let may_ask = ForHosts.admits(caller.role);
    if query.pull && !may_ask {
        let message = format!("{} may only look: wait without pulling, or ask an admin", caller.actor());
        return Err(ApiError::new(ErrorCode::Forbidden, message));
    }
    let began = Instant::now();
    let mut watch =
        Watch { app: &app, caller: &caller, peer, reference: &reference, may_ask, pull: query.pull, own: None };
    // Even a request that does not wait learns whether the image is there.
    let first = tokio::time::timeout(timeout.max(FIRST_LOOK), watch.look()).await;
    let waiting = async {
        let mut looked = first.unwrap_or(Ok(Look::Absent(None)))?;
        loop {
            let ended = match looked {
                Look::Published(image) => return Ok(image),
                Look::Over => return Err(wanted::not_ready(&app, &reference, began.elapsed())),
                Look::Absent(ended) => ended,
            };
            let change = async {
                match ended {
                    Some(mut ended) => drop(ended.changed().await),
                    None => std::future::pending().await,
                }
            };
            // Whether the job ended or the time passed, the next look decides.
            let _ = tokio::time::timeout(LOOK_AGAIN, change).await;
            looked = watch.look().await?;
        }
    };
    let answer = tokio::time::timeout(timeout.saturating_sub(began.elapsed()), waiting).await;
    answer.unwrap_or_else(|_| Err(wanted::not_ready(&app, &reference, timeout)))
}

/// A request that waits for an image.
struct Watch<'a> {
    app: &'a Arc<ApiState>,
    caller: &'a Caller,
    peer: Peer,
    reference: &'a ImageRef,
    /// Whether the caller may have jobs created and their priority raised.
    may_ask: bool,
    /// Whether to pull the image as soon as this coordinator leads.
    pull: bool,
    /// The job that the request waits for. If it fails, the wait is over.
    own: Option<u64>,
}

/// The result of one look.
enum Look {
    /// The image is published.
    Published(Json<Image>),
    /// Its job has failed.
    Over,
    /// The image is not there yet. The receiver tells of jobs that have ended since the look began.
    Absent(Option<watch::Receiver<u64>>),
}

impl Watch<'_> {
    /// Looks for the image, and has it pulled if that was requested.
    async fn look(&mut self) -> Result<Look, ApiError> {
        let (app, reference) = (self.app, self.reference);
        let ended = app.leader().ok().map(|leader| leader.queue.ended());
        let catalogue = app.blocking(ApiState::read_catalogue).await?;
        if let Some(state) = catalogue.find(reference) {
            return Ok(Look::Published(Json(view(&catalogue, &state.image))));
        }
        let Some(leader) = app.leader().ok().filter(|_| self.may_ask) else { return Ok(Look::Absent(ended)) };
        let raised = wanted::raise(&leader, reference);
        if std::mem::take(&mut self.pull) {
            self.own = match raised {
                Some(job) => Some(job.id),
                None => self.submit(&leader).await?,
            };
        }
        let job = self.own.and_then(|id| leader.queue.get(JobId(id)).ok());
        if job.is_some_and(|job| matches!(job.state, JobState::Failed | JobState::Cancelled)) {
            Ok(Look::Over)
        } else {
            Ok(Look::Absent(ended))
        }
    }

    /// Submits a pull job and returns its number.
    async fn submit(&self, leader: &Arc<Leader>) -> Result<Option<u64>, ApiError> {
        check_host(leader, self.caller, self.peer, 1)?;
        let (image, asked, by) = (self.reference.clone(), Arc::clone(leader), ordered_by(self.caller));
        let job = self.app.blocking(move |_| wanted::pull(&asked, &image, (None, by))).await?;
        job.iter().for_each(|job| tell(leader, "job.submitted", job, "was asked for", self.caller));
        Ok(job.map(|job| job.id))
    }
}

/// Finds an image, or returns an error that says how to pull it.
pub fn find<'a>(catalogue: &'a Catalogue, reference: &ImageRef) -> Result<&'a TagState, ApiError> {
    catalogue.find(reference).ok_or_else(|| {
        ApiError::not_found(format!("image {reference} is not in the store: run cachefsctl pull {reference}"))
    })
}

/// An image as the API shows it.
pub fn view(catalogue: &Catalogue, record: &ImageRecord) -> Image {
    Image {
        name: record.familiar_name(),
        repository: record.repository.clone(),
        tag: record.tag.clone(),
        manifest: record.manifest.to_string(),
        config: record.config.to_string(),
        platform: record.platform.to_string(),
        layers: record.layers.len(),
        size: record.layers.iter().map(|layer| layer.size).sum(),
        compressed_size: record.layers.iter().map(|layer| layer.blob_size).sum(),
        published_at: timestamp(record.published_at),
        pinned: catalogue.is_pinned(record),
    }
}

fn layer_view(layer: &store::image::LayerRecord) -> ImageLayer {
    ImageLayer {
        diff_id: layer.diff_id.to_string(),
        digest: layer.blob.to_string(),
        size: layer.size,
        compressed_size: layer.blob_size,
        media_type: layer.media_type.clone(),
    }
}
