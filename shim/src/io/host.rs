//! Opens what a client named for a process's streams.

use std::{fs, io, os::unix::fs::FileTypeExt, path::Path};

use tokio::net::unix::pipe;

use super::{Error, Uris, binary, copy::Sink};

/// Reading end of a client's input.
#[derive(Debug)]
pub(super) struct Stdin {
    pub(super) reader: pipe::Receiver,
    pub(super) keeper: Option<pipe::Sender>,
}

/// The client's ends, opened; nothing is copied yet.
#[derive(Default)]
pub struct HostEnds {
    pub(super) stdin: Option<Stdin>,
    pub(super) stdout: Option<Sink>,
    pub(super) stderr: Option<Sink>,
    pub(super) logger: Option<binary::Logger>,
}

impl HostEnds {
    /// Whether the client has an end for (stdin, stdout, stderr).
    #[must_use]
    pub fn wanted(&self) -> (bool, bool, bool) {
        (
            self.stdin.is_some(),
            self.stdout.is_some(),
            self.stderr.is_some(),
        )
    }
}

/// Opens the ends that `uris` name. `container_id` and `namespace` are told to a logging program.
///
/// # Errors
/// [`Error`] names the stream and why it cannot be used.
pub async fn open(uris: &Uris, namespace: &str, container_id: &str) -> Result<HostEnds, Error> {
    let mut ends = HostEnds::default();
    if !uris.stdin.is_empty() {
        ends.stdin = Some(stdin(&uris.stdin)?);
    }
    if let Some(program) = binary::Program::parse(&uris.stdout)? {
        let (logger, stdout, stderr) = binary::start(&program, namespace, container_id).await?;
        ends.stdout = Some(Box::new(stdout));
        ends.stderr = (!uris.terminal).then(|| Box::new(stderr) as Sink);
        ends.logger = Some(logger);
        return Ok(ends);
    }
    if !uris.stdout.is_empty() {
        ends.stdout = Some(sink(&uris.stdout)?);
    }
    if uris.wants_stderr() {
        ends.stderr = Some(sink(&uris.stderr)?);
    }
    Ok(ends)
}

fn stdin(uri: &str) -> Result<Stdin, Error> {
    let path = local_path(uri)?;
    let open = || -> io::Result<Stdin> {
        let options = pipe::OpenOptions::new();
        let reader = options.open_receiver(path)?;
        // The reader is open, so this does not fail for want of one.
        let keeper = options.open_sender(path)?;
        Ok(Stdin {
            reader,
            keeper: Some(keeper),
        })
    };
    open().map_err(|source| Error::Open {
        uri: uri.into(),
        source,
    })
}

fn sink(uri: &str) -> Result<Sink, Error> {
    let path = local_path(uri)?;
    let open = || -> io::Result<Sink> {
        let is_fifo = fs::metadata(path).is_ok_and(|m| m.file_type().is_fifo());
        if is_fifo {
            // Read-write: a client may detach and come back, and its absence is no broken pipe.
            return Ok(Box::new(
                pipe::OpenOptions::new()
                    .read_write(true)
                    .open_sender(path)?,
            ));
        }
        if uri.starts_with("file://")
            && let Some(parent) = path.parent()
        {
            fs::create_dir_all(parent)?;
        }
        let file = fs::OpenOptions::new()
            .append(true)
            .create(uri.starts_with("file://"))
            .open(path)?;
        Ok(Box::new(tokio::fs::File::from_std(file)))
    };
    open().map_err(|source| Error::Open {
        uri: uri.into(),
        source,
    })
}

/// The path of `file:///path`, `fifo:///path` or a bare absolute path.
fn local_path(uri: &str) -> Result<&Path, Error> {
    let path = uri
        .strip_prefix("file://")
        .or_else(|| uri.strip_prefix("fifo://"))
        .unwrap_or(uri);
    if path.starts_with('/') && !path.contains('\0') {
        Ok(Path::new(path))
    } else {
        Err(Error::Scheme { uri: uri.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_schemes_are_refused_by_name() {
        for bad in [
            "npipe:////x",
            "tcp://1.2.3.4:5",
            "relative",
            "file://relative",
        ] {
            let e = local_path(bad).expect_err(bad).to_string();
            assert!(e.contains(bad), "{e}");
        }
    }
}
