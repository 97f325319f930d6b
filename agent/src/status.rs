//! The ttrpc code of each error: what the shim, and containerd above it, act on.

use ttrpc::{Code, Error, get_status};

use crate::attest::AttestError;
use crate::cgroup::CgroupError;
use crate::container::ContainerError;
use crate::network::NetworkError;
use crate::sandbox::SandboxError;

/// An error with a code of its own.
pub(crate) fn status(code: Code, error: impl std::fmt::Display) -> Error {
    Error::RpcStatus(get_status(code, error))
}

/// See [`ContainerError`].
pub(crate) fn container_error(error: ContainerError) -> Error {
    let code = match &error {
        ContainerError::NotFound(_) | ContainerError::Finished | ContainerError::Gone => {
            Code::NOT_FOUND
        }
        ContainerError::Exists(_) => Code::ALREADY_EXISTS,
        ContainerError::State(_) => Code::FAILED_PRECONDITION,
        ContainerError::Argument(_) | ContainerError::Spec(_) | ContainerError::Device(_) => {
            Code::INVALID_ARGUMENT
        }
        ContainerError::Cgroup(CgroupError::Invalid(_)) => Code::INVALID_ARGUMENT,
        ContainerError::Launch(_) => Code::UNKNOWN,
        ContainerError::Streams(_)
        | ContainerError::Signal { .. }
        | ContainerError::Cgroup(_)
        | ContainerError::Volume { .. } => Code::INTERNAL,
    };
    status(code, error)
}

/// See [`NetworkError`].
pub(crate) fn network_error(error: NetworkError) -> Error {
    let code = match &error {
        NetworkError::Plan(_) | NetworkError::NoInterface { .. } => Code::INVALID_ARGUMENT,
        NetworkError::NoDevice { .. } => Code::NOT_FOUND,
        NetworkError::Socket(_) | NetworkError::Step { .. } => Code::INTERNAL,
    };
    status(code, error)
}

/// See [`SandboxError`].
pub(crate) fn sandbox_error(error: SandboxError) -> Error {
    let code = match &error {
        SandboxError::Twice => Code::FAILED_PRECONDITION,
        SandboxError::Value(_) | SandboxError::Sysctl(_) => Code::INVALID_ARGUMENT,
        SandboxError::Step { .. } => Code::INTERNAL,
    };
    status(code, error)
}

/// See [`AttestError`].
pub(crate) fn attest_error(error: AttestError) -> Error {
    let code = match &error {
        AttestError::Request(_) | AttestError::InitData(_) => Code::INVALID_ARGUMENT,
        AttestError::Token(_) | AttestError::Closed(_) => Code::PERMISSION_DENIED,
        AttestError::Source(_) => Code::FAILED_PRECONDITION,
        AttestError::Key(_) | AttestError::Bundle(_) => Code::INTERNAL,
    };
    status(code, error)
}
