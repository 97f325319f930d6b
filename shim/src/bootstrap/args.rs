//! The command line that containerd gives a shim, checked: flags (read by `containerd-shim`) and then an
//! action. Source: containerd's runtime v2 README, "Commands".

use std::path::PathBuf;

/// What the program is called for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start (or join) the shim of a pod, print its address.
    Start,
    /// Clean up after a shim that died, print an exit.
    Delete,
    /// Be the shim; only `start` calls this.
    Serve,
    /// Print what this runtime is.
    Info,
    /// Print the version.
    Version,
}

/// The parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Args {
    /// What to do.
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// Task id.
    pub id: String,
    /// containerd's gRPC socket.
    pub address: String,
    /// Bundle; the working directory where it is not given.
    pub bundle: PathBuf,
    /// The pod's socket, which `serve` is handed listening.
    pub socket: PathBuf,
    /// Log debug lines.
    pub debug: bool,
}

/// A command line that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag that does not exist, or without its value.
    #[error("Command line refused")]
    Flag(#[from] containerd_shim::Error),
    /// An action that does not exist.
    #[error("Unknown action {0:?}; allowed: start, delete")]
    Action(String),
    /// An id that could break a path.
    #[error(
        "{what} {found:?} is not allowed: 1 to {} of A-Z a-z 0-9 _ . -",
        sealpod_protocol::ID_MAX
    )]
    Id {
        /// Which.
        what: &'static str,
        /// What was given.
        found: String,
    },
}

impl Args {
    /// Parses `words`, the program's name not among them.
    ///
    /// # Errors
    /// [`Error`] names the flag or action.
    pub fn parse(words: &[String]) -> Result<Self, Error> {
        let flags = containerd_shim::parse(words)?;
        let action = match flags.action.as_str() {
            _ if flags.info => Action::Info,
            _ if flags.version => Action::Version,
            "start" => Action::Start,
            "delete" => Action::Delete,
            "serve" => Action::Serve,
            other => return Err(Error::Action(other.into())),
        };
        let named = !matches!(action, Action::Info | Action::Version);
        for (what, id) in [("-namespace", &flags.namespace), ("-id", &flags.id)] {
            if named && !sealpod_protocol::valid_id(id) {
                return Err(Error::Id {
                    what,
                    found: id.clone(),
                });
            }
        }
        let bundle = match flags.bundle.as_str() {
            "" => ".".into(),
            bundle => bundle.into(),
        };
        Ok(Self {
            action,
            namespace: flags.namespace,
            id: flags.id,
            address: flags.address,
            bundle,
            socket: flags.socket.into(),
            debug: flags.debug,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, Error> {
        let words: Vec<String> = line.split_whitespace().map(String::from).collect();
        Args::parse(&words)
    }

    #[test]
    fn containerds_command_lines_are_understood() -> Result<(), Error> {
        let a = parse(
            "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id abc -debug start",
        )?;
        assert_eq!(
            (a.action, a.namespace.as_str(), a.id.as_str()),
            (Action::Start, "k8s.io", "abc")
        );
        assert!(a.debug);
        let a = parse("--namespace=default --id=x -bundle /b delete")?;
        assert_eq!((a.action, a.bundle), (Action::Delete, "/b".into()));
        assert_eq!(parse("-info")?.action, Action::Info);
        assert_eq!(parse("-v")?.action, Action::Version);
        Ok(())
    }

    #[test]
    fn a_wrong_command_line_is_named() {
        for (line, named) in [
            ("-nope x start", "nope"),
            ("-id", "id"),
            ("-namespace n -id i dance", "\"dance\""),
            ("-namespace n -id i", "allowed: start, delete"),
            ("-namespace n -id ../x start", "-id \"../x\""),
            ("-namespace n start", "-id \"\""),
        ] {
            let error = crate::error::chain(&parse(line).expect_err(line));
            assert!(error.contains(named), "{line}: {error}");
        }
    }
}
