//! Creates, lists and revokes tokens.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use coordinator_api::access::{NewToken, TokenCreated, TokenInfo, TokenList};
use coordinator_api::error::{ErrorBody, ErrorCode};
use coordinator_api::event::Severity;
use coordinator_api::route;
use jiff::Timestamp;

use crate::http::api_state::ApiState;
use crate::http::error::ApiError;
use crate::http::extract::{ApiJson, ApiName, ApiQuery, Leading};
use crate::http::pages::PageQuery;
use crate::identity::caller::Caller;
use crate::identity::tokens::TokenError;
use crate::state::events::NewEvent;

impl From<TokenError> for ApiError {
    fn from(error: TokenError) -> ApiError {
        let code = match &error {
            TokenError::BadName(_) | TokenError::Pattern(_) | TokenError::RestrictedAdmin | TokenError::BadLife => {
                ErrorCode::InvalidRequest
            }
            TokenError::Exists(_) => ErrorCode::Conflict,
            TokenError::Unknown(_) => ErrorCode::NotFound,
            TokenError::Random(_) | TokenError::StateDb(_) => ErrorCode::Internal,
        };
        ApiError::new(code, error.to_string())
    }
}

/// Lists the tokens, ordered by name.
#[utoipa::path(get, path = route::TOKENS, params(PageQuery),
    responses((status = 200, body = TokenList), (status = 400, body = ErrorBody)))]
pub async fn list(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    ApiQuery(query): ApiQuery<PageQuery>,
) -> Result<Json<TokenList>, ApiError> {
    drop(leader);
    let after = query.after::<String>()?;
    let rest = app.auth.tokens().list().into_iter().filter(|token| Some(&token.name) > after.as_ref());
    let (tokens, next_page) = query.cut(rest.map(|token| (token.name.clone(), token)));
    Ok(Json(TokenList { tokens, next_page }))
}

/// Creates a token. The answer is the only one that shows it.
#[utoipa::path(post, path = route::TOKENS, request_body = NewToken,
    responses((status = 200, body = TokenCreated), (status = 400, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn create(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    caller: Caller,
    ApiJson(new): ApiJson<NewToken>,
) -> Result<Json<TokenCreated>, ApiError> {
    drop(leader);
    let actor = caller.actor();
    let created = app.blocking(move |app| app.auth.tokens().create(new, &caller, Timestamp::now())).await?;
    let TokenInfo { name, role, images, expires_at, .. } = &created.info;
    let images = if images.is_empty() { "all images".to_owned() } else { images.join(" ") };
    let until = expires_at.map(|at| format!(" until {at}")).unwrap_or_default();
    let message = format!("token {name} was made: role {role}, {images}{until}");
    app.events.record(NewEvent::new(Severity::Info, "token.created", name, message).by(actor));
    Ok(Json(created))
}

/// Revokes a token: requests that present it are refused from now on.
#[utoipa::path(delete, path = route::TOKEN, params(("name" = String, Path, description = "The token's name")),
    responses((status = 200, body = TokenInfo), (status = 404, body = ErrorBody)))]
pub async fn revoke(
    State(app): State<Arc<ApiState>>,
    Leading(leader): Leading,
    caller: Caller,
    ApiName(name): ApiName,
) -> Result<Json<TokenInfo>, ApiError> {
    let hosts = Arc::clone(&leader.hosts);
    let revoke = move |app: &ApiState| {
        let revoked = app.auth.tokens().revoke(&name)?;
        hosts.forget_revoked(app.auth.tokens(), Timestamp::now());
        Ok::<_, TokenError>(revoked)
    };
    let info = app.blocking(revoke).await?;
    let message = format!("token {} was revoked", info.name);
    app.events.record(NewEvent::new(Severity::Info, "token.revoked", &info.name, message).by(caller.actor()));
    Ok(Json(info))
}
