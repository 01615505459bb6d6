//! Lists hosts, and renews and releases their leases.

use std::collections::HashSet;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use coordinator_api::error::{ErrorBody, ErrorCode};
use coordinator_api::host::{Host, HostList, LeaseGranted, LeaseRequest};
use coordinator_api::route;
use serde::Deserialize;
use store::Digest;
use utoipa::IntoParams;

use crate::http::api_state::{ApiState, Leader};
use crate::http::error::ApiError;
use crate::http::extract::{ApiJson, ApiName, ApiQuery, Leading};
use crate::http::pages::PageQuery;
use crate::identity::caller::Caller;
use crate::identity::hosts::HostError;
use crate::state::clock;

/// The longest renewal, in bytes: 100,000 layers take half of it.
const RENEWAL_MAX: usize = 16 << 20;

/// Tells hosts of the same name apart.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct HostQuery {
    /// The id that the host renews its lease with.
    pub id: String,
}

impl From<HostError> for ApiError {
    fn from(error: HostError) -> ApiError {
        let code = match &error {
            HostError::Malformed { .. } => ErrorCode::InvalidRequest,
            HostError::Taken { .. } => ErrorCode::Forbidden,
            HostError::Unknown(_) => ErrorCode::NotFound,
            HostError::TooMany | HostError::TokenFull { .. } | HostError::Full => ErrorCode::Busy,
            HostError::StateDb(_) => ErrorCode::Internal,
        };
        ApiError::new(code, error.to_string())
    }
}

/// Lists the hosts, ordered by name.
#[utoipa::path(get, path = route::HOSTS, params(PageQuery),
    responses((status = 200, body = HostList), (status = 400, body = ErrorBody)))]
pub async fn list(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    caller: Caller,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<HostList>, ApiError> {
    let (leader, after) = (leader, query.after()?);
    let sort_key = |host: Host| ((host.name.clone(), host.report.id.clone()), host);
    let list = app.blocking(move |app| {
        if caller.images.is_restricted() {
            seen_by(app, &leader, &caller, after.as_ref(), |hosts| query.cut(hosts.map(sort_key)))
        } else {
            Ok::<_, ApiError>(leader.hosts.list_with(after.as_ref(), &|_| true, |hosts| query.cut(hosts.map(sort_key))))
        }
    });
    list.await.map(Json)
}

/// The hosts that use an image that the caller may see, with only those of their images and layers.
fn seen_by(
    app: &ApiState,
    leader: &Leader,
    caller: &Caller,
    after: Option<&(String, String)>,
    take: impl FnOnce(&mut dyn Iterator<Item = Host>) -> (Vec<Host>, Option<String>),
) -> Result<HostList, ApiError> {
    let catalogue = app.read_catalogue()?;
    let images = catalogue.images().filter(|image| caller.images.contain_record(image));
    let layers: HashSet<Digest> = images.flat_map(|image| image.layers.iter().map(|layer| layer.diff_id)).collect();
    let of_caller = |mut host: Host| {
        host.report.images.retain(|image| caller.images.contain_name(image));
        if host.caller != caller.actor() {
            host.caller = "another".to_owned();
        }
        (!host.report.images.is_empty() || host.caller == caller.actor()).then_some(host)
    };
    let is_seen = |layer: &Digest| layers.contains(layer);
    Ok(leader.hosts.list_with(after, &is_seen, |hosts| take(&mut hosts.filter_map(of_caller))))
}

/// Renews a host's lease. From now on the host holds these layers and no others.
#[utoipa::path(post, path = route::LEASE, params(("name" = String, Path, description = "The host's name")),
    request_body = LeaseRequest,
    responses((status = 200, body = LeaseGranted), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody)))]
pub async fn renew(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    caller: Caller,
    ApiName(name): ApiName,
    ApiJson(request): ApiJson<LeaseRequest, RENEWAL_MAX>,
) -> Result<Json<LeaseGranted>, ApiError> {
    let hosts = Arc::clone(&leader.hosts);
    let renew = move |app: &ApiState| hosts.renew(&name, request, &caller, app.auth.tokens(), clock::steady());
    Ok(Json(app.blocking(renew).await?))
}

/// Releases a host's lease, because the host has unmounted.
#[utoipa::path(delete, path = route::LEASE,
    params(("name" = String, Path, description = "The host's name"), HostQuery),
    responses((status = 200, body = LeaseGranted), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn release(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    caller: Caller,
    ApiName(name): ApiName,
    ApiQuery(query): ApiQuery<HostQuery>,
) -> Result<Json<LeaseGranted>, ApiError> {
    let hosts = Arc::clone(&leader.hosts);
    let release = move |app: &ApiState| hosts.release(&name, &query.id, &caller, app.auth.tokens(), clock::steady());
    Ok(Json(app.blocking(release).await?))
}
