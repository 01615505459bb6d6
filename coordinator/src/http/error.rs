//! Errors as the API returns them.

use std::time::Duration;

use axum::Json;
use axum::response::{IntoResponse, Response};
use coordinator_api::error::{ErrorBody, ErrorCode, ErrorDetail};
use http::header::RETRY_AFTER;
use http::{HeaderValue, Method, StatusCode, Uri};

use crate::admin::fsck::FsckError;
use crate::admin::gc::GarbageError;
use crate::admin::settings::SettingsError;
use crate::http::quota::UsedUp;
use crate::identity::caller::Forbidden;
use crate::jobs::queue::QueueError;
use crate::plan::scheduler::ScheduleError;
use crate::profiles::TraceError;
use crate::registries::RegistryError;
use crate::state::state_db::StateError;
use crate::unpack::UnpackError;

/// Default `Retry-After`, in seconds.
pub(crate) const RETRY_AFTER_SECONDS: &str = "5";

/// An error of the API: a code for programs and a message for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    code: ErrorCode,
    message: String,
    /// When to try again, for requests that came too early.
    retry_after: Option<Duration>,
}

impl ApiError {
    /// An error with a code and a message.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> ApiError {
        ApiError { code, message: message.into(), retry_after: None }
    }

    /// Too much for now: `message` says of what, `wait` when to try again.
    pub fn later(message: impl Into<String>, wait: Duration) -> ApiError {
        ApiError { retry_after: Some(wait), ..ApiError::new(ErrorCode::Busy, message) }
    }

    /// The request is invalid.
    pub fn invalid(message: impl Into<String>) -> ApiError {
        ApiError::new(ErrorCode::InvalidRequest, message)
    }

    /// The requested object does not exist.
    pub fn not_found(message: impl Into<String>) -> ApiError {
        ApiError::new(ErrorCode::NotFound, message)
    }

    /// An error of the coordinator itself.
    pub fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(ErrorCode::Internal, message)
    }

    /// This coordinator does not lead; `leader` does.
    pub fn standby(leader: &str) -> ApiError {
        ApiError::new(
            ErrorCode::Standby,
            format!("this coordinator stands by: {leader} leads the store, send this there"),
        )
    }

    /// The code, for programs.
    pub fn code(&self) -> ErrorCode {
        self.code
    }

    /// The message, for people.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The HTTP status. A server error is logged by this call.
    pub(crate) fn status(&self) -> StatusCode {
        let status = self.status_of_code();
        if status.is_server_error() {
            tracing::warn!("answered {status}: {}", self.message);
        }
        status
    }

    fn status_of_code(&self) -> StatusCode {
        match self.code {
            ErrorCode::InvalidRequest => StatusCode::BAD_REQUEST,
            ErrorCode::NotFound => StatusCode::NOT_FOUND,
            ErrorCode::Unauthorized => StatusCode::UNAUTHORIZED,
            ErrorCode::Forbidden => StatusCode::FORBIDDEN,
            ErrorCode::Conflict => StatusCode::CONFLICT,
            ErrorCode::Timeout => StatusCode::REQUEST_TIMEOUT,
            ErrorCode::Standby => StatusCode::SERVICE_UNAVAILABLE,
            ErrorCode::Busy => StatusCode::TOO_MANY_REQUESTS,
            ErrorCode::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            ErrorCode::Full => StatusCode::INSUFFICIENT_STORAGE,
            ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = self.status();
        let body = Json(ErrorBody { error: ErrorDetail { code: self.code, message: self.message } });
        let mut response = (status, body).into_response();
        if self.code == ErrorCode::Busy {
            let seconds = self.retry_after.map(|wait| wait.as_secs_f64().ceil().max(1.0) as u64);
            let value = seconds.map_or(HeaderValue::from_static(RETRY_AFTER_SECONDS), HeaderValue::from);
            response.headers_mut().insert(RETRY_AFTER, value);
        }
        response
    }
}

impl From<store::Error> for ApiError {
    fn from(error: store::Error) -> ApiError {
        let code = match &error {
            store::Error::Missing { .. } => ErrorCode::NotFound,
            store::Error::Invalid { .. } => ErrorCode::InvalidRequest,
            store::Error::Full { .. } => ErrorCode::Full,
            store::Error::Held { .. } | store::Error::Fenced { .. } => ErrorCode::Standby,
            _ => ErrorCode::Internal,
        };
        ApiError::new(code, error.to_string())
    }
}

impl From<QueueError> for ApiError {
    fn from(error: QueueError) -> ApiError {
        let code = match &error {
            QueueError::Unknown(_) => ErrorCode::NotFound,
            QueueError::Transition(_) | QueueError::ArchiveGone(_) | QueueError::Full { .. } => ErrorCode::Conflict,
            QueueError::StateDb(_) => ErrorCode::Internal,
        };
        ApiError::new(code, error.to_string())
    }
}

impl From<FsckError> for ApiError {
    fn from(error: FsckError) -> ApiError {
        let code = match &error {
            FsckError::Running | FsckError::NotRunning => ErrorCode::Conflict,
            FsckError::None => ErrorCode::NotFound,
            FsckError::StateDb(_) => ErrorCode::Internal,
        };
        ApiError::new(code, error.to_string())
    }
}

impl From<ScheduleError> for ApiError {
    fn from(error: ScheduleError) -> ApiError {
        let code = match error {
            ScheduleError::JobQueue(error) => return error.into(),
            ScheduleError::StateDb(error) => return error.into(),
            ScheduleError::Unknown(_) => ErrorCode::NotFound,
            ScheduleError::Bad(_) => ErrorCode::InvalidRequest,
            ScheduleError::Exists(_) | ScheduleError::CannotRun { .. } => ErrorCode::Conflict,
        };
        ApiError::new(code, error.to_string())
    }
}

impl From<SettingsError> for ApiError {
    fn from(error: SettingsError) -> ApiError {
        match error {
            SettingsError::Schedule(error) => error.into(),
            SettingsError::StateDb(error) => error.into(),
            SettingsError::Garbage(error) => error.into(),
            SettingsError::Twice(_) | SettingsError::Limits(_) | SettingsError::Pin(_) => {
                ApiError::invalid(error.to_string())
            }
        }
    }
}

impl From<Forbidden> for ApiError {
    fn from(error: Forbidden) -> ApiError {
        ApiError::new(ErrorCode::Forbidden, error.to_string())
    }
}

impl From<UsedUp> for ApiError {
    fn from(error: UsedUp) -> ApiError {
        ApiError::new(ErrorCode::Busy, error.to_string())
    }
}

impl From<StateError> for ApiError {
    fn from(error: StateError) -> ApiError {
        ApiError::internal(error.to_string())
    }
}

impl From<TraceError> for ApiError {
    fn from(error: TraceError) -> ApiError {
        let code = match error {
            TraceError::Store(error) => return error.into(),
            TraceError::Malformed(_) | TraceError::OtherLayers(_) | TraceError::NoSuchPiece { .. } => {
                ErrorCode::InvalidRequest
            }
            TraceError::UnknownChain(_) => ErrorCode::NotFound,
            TraceError::Busy | TraceError::Stopping => ErrorCode::Busy,
            TraceError::StateDb(_) => ErrorCode::Internal,
        };
        ApiError::new(code, error.to_string())
    }
}

impl From<GarbageError> for ApiError {
    fn from(error: GarbageError) -> ApiError {
        let code = match error {
            GarbageError::Store(error) => return error.into(),
            GarbageError::Running | GarbageError::Pinned(_) => ErrorCode::Conflict,
            GarbageError::Stopping => ErrorCode::Busy,
            GarbageError::Policy(_) => ErrorCode::InvalidRequest,
            GarbageError::NotPinned(_) => ErrorCode::NotFound,
            GarbageError::StateDb(_) => ErrorCode::Internal,
        };
        ApiError::new(code, error.to_string())
    }
}

impl From<UnpackError> for ApiError {
    fn from(error: UnpackError) -> ApiError {
        match error {
            UnpackError::Store(error) => error.into(),
            error => ApiError::internal(error.to_string()),
        }
    }
}

impl From<RegistryError> for ApiError {
    fn from(error: RegistryError) -> ApiError {
        ApiError::invalid(error.to_string())
    }
}

/// The answer for an unknown path.
pub async fn no_such_path(uri: Uri) -> ApiError {
    ApiError::not_found(format!("there is nothing at {}: /openapi.json describes what there is", uri.path()))
}

/// The answer for a method that the path does not support.
pub async fn no_such_method(method: Method, uri: Uri) -> Response {
    let message = format!("{} does not take {method}: /openapi.json describes what it takes", uri.path());
    (StatusCode::METHOD_NOT_ALLOWED, ApiError::invalid(message)).into_response()
}
