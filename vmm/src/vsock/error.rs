//! What can go wrong when an engine is made. Nothing that a guest does is an error here: it costs
//! the guest its connection and is logged, within a budget.

use std::{io, path::PathBuf};

/// Why a vsock engine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket paths do not fit into `sockaddr_un`.
    #[error("Path of the vsock socket has {len} bytes, at most {max} are possible: {path}")]
    PathTooLong {
        /// The base path.
        path: PathBuf,
        /// Its length, bytes.
        len: usize,
        /// Longest base path, so that `_<port>` still fits, bytes.
        max: usize,
    },
    /// The listening socket could not be made.
    #[error("Cannot listen on {path}")]
    Listen {
        /// The base path.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Limits that contradict each other.
    #[error("Limits of the vsock engine are unusable: {0}")]
    Limits(&'static str),
    /// A guest may not have this context id.
    #[error("{0} cannot be a guest's CID: 3 to 4294967294 can")]
    GuestCid(u64),
    /// epoll, eventfd or a thread could not be had from the kernel.
    #[error("Cannot set up {what}")]
    Resource {
        /// What was wanted.
        what: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// The vhost-user library refused.
    #[error("Cannot set up the vhost-user back end: {0}")]
    VhostUser(String),
}
