//! Opens what a client named for a process's streams.

use std::{
    fs, io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::libc::{ENXIO, O_PATH};
use tokio::net::unix::pipe;

use super::{Error, Uris, binary, copy::Sink};

/// How long a client may take to open the reading end of a fifo that it has named.
const READER: Duration = Duration::from_secs(5);

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
        ends.stdout = Some(sink(&uris.stdout).await?);
    }
    if uris.wants_stderr() {
        ends.stderr = Some(sink(&uris.stderr).await?);
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

async fn sink(uri: &str) -> Result<Sink, Error> {
    let path = local_path(uri)?;
    let open = async {
        if fs::metadata(path).is_ok_and(|m| m.file_type().is_fifo()) {
            return Ok(Box::new(output_fifo(path, READER).await?) as Sink);
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
        Ok::<Sink, io::Error>(Box::new(tokio::fs::File::from_std(file)))
    };
    open.await.map_err(|source| Error::Open {
        uri: uri.into(),
        source,
    })
}

/// A fifo for output, once its reader is there: one that opens it after a short process has ended and been
/// closed would wait for a writer for ever. Without a reader in time it is opened all the same.
async fn output_fifo(path: &Path, patience: Duration) -> io::Result<pipe::Sender> {
    // By this it can be opened, and a thread that waits set free, though a client has removed the name.
    let fifo = fs::OpenOptions::new()
        .read(true)
        .custom_flags(O_PATH)
        .open(path)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", fifo.as_raw_fd()));
    let options = pipe::OpenOptions::new();
    // Ours alone is enough to read: a client may detach and come back, and its absence is no broken pipe.
    let both = || pipe::OpenOptions::new().read_write(true).open_sender(&path);
    match options.open_sender(&path) {
        Ok(reader_is_there) => {
            let opened = both();
            drop(reader_is_there);
            return opened;
        }
        Err(e) if e.raw_os_error() == Some(ENXIO) => {}
        Err(e) => return Err(e),
    }
    let waits = path.clone();
    let reader =
        tokio::task::spawn_blocking(move || fs::OpenOptions::new().write(true).open(waits));
    tokio::pin!(reader);
    let came = tokio::time::timeout(patience, &mut reader).await;
    // Also the reader that a thread still waits for.
    let opened = both();
    if came.is_err() {
        tracing::warn!("Nobody reads a process's output yet");
    }
    opened
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
    use tokio::io::AsyncWriteExt;

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

    #[tokio::test]
    async fn a_reader_that_comes_late_gets_all_of_a_short_output() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("out");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
        let uri = path.to_string_lossy().into_owned();
        let opening = tokio::spawn(async move { sink(&uri).await });
        // The process would be over by now if nobody waited for its reader.
        tokio::task::yield_now().await;
        let reading = tokio::task::spawn_blocking(move || fs::read_to_string(path));
        let mut sink = opening.await.expect("task").expect("sink");
        sink.write_all(b"all of it").await.expect("write");
        drop(sink);
        let read = tokio::time::timeout(READER, reading)
            .await
            .expect("in time");
        assert_eq!(read.expect("task").expect("read"), "all of it");
    }

    #[tokio::test]
    async fn a_fifo_that_nobody_reads_is_opened_after_a_while() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("out");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
        let opened = output_fifo(&path, Duration::from_millis(10)).await;
        let mut sink = opened.expect("sink");
        sink.write_all(b"kept").await.expect("write");
    }
}
