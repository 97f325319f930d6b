//! From a request to what answers it: rates, routes, methods. Nothing is read of a request that is
//! refused here.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};

use super::answer::Answer;
use super::kbs;
use super::limits::Open;
use super::metrics::Route;
use super::service::Service;

/// Longest body of a request that brings no evidence, KiB.
const SMALL: u32 = 16;

/// Answers one request.
pub(crate) async fn answer(
    service: &Arc<Service>,
    open: &Open,
    request: Request<Incoming>,
) -> Answer {
    let (route, method) = find(request.uri().path());
    let answer = if route == Route::Unknown {
        Answer::error(
            StatusCode::NOT_FOUND,
            "path",
            "There is nothing at this path",
        )
    } else if request.method() != method {
        let text = format!("{method} is what this path answers");
        Answer::error(StatusCode::METHOD_NOT_ALLOWED, "method", &text)
    } else if let Err(seconds) = open.request() {
        Answer::too_many(seconds)
    } else {
        dispatch(service, route, request).await
    };
    service.metrics.request(route, answer.status.as_u16());
    answer
}

fn find(path: &str) -> (Route, Method) {
    match path {
        "/v1/challenge" => (Route::Challenge, Method::POST),
        "/v1/appraise" => (Route::Appraise, Method::POST),
        "/.well-known/jwks.json" => (Route::Jwks, Method::GET),
        "/healthz" => (Route::Health, Method::GET),
        "/metrics" => (Route::Metrics, Method::GET),
        "/kbs/v0/auth" => (Route::KbsAuth, Method::POST),
        "/kbs/v0/attest" => (Route::KbsAttest, Method::POST),
        path if path.starts_with(kbs::RESOURCE) => (Route::KbsResource, Method::GET),
        _ => (Route::Unknown, Method::GET),
    }
}

async fn dispatch(service: &Arc<Service>, route: Route, request: Request<Incoming>) -> Answer {
    let result = match route {
        Route::Challenge => ask(service, request, SMALL, |s, body| s.backend.challenge(body)).await,
        Route::Appraise => {
            ask(service, request, u32::MAX, |s, body| {
                s.backend.appraise(&s.metrics, body)
            })
            .await
        }
        Route::Jwks => Ok(service.backend.jwks()),
        Route::Health => Ok(health(service)),
        Route::Metrics => Ok(metrics(service)),
        Route::KbsAuth => kbs::auth(service, request).await,
        Route::KbsAttest => kbs::attest(service, request).await,
        Route::KbsResource => kbs::resource(service, request).await,
        Route::Unknown => Err(Answer::error(StatusCode::NOT_FOUND, "path", "")),
    };
    result.unwrap_or_else(|refused| refused)
}

/// `POST /v1/challenge` and `/v1/appraise`: the body goes to the verifier.
async fn ask(
    service: &Arc<Service>,
    request: Request<Incoming>,
    most: u32,
    answer: fn(&Service, &[u8]) -> Answer,
) -> Result<Answer, Answer> {
    let read = service.body(request, most).await?;
    service.judge(Some(read), answer).await
}

fn health(service: &Service) -> Answer {
    match service.backend.healthy() {
        Ok(()) => Answer::text("text/plain", "ok\n".into()),
        Err(why) => Answer::error(StatusCode::SERVICE_UNAVAILABLE, "unhealthy", why),
    }
}

fn metrics(service: &Service) -> Answer {
    let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
    let text = service.metrics.text(&[
        (
            "challenges",
            "Challenges that wait for evidence",
            count(service.backend.challenges()),
        ),
        (
            "sessions",
            "Sessions of key-broker clients",
            count(service.sessions.count()),
        ),
        (
            "uptime_seconds",
            "Time since the start",
            service.started.elapsed().as_secs(),
        ),
        ("resident_bytes", "Memory of the process", resident()),
        (
            "reload_failures",
            "Reloads that failed",
            service.metrics.reloads[1].load(Relaxed),
        ),
    ]);
    Answer::text("text/plain; version=0.0.4", text)
}

/// VmRSS of this process, bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let kib = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}
