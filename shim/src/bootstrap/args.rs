//! The command line that containerd gives a shim: Go-style flags (`-name value`, `-name=value`, one dash
//! or two) and then an action. Source: containerd's runtime v2 README, "Commands".

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
    /// Pod folder (`serve` only).
    pub pod_dir: PathBuf,
    /// Log debug lines.
    pub debug: bool,
}

/// A command line that cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A flag that does not exist.
    #[error(
        "Unknown flag {0:?}; allowed: -namespace -id -address -publish-binary -bundle -socket -debug -info -v"
    )]
    Flag(String),
    /// A flag without its value.
    #[error("Flag {0:?} has no value")]
    Value(String),
    /// An action that does not exist.
    #[error("Unknown action {0:?}; allowed: start, delete")]
    Action(String),
    /// A flag that the action needs.
    #[error("Flag -{0} is missing")]
    Missing(&'static str),
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
    pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Self, Error> {
        let mut words = words.into_iter();
        let mut args = Self {
            action: Action::Start,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            bundle: PathBuf::from("."),
            pod_dir: PathBuf::new(),
            debug: false,
        };
        let mut action = None;
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                action = Some(word);
                break;
            };
            let (name, mut inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let mut value = || {
                inline
                    .take()
                    .or_else(|| words.next())
                    .ok_or_else(|| Error::Value(name.into()))
            };
            match name {
                "namespace" => args.namespace = value()?,
                "id" => args.id = value()?,
                "address" => args.address = value()?,
                "bundle" => args.bundle = value()?.into(),
                "pod-dir" => args.pod_dir = value()?.into(),
                "publish-binary" | "socket" => drop(value()?),
                "debug" => args.debug = inline.is_none_or(|v| v == "true"),
                "info" => action = Some("info".into()),
                "v" | "version" => action = Some("version".into()),
                _ => return Err(Error::Flag(word)),
            }
        }
        args.action = match action.as_deref() {
            Some("info") => {
                return Ok(Self {
                    action: Action::Info,
                    ..args
                });
            }
            Some("version") => {
                return Ok(Self {
                    action: Action::Version,
                    ..args
                });
            }
            Some("start") => Action::Start,
            Some("delete") => Action::Delete,
            Some("serve") => Action::Serve,
            other => return Err(Error::Action(other.unwrap_or_default().into())),
        };
        for (what, id) in [("-namespace", &args.namespace), ("-id", &args.id)] {
            if !sealpod_protocol::valid_id(id) {
                return Err(Error::Id {
                    what,
                    found: id.clone(),
                });
            }
        }
        Ok(args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, Error> {
        Args::parse(line.split_whitespace().map(String::from))
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
        assert_eq!(parse("-nope x start"), Err(Error::Flag("-nope".into())));
        assert_eq!(parse("-id"), Err(Error::Value("id".into())));
        assert_eq!(
            parse("-namespace n -id i dance"),
            Err(Error::Action("dance".into()))
        );
        assert!(matches!(
            parse("-namespace n -id ../x start"),
            Err(Error::Id { .. })
        ));
        assert!(matches!(parse("-namespace n start"), Err(Error::Id { .. })));
    }
}
