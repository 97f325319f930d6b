//! The verifier behind a URL: [`Verifier`] over HTTPS, for the shim where verification is not its own.
//! Blocking, on rustls alone; call it where blocking is allowed. The server is known by its pinned
//! key; its tokens by the keys it publishes over that connection, or by a key of the configuration.
//!
//! Whatever goes wrong on the way is an error, and an error is no token.

mod http;
mod pin;

use std::fmt;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use serde::Deserialize;
use serde_json::json;

use crate::anchors::{Pin, pin_of};
use crate::appraise::{Appraisal, Refusal, Request, Verifier, VerifierError};
use crate::binding::PublicKey;
use crate::challenge::Challenge;
use crate::encoding;
use crate::token;
use crate::verdict::chain_text;
use crate::x509::Certificate;
use pin::Pinned;

/// Longest that one request may take, connecting included.
const TIME: Duration = Duration::from_secs(10);
/// Most keys that a verifier publishes.
const MAX_KEYS: usize = 16;

/// Why a remote verifier cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// Not a URL of the form that is taken.
    #[error("Verifier URL {0:?} is not https://HOST[:PORT][/PATH]")]
    Url(String),
    /// Neither a pin nor a certificate.
    #[error("Verifier pin is neither 96 hexadecimal digits nor a certificate in PEM")]
    Pin,
    /// TLS cannot be set up.
    #[error("TLS")]
    Tls(#[from] rustls::Error),
    /// Nobody answers.
    #[error("Cannot connect to {0}")]
    Connect(String, #[source] std::io::Error),
    /// The request was not taken; a wrong key shows here.
    #[error("Cannot send to the verifier")]
    Write(#[source] std::io::Error),
    /// The answer did not come.
    #[error("Cannot read the verifier's answer")]
    Read(#[source] std::io::Error),
    /// The answer is not what it should be.
    #[error("The verifier's answer {0}")]
    Answer(&'static str),
    /// The answer is JSON of another form.
    #[error("The verifier's answer is not of the documented form")]
    Form(#[from] serde_json::Error),
    /// The verifier answers with an error.
    #[error("The verifier answers {0}: {1}")]
    Status(u16, String),
}

/// A verifier elsewhere.
pub struct Remote {
    host: String,
    port: u16,
    prefix: String,
    tls: Arc<ClientConfig>,
    name: ServerName<'static>,
    keys: Vec<PublicKey>,
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({}:{})", self.host, self.port)
    }
}

/// The pin of a text: 96 hexadecimal digits as `sealpod-attest serve` prints them, or the server's
/// certificate in PEM.
///
/// # Errors
/// When it is neither.
pub fn read_pin(text: &str) -> Result<Pin, RemoteError> {
    if let Ok(pin) = encoding::unhex_array(text.trim()) {
        return Ok(pin);
    }
    let blocks = encoding::pem_blocks(text).map_err(|_| RemoteError::Pin)?;
    let leaf = blocks.first().ok_or(RemoteError::Pin)?;
    let leaf = Certificate::parse(&leaf.1).map_err(|_| RemoteError::Pin)?;
    Ok(pin_of(&leaf))
}

impl Remote {
    /// A verifier at `url` whose certificate has the key of `pin`. Opens no connection; where `keys`
    /// is empty, call [`Self::fetch_keys`] before tokens can be checked.
    ///
    /// # Errors
    /// When the URL is not one, or TLS cannot be set up.
    pub fn new(url: &str, pin: Pin, keys: Vec<PublicKey>) -> Result<Self, RemoteError> {
        let (host, port, prefix) =
            split(url).ok_or_else(|| RemoteError::Url(url.chars().take(200).collect()))?;
        let name = ServerName::try_from(host.clone())
            .map_err(|_| RemoteError::Url(url.chars().take(200).collect()))?;
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let algorithms = provider.signature_verification_algorithms;
        let mut tls = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Pinned { pin, algorithms }))
            .with_no_client_auth();
        tls.resumption = rustls::client::Resumption::disabled();
        Ok(Self {
            host,
            port,
            prefix,
            tls: Arc::new(tls),
            name,
            keys,
        })
    }

    /// Asks for the keys that the verifier signs with.
    ///
    /// # Errors
    /// When they cannot be had.
    pub fn fetch_keys(&mut self) -> Result<(), RemoteError> {
        #[derive(Deserialize)]
        struct Jwks {
            keys: Vec<PublicKey>,
        }
        let (status, body) = self.ask("/.well-known/jwks.json", None)?;
        if status != 200 {
            return Err(status_error(status, &body));
        }
        let jwks: Jwks = serde_json::from_slice(&body)?;
        if !(1..=MAX_KEYS).contains(&jwks.keys.len()) {
            return Err(RemoteError::Answer("names no keys, or too many"));
        }
        self.keys = jwks.keys;
        Ok(())
    }

    /// One request on a connection of its own: status and body.
    fn ask(&self, path: &str, body: Option<&[u8]>) -> Result<(u16, Vec<u8>), RemoteError> {
        let socket = http::Timed::connect(&self.host, self.port, TIME)?;
        let connection = ClientConnection::new(Arc::clone(&self.tls), self.name.clone())?;
        let mut stream = StreamOwned::new(connection, socket);
        let path = format!("{}{path}", self.prefix);
        let sent = http::send(&mut stream, &self.host, &path, body);
        // A server may refuse a request before it has read all of it: its answer says why.
        let answer = match (sent, http::receive(&mut stream)) {
            (_, Ok(answer)) => answer,
            (Err(error), Err(_)) => return Err(RemoteError::Write(error)),
            (Ok(()), Err(error)) => return Err(error),
        };
        stream.conn.send_close_notify();
        let _ = stream.flush();
        Ok(answer)
    }
}

/// Host, port and path of a URL.
fn split(url: &str) -> Option<(String, u16, String)> {
    let rest = url.strip_prefix("https://")?;
    let (authority, path) = match rest.find('/') {
        Some(at) => rest.split_at(at),
        None => (rest, ""),
    };
    let (host, port) = if let Some(v6) = authority.strip_prefix('[') {
        let (host, rest) = v6.split_once(']')?;
        (
            host,
            rest.strip_prefix(':')
                .or(rest.is_empty().then_some("443"))?,
        )
    } else {
        authority.split_once(':').unwrap_or((authority, "443"))
    };
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~/".contains(&b);
    let usable = !host.is_empty() && path.bytes().all(plain);
    let port = port.parse().ok()?;
    usable.then(|| (host.to_owned(), port, path.trim_end_matches('/').to_owned()))
}

fn status_error(status: u16, body: &[u8]) -> RemoteError {
    #[derive(Deserialize)]
    struct Error {
        message: String,
    }
    let text = serde_json::from_slice::<Error>(body).map_or_else(
        |_| "no reason".into(),
        |e| {
            e.message
                .chars()
                .filter(|c| !c.is_control())
                .take(500)
                .collect()
        },
    );
    RemoteError::Status(status, text)
}

fn remote(error: RemoteError) -> VerifierError {
    VerifierError::Remote(chain_text(&error))
}

impl Verifier for Remote {
    fn challenge(&self, pod_uid: &str, _now: u64) -> Result<Challenge, VerifierError> {
        let body = json!({ "pod_uid": pod_uid }).to_string();
        let (status, body) = self
            .ask("/v1/challenge", Some(body.as_bytes()))
            .map_err(remote)?;
        match status {
            200 => serde_json::from_slice(&body).map_err(|e| remote(e.into())),
            403 => Err(refusal(&body)),
            503 => Err(VerifierError::Busy),
            _ => Err(remote(status_error(status, &body))),
        }
    }

    fn appraise(&self, request: &Request<'_>, _now: u64) -> Result<Appraisal, VerifierError> {
        #[derive(Deserialize)]
        struct Answer {
            token: String,
        }
        let body = json!({
            "nonce": request.nonce, "pod_uid": request.pod_uid,
            "audience": request.audience, "bundle": request.bundle,
        });
        let (status, body) = self
            .ask("/v1/appraise", Some(body.to_string().as_bytes()))
            .map_err(remote)?;
        match status {
            200 => {
                let answer: Answer = serde_json::from_slice(&body).map_err(|e| remote(e.into()))?;
                // Whoever uses the token checks it; this is who it is from.
                let claims = token::authenticate(&answer.token, &self.keys).map_err(|e| {
                    VerifierError::Remote(format!("Token cannot be used: {}", chain_text(&e)))
                })?;
                Ok(Appraisal {
                    token: answer.token,
                    claims,
                })
            }
            403 => Err(refusal(&body)),
            503 => Err(VerifierError::Busy),
            _ => Err(remote(status_error(status, &body))),
        }
    }

    fn keys(&self) -> Vec<PublicKey> {
        self.keys.clone()
    }
}

fn refusal(body: &[u8]) -> VerifierError {
    #[derive(Deserialize)]
    struct Refused {
        refused: Refusal,
    }
    match serde_json::from_slice::<Refused>(body) {
        Ok(answer) => answer.refused.into(),
        Err(error) => remote(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart() {
        let is = |url: &str, host: &str, port: u16, path: &str| {
            assert_eq!(split(url), Some((host.into(), port, path.into())), "{url}");
        };
        is("https://verifier", "verifier", 443, "");
        is("https://127.0.0.1:8443/", "127.0.0.1", 8443, "");
        is("https://[::1]:8443/a/b/", "::1", 8443, "/a/b");
        is("https://[2001:db8::1]", "2001:db8::1", 443, "");
        for url in [
            "http://verifier",
            "https://",
            "https://:1",
            "https://v:port",
            "https://v:99999",
            "https://v/a b",
            "https://v/\r\nX: y",
            "https://[::1",
            "https://[::1]8443",
        ] {
            assert_eq!(split(url), None, "{url}");
        }
    }

    #[test]
    fn a_pin_is_digits_or_a_certificate() {
        assert_eq!(read_pin(&"ab".repeat(48)).unwrap(), [0xab; 48]);
        assert!(read_pin("ab").is_err());
        assert!(read_pin("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----").is_err());
    }
}
