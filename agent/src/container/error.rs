//! What can go wrong with a container or a process of one.

use nix::errno::Errno;

use super::spec::SpecError;
use crate::cgroup::CgroupError;
use crate::launch::LaunchError;

/// A request on a container or process that was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// No container or process of that name.
    #[error("{0}: not found")]
    NotFound(String),
    /// The name is taken.
    #[error("{0}: already exists")]
    Exists(String),
    /// Not in this state.
    #[error("{0}")]
    State(String),
    /// The process has ended. (containerd's clients look for the last two words.)
    #[error("process already finished: not found")]
    Finished,
    /// It was forgotten while it was waited for.
    #[error("the process was deleted")]
    Gone,
    /// A request that means nothing.
    #[error("{0}")]
    Argument(String),
    /// The specification.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The process did not come to execute its program.
    #[error("unable to start container process: {0}")]
    Launch(String),
    /// Pipes or terminals.
    #[error("Standard streams of the process: {0}")]
    Streams(std::io::Error),
    /// A signal that the kernel refused.
    #[error("Signal {signal}: {errno}")]
    Signal {
        /// Its number.
        signal: i32,
        /// Why not.
        errno: Errno,
    },
    /// Limits and groups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A volume in memory.
    #[error("Volume {name:?} in memory: {source}")]
    Volume {
        /// Which.
        name: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A device of the container.
    #[error("{0}")]
    Device(String),
}

impl From<LaunchError> for ContainerError {
    fn from(error: LaunchError) -> Self {
        Self::Launch(error.to_string())
    }
}
