//! What is answered: status, JSON and the few headers that the service sends. Error texts name what
//! was wrong with the request, never what the service is made of.

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue, RETRY_AFTER, SET_COOKIE};
use hyper::{Response, StatusCode};
use sealpod_attestation::appraise::Refusal;
use sealpod_attestation::kbs::ErrorInformation;
use sealpod_attestation::verdict::chain_text;
use serde::Serialize;
use serde_json::json;

/// `type` of the errors that key-broker clients get, before the error's name.
const KBS_ERROR: &str = "https://github.com/confidential-containers/kbs/errors/";

/// An answer before it is HTTP.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    content_type: &'static str,
    body: Vec<u8>,
    cookie: Option<String>,
    retry_after: Option<u64>,
}

impl Answer {
    /// JSON with status 200.
    pub(crate) fn json(value: &impl Serialize) -> Self {
        match serde_json::to_vec(value) {
            Ok(body) => Self::new(StatusCode::OK, "application/json", body),
            Err(_) => Self::error(StatusCode::INTERNAL_SERVER_ERROR, "internal", "Answer"),
        }
    }

    /// Text with status 200.
    pub(crate) fn text(content_type: &'static str, text: String) -> Self {
        Self::new(StatusCode::OK, content_type, text.into_bytes())
    }

    /// An error: its name for programs, its text for people.
    pub(crate) fn error(status: StatusCode, name: &str, message: &str) -> Self {
        let body = json!({ "error": name, "message": message }).to_string();
        Self::new(status, "application/json", body.into_bytes())
    }

    /// Evidence that is refused: by which check, and what was expected and found.
    pub(crate) fn refused(refusal: &Refusal) -> Self {
        let mut answer = Self::json(&json!({ "refused": refusal }));
        answer.status = StatusCode::FORBIDDEN;
        answer
    }

    /// A request that cannot be read.
    pub(crate) fn malformed(error: &dyn std::error::Error) -> Self {
        Self::error(StatusCode::BAD_REQUEST, "malformed", &chain_text(error))
    }

    /// Too much is asked of the service at the moment.
    pub(crate) fn busy(seconds: u64) -> Self {
        let mut answer = Self::error(
            StatusCode::SERVICE_UNAVAILABLE,
            "busy",
            "The verifier is busy; try again",
        );
        answer.retry_after = Some(seconds);
        answer
    }

    /// Too much is asked by this client.
    pub(crate) fn too_many(seconds: u64) -> Self {
        let mut answer = Self::error(
            StatusCode::TOO_MANY_REQUESTS,
            "rate",
            "Too many requests from this address",
        );
        answer.retry_after = Some(seconds);
        answer
    }

    /// An error in the form of the key broker's protocol.
    pub(crate) fn kbs_error(status: StatusCode, name: &str, detail: &str) -> Self {
        let information = ErrorInformation {
            error_type: format!("{KBS_ERROR}{name}"),
            detail: detail.to_owned(),
        };
        let mut answer = Self::json(&information);
        answer.status = status;
        answer
    }

    /// With a session's cookie, for so many seconds.
    pub(crate) fn with_cookie(mut self, name: &str, value: &str, seconds: u64) -> Self {
        self.cookie = Some(format!(
            "{name}={value}; Path=/kbs/v0; Max-Age={seconds}; Secure; HttpOnly; SameSite=Strict"
        ));
        self
    }

    fn new(status: StatusCode, content_type: &'static str, body: Vec<u8>) -> Self {
        Self {
            status,
            content_type,
            body,
            cookie: None,
            retry_after: None,
        }
    }

    pub(crate) fn into_response(self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(Bytes::from(self.body)));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(Ok(cookie)) = self.cookie.map(HeaderValue::try_from) {
            headers.insert(SET_COOKIE, cookie);
        }
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        response
    }
}
