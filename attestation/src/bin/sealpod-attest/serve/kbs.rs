//! The key broker's handshake (KBS protocol 0.4 of Trustee): challenge, evidence, and then resources,
//! encrypted to the key that the evidence vouches for. A session is a cookie.

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use hyper::body::Incoming;
use hyper::header::COOKIE;
use hyper::{HeaderMap, Request, StatusCode};
use sealpod_attestation::appraise::ClientRequest;
use sealpod_attestation::binding::Nonce;
use sealpod_attestation::encoding::base64;
use sealpod_attestation::evidence;
use sealpod_attestation::kbs::{self, Attestation, Evidence, Tee};
use sealpod_attestation::verdict::chain_text;
use serde_json::json;

use super::answer::Answer;
use super::backend::now;
use super::resources::ResourceError;
use super::service::Service;
use super::sessions::{Asked, Attested};

/// What the path of a resource begins with.
pub(crate) const RESOURCE: &str = "/kbs/v0/resource/";
/// The cookie's name in the protocol.
const COOKIE_NAME: &str = "kbs-session-id";
/// Longest body of a request that brings no evidence, KiB.
const SMALL: u32 = 16;
/// Longest that what was proved is good for, seconds.
const LIFE: u64 = 300;

/// `POST /kbs/v0/auth`: opens a session with a nonce.
pub(crate) async fn auth(
    service: &Arc<Service>,
    request: Request<Incoming>,
) -> Result<Answer, Answer> {
    let read = service.body(request, SMALL).await?;
    let (request, binding) = kbs::parse_request(&read.bytes).map_err(|error| {
        Answer::kbs_error(
            StatusCode::UNAUTHORIZED,
            "ProtocolVersion",
            &chain_text(&error),
        )
    })?;
    let (mut bytes, mut id) = ([0; 32], [0; 32]);
    let failed = || Answer::kbs_error(StatusCode::INTERNAL_SERVER_ERROR, "Internal", "No nonce");
    let random = SystemRandom::new();
    let filled = random.fill(&mut bytes).and_then(|()| random.fill(&mut id));
    filled.map_err(|_| failed())?;
    let nonce = base64(&bytes);
    let asked = Asked {
        nonce: nonce.clone(),
        bytes: Nonce(bytes),
        tee: request.tee,
        binding,
    };
    let cookie = service
        .sessions
        .open(asked, id)
        .ok_or_else(|| Answer::busy(60))?;
    let answer = Answer::json(&kbs::challenge(&nonce, binding));
    Ok(answer.with_cookie(COOKIE_NAME, &cookie, LIFE))
}

/// `POST /kbs/v0/attest`: evidence for a token.
pub(crate) async fn attest(
    service: &Arc<Service>,
    request: Request<Incoming>,
) -> Result<Answer, Answer> {
    let id = session(request.headers());
    let read = service.body(request, u32::MAX).await?;
    // The nonce is used from here on, whatever the evidence is.
    let (id, asked) = id
        .and_then(|id| service.sessions.take(&id).map(|asked| (id, asked)))
        .ok_or_else(no_session)?;
    service
        .judge(Some(read), move |service, body| {
            judge(service, &id, &asked, body).unwrap_or_else(|refused| refused)
        })
        .await
}

fn judge(service: &Service, id: &str, asked: &Asked, body: &[u8]) -> Result<Answer, Answer> {
    let malformed = |error: &dyn std::error::Error| {
        Answer::kbs_error(
            StatusCode::UNAUTHORIZED,
            "AttestationFailed",
            &chain_text(error),
        )
    };
    let Attestation {
        init_data,
        runtime_data,
        tee_evidence,
    } = kbs::parse_attestation(body).map_err(|e| malformed(&e))?;
    if runtime_data.nonce != asked.nonce {
        let text = "The runtime data is not for this session's nonce";
        return Err(Answer::kbs_error(
            StatusCode::UNAUTHORIZED,
            "AttestationFailed",
            text,
        ));
    }
    let evidence = Evidence::read(asked.tee, &tee_evidence).map_err(|e| malformed(&e))?;
    let key = runtime_data.tee_pubkey;
    let binding = asked.binding;
    let init_data = init_data.map(|i| i.body).unwrap_or_default();
    let accepted = service.backend.appraise_client(
        &service.metrics,
        ClientRequest {
            nonce: asked.bytes,
            tee: if asked.tee == Tee::Tdx {
                evidence::Tee::Tdx
            } else {
                evidence::Tee::Snp
            },
            evidence,
            report_data: binding.report_data(&asked.nonce, &key, &tee_evidence.additional_evidence),
            device_nonce: binding.device_nonce(&asked.nonce, &key),
            key: &key,
            init_data: init_data.as_bytes(),
            audience: &service.config.kbs.audience,
        },
    )?;
    let life = accepted.expires.saturating_sub(now()).min(LIFE);
    let proved = Attested {
        key,
        evidence: accepted.evidence_digest,
    };
    if !service
        .sessions
        .attested(id, proved, Duration::from_secs(life))
    {
        return Err(Answer::busy(60));
    }
    let answer = Answer::json(&json!({ "token": accepted.token }));
    Ok(answer.with_cookie(COOKIE_NAME, id, life))
}

/// `GET /kbs/v0/resource/{repository}/{type}/{tag}`: a resource, encrypted.
pub(crate) async fn resource(
    service: &Arc<Service>,
    request: Request<Incoming>,
) -> Result<Answer, Answer> {
    let proved = session(request.headers())
        .and_then(|id| service.sessions.get(&id))
        .ok_or_else(no_session)?;
    let path = request.uri().path();
    let path = path.strip_prefix(RESOURCE).unwrap_or_default().to_owned();
    service
        .judge(None, move |service, _| {
            give(service, &proved, &path).unwrap_or_else(|refused| refused)
        })
        .await
}

fn give(service: &Service, proved: &Attested, path: &str) -> Result<Answer, Answer> {
    let absent = |error: &ResourceError| {
        let status = match error {
            ResourceError::Store(_) => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::NOT_FOUND,
        };
        Answer::kbs_error(status, "ReadSecretFailed", &error.to_string())
    };
    let read = match &service.resources {
        Some(resources) => resources.read(path),
        None => Err(ResourceError::Absent),
    };
    let secret = read.map_err(|error| {
        if let ResourceError::Store(cause) = &error {
            eprintln!("sealpod-attest: resource store: {cause}");
        }
        absent(&error)
    })?;
    let response = kbs::encrypt(&proved.key, &secret).map_err(|error| {
        Answer::kbs_error(StatusCode::UNAUTHORIZED, "JWEFailed", &chain_text(&error))
    })?;
    service.backend.released(path, &proved.evidence)?;
    Ok(Answer::json(&response))
}

fn no_session() -> Answer {
    Answer::kbs_error(
        StatusCode::UNAUTHORIZED,
        "InvalidCookie",
        "No session of this cookie waits for this request",
    )
}

/// The session's cookie among those that were sent.
fn session(headers: &HeaderMap) -> Option<String> {
    let lines = headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|l| l.to_str().ok());
    let mut cookies = lines.flat_map(|line| line.split(';'));
    cookies.find_map(|cookie| {
        let value = cookie.trim().strip_prefix(COOKIE_NAME)?.strip_prefix('=')?;
        Some(value.trim_matches('"').to_owned())
    })
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    #[test]
    fn the_session_is_found_among_other_cookies() {
        let mut headers = HeaderMap::new();
        assert_eq!(session(&headers), None);
        headers.append(COOKIE, HeaderValue::from_static("a=b; kbs-session-idx=c"));
        assert_eq!(session(&headers), None);
        headers.append(
            COOKIE,
            HeaderValue::from_static("x=y; kbs-session-id=\"abc\"; z=1"),
        );
        assert_eq!(session(&headers), Some("abc".into()));
    }
}
