//! The shim's process: what containerd calls (`start`, `delete`, `-info`) and the process that serves.
//!
//! ```text
//! containerd ── exec ──▶ start ── exec ──▶ serve (stays; owns the pod)
//!      ◀── address ────────┘                  ▲
//!      ── ttrpc ──────────────────────────────┘
//! containerd ── exec ──▶ delete (cleans up by the ledger when serve has died)
//! ```

mod abandoned;
mod args;
mod delete;
mod info;
mod place;
mod reply;
mod serve;
mod start;

use std::io::{self, Write};

pub use args::{Action, Args};
pub use place::Place;

/// Why a call of the shim failed; told to containerd on standard error.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line.
    #[error(transparent)]
    Args(#[from] args::Error),
    /// The bundle.
    #[error(transparent)]
    Spec(#[from] crate::spec::Error),
    /// The node's configuration.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// Runtime options.
    #[error("{0}")]
    Options(String),
    /// A pod that lives may not be started again.
    #[error("Pod {id:?} is already running (its shim answers on {socket:?})")]
    Running {
        /// The pod.
        id: String,
        /// Where.
        socket: std::path::PathBuf,
    },
    /// A container of a pod whose shim is gone.
    #[error("Pod {id:?} of container {container:?} is not running: no shim answers on {socket:?}")]
    NoPod {
        /// The pod.
        id: String,
        /// The container.
        container: String,
        /// Where one was looked for.
        socket: std::path::PathBuf,
    },
    /// Leftovers of a dead pod that could not be removed.
    #[error("Leftovers of an earlier pod in {dir:?} could not be removed: {what}")]
    Leftovers {
        /// Where.
        dir: std::path::PathBuf,
        /// What.
        what: String,
    },
    /// The operating system.
    #[error("Could not {doing}")]
    Io {
        /// What was being done.
        doing: String,
        /// Why not.
        source: io::Error,
    },
}

impl Error {
    fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }
}

/// What `main` does: one call of the shim's program.
///
/// # Errors
/// [`Error`].
pub fn run(args: &Args) -> Result<(), Error> {
    let print = |bytes: &[u8]| {
        let mut out = io::stdout();
        out.write_all(bytes)
            .and_then(|()| out.flush())
            .map_err(Error::io("write the reply"))
    };
    match args.action {
        Action::Version => print(format!("{}\n", info::version()).as_bytes()),
        Action::Info => print(&info::runtime_info()?),
        Action::Start => start::start(args, print),
        Action::Delete => print(&delete::delete(args)?),
        Action::Serve => serve::serve(args),
    }
}
