//! What a containerd client is told when a request fails: a kind that containerd's errdefs know, and a
//! message. Every other module has an error of its own; this is where they meet the wire.

use std::error::Error as StdError;

use ttrpc::{Code, get_status};

/// The classes of containerd's errdefs that the shim uses.
#[expect(missing_docs, reason = "names of the gRPC codes")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    NotFound,
    AlreadyExists,
    InvalidArgument,
    FailedPrecondition,
    PermissionDenied,
    Unimplemented,
    Unavailable,
    Unknown,
}

/// A refusal or failure as the client sees it.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// Class.
    pub kind: Kind,
    /// What was wrong, where, and what is allowed; the whole chain in one line.
    pub message: String,
}

/// Result of a request.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// `e` and all its sources, as an error of `kind`.
    pub fn chain(kind: Kind, e: &dyn StdError) -> Self {
        Self::new(kind, chain(e))
    }

    /// No such task, exec or sandbox.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, message)
    }

    /// The request itself is wrong.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::InvalidArgument, message)
    }

    /// Right request, wrong moment.
    pub fn precondition(message: impl Into<String>) -> Self {
        Self::new(Kind::FailedPrecondition, message)
    }
}

/// `e: its source: the source's source`.
#[must_use]
pub fn chain(e: &dyn StdError) -> String {
    let mut text = e.to_string();
    let mut source = e.source();
    while let Some(s) = source {
        let s_text = s.to_string();
        if !text.contains(&s_text) {
            text.push_str(": ");
            text.push_str(&s_text);
        }
        source = s.source();
    }
    text
}

impl From<Error> for ttrpc::Error {
    fn from(e: Error) -> Self {
        let code = match e.kind {
            Kind::NotFound => Code::NOT_FOUND,
            Kind::AlreadyExists => Code::ALREADY_EXISTS,
            Kind::InvalidArgument => Code::INVALID_ARGUMENT,
            Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
            Kind::PermissionDenied => Code::PERMISSION_DENIED,
            Kind::Unimplemented => Code::UNIMPLEMENTED,
            Kind::Unavailable => Code::UNAVAILABLE,
            Kind::Unknown => Code::UNKNOWN,
        };
        Self::RpcStatus(get_status(code, e.message))
    }
}

/// What the agent answered, passed on with its own class.
impl From<ttrpc::Error> for Error {
    fn from(e: ttrpc::Error) -> Self {
        let ttrpc::Error::RpcStatus(status) = &e else {
            return Self::new(
                Kind::Unavailable,
                format!("Guest agent is not reachable: {e}"),
            );
        };
        let kind = match status.code.enum_value_or_default() {
            Code::NOT_FOUND => Kind::NotFound,
            Code::ALREADY_EXISTS => Kind::AlreadyExists,
            Code::INVALID_ARGUMENT => Kind::InvalidArgument,
            Code::FAILED_PRECONDITION => Kind::FailedPrecondition,
            Code::PERMISSION_DENIED => Kind::PermissionDenied,
            Code::UNIMPLEMENTED => Kind::Unimplemented,
            Code::UNAVAILABLE => Kind::Unavailable,
            _ => Kind::Unknown,
        };
        Self::new(kind, status.message.clone())
    }
}

impl From<crate::owner::Gone> for Error {
    fn from(e: crate::owner::Gone) -> Self {
        Self::chain(Kind::Unavailable, &e)
    }
}
