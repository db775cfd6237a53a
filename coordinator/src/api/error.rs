//! The one mapping of failures to HTTP. Every body of an error is `{"detail": ...}`.

use axum::Json;
use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::http::{Response, StatusCode};
use axum::response::IntoResponse;
use coordinator_core::state_machine::Rejection;
use serde_json::{Value, json};

use crate::store;

/// An answer that is no success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ApiError {
    status: StatusCode,
    detail: Value,
}

/// Result of a handler.
pub(super) type Result<T> = std::result::Result<T, ApiError>;

impl ApiError {
    /// With a text for people.
    pub(super) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        let detail = Value::String(detail.into());
        Self { status, detail }
    }

    /// 422 in the form of the reference: a list of what is wrong and where.
    pub(super) fn invalid(problems: Vec<Value>) -> Self {
        let (status, detail) = (StatusCode::UNPROCESSABLE_ENTITY, Value::Array(problems));
        Self { status, detail }
    }

    /// 401.
    pub(super) fn unauthorised(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, detail)
    }

    /// 404 of a server, in the words of the reference.
    pub(super) fn no_server(name: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            format!("No kubernetes node with id or name {name} found!"),
        )
    }
}

impl From<Rejection> for ApiError {
    fn from(rejection: Rejection) -> Self {
        let status = match &rejection {
            Rejection::Replayed => StatusCode::UNAUTHORIZED,
            Rejection::Unknown { .. } => StatusCode::NOT_FOUND,
            Rejection::UnknownValidator(_) | Rejection::NoGpus(_) => StatusCode::BAD_REQUEST,
            Rejection::NotFounded => StatusCode::SERVICE_UNAVAILABLE,
            Rejection::Invitation(_) => StatusCode::FORBIDDEN,
            Rejection::NameTaken(_)
            | Rejection::AlreadyJoined(_)
            | Rejection::HostInUse { .. }
            | Rejection::LastMember(_)
            | Rejection::NotEligible(_)
            | Rejection::RotationUnderWay
            | Rejection::NoRotation
            | Rejection::OldCertificates(_)
            | Rejection::AlreadyEnrolled(_)
            | Rejection::GpuElsewhere(_)
            | Rejection::Protected { .. }
            | Rejection::BudgetSpent { .. }
            | Rejection::Placement(_)
            | Rejection::OutOfOrder(_)
            | Rejection::HostBehind { .. }
            | Rejection::FormatIsNewer { .. }
            | Rejection::NotFinalized { .. }
            | Rejection::NotObserving
            | Rejection::Adoption(_)
            | Rejection::OtherMiner(_)
            | Rejection::HotkeyInUse(_)
            | Rejection::WorkerInUse(_)
            | Rejection::AddressTaken { .. }
            | Rejection::WrongPhase { .. } => StatusCode::CONFLICT,
        };
        Self::new(status, rejection.to_string())
    }
}

impl From<store::Error> for ApiError {
    fn from(error: store::Error) -> Self {
        match error {
            store::Error::Rejected(rejection) => rejection.into(),
            store::Error::Unavailable(why) => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                format!("{why}; nothing was changed: try again"),
            ),
            store::Error::OutcomeUnknown(why) => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                format!("{why}; it is not known whether anything changed: look, then try again"),
            ),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> axum::response::Response {
        (self.status, Json(json!({ "detail": self.detail }))).into_response()
    }
}

/// Gives errors that the framework made (404, 405, 413) the one form. Headers such as `Allow` stay.
pub(super) fn as_json(response: axum::response::Response) -> axum::response::Response {
    let status = response.status();
    let is_json = |value: &axum::http::HeaderValue| value.as_bytes().starts_with(b"application/json");
    let is_error = status.is_client_error() || status.is_server_error();
    if !is_error || response.headers().get(CONTENT_TYPE).is_some_and(is_json) {
        return response;
    }
    let (mut head, _) = response.into_parts();
    head.headers.remove(axum::http::header::CONTENT_LENGTH);
    head.headers.insert(
        CONTENT_TYPE,
        axum::http::HeaderValue::from_static("application/json"),
    );
    let detail = status.canonical_reason().unwrap_or("error");
    Response::from_parts(head, Body::from(json!({ "detail": detail }).to_string()))
}
