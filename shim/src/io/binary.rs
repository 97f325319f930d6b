//! `binary://` streams: a program that the client names reads the output from descriptors 3 and 4 and
//! closes descriptor 5 when it is ready. Source: containerd's runtime v2 README, "Logging".

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    process::Stdio,
    time::Duration,
};

use command_fds::{CommandFdExt, FdMapping};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe,
    process::{Child, Command},
};

use super::Error;
use crate::child::SMALL_STACKS;

/// A logging program that is not ready by then is treated as one that did not start.
const READY: Duration = Duration::from_secs(10);

/// The started program. It sees the end of its input when the streams are dropped, and ends by itself.
#[derive(Debug)]
pub(super) struct Logger {
    _child: Child,
}

/// `binary:///path?key=value&…`: program and arguments (key, value, key, value …).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Program {
    path: String,
    args: Vec<String>,
}

impl Program {
    /// `None` where `uri` has another scheme.
    pub(super) fn parse(uri: &str) -> Result<Option<Self>, Error> {
        let Some(rest) = uri.strip_prefix("binary://") else {
            return Ok(None);
        };
        let bad = || Error::Scheme { uri: uri.into() };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = unescape(path)
            .filter(|p| p.starts_with('/'))
            .ok_or_else(bad)?;
        let mut args = Vec::new();
        for pair in query.split('&').filter(|p| !p.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            args.push(unescape(key).ok_or_else(bad)?);
            let value = unescape(value).ok_or_else(bad)?;
            if !value.is_empty() {
                args.push(value);
            }
        }
        Ok(Some(Self { path, args }))
    }
}

/// Query unescaping (`%41`, `+`); `None` where it is malformed.
fn unescape(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        out.push(match b {
            b'+' => b' ',
            b'%' => {
                let hex = [bytes.next()?, bytes.next()?];
                u8::from_str_radix(std::str::from_utf8(&hex).ok()?, 16).ok()?
            }
            other => other,
        });
    }
    String::from_utf8(out).ok().filter(|t| !t.contains('\0'))
}

/// Starts `program`; returns it and the writing ends of its standard output and error.
pub(super) async fn start(
    program: &Program,
    namespace: &str,
    container_id: &str,
) -> Result<(Logger, pipe::Sender, pipe::Sender), Error> {
    let run = async {
        let (out_read, out) = io::pipe()?;
        let (err_read, err) = io::pipe()?;
        let (ready, ready_child) = io::pipe()?;
        let fd = |parent_fd: OwnedFd, child_fd| FdMapping {
            parent_fd,
            child_fd,
        };
        let mut command = std::process::Command::new(&program.path);
        command
            .args(&program.args)
            .env_remove(SMALL_STACKS.0)
            .env("CONTAINER_ID", container_id)
            .env("CONTAINER_NAMESPACE", namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
            .fd_mappings(vec![
                fd(out_read.into(), 3),
                fd(err_read.into(), 4),
                fd(ready_child.into(), 5),
            ])
            .map_err(io::Error::other)?;
        let mut command = Command::from(command);
        let child = command.spawn()?;
        // The command holds the child's ends; ours must be the last ones left.
        drop(command);
        let mut ready = receiver(ready.into())?;
        let mut byte = [0; 1];
        match tokio::time::timeout(READY, ready.read(&mut byte)).await {
            Ok(read) => read?,
            Err(_) => return Err(io::Error::new(io::ErrorKind::TimedOut, "not ready in time")),
        };
        Ok((
            Logger { _child: child },
            sender(out.into())?,
            sender(err.into())?,
        ))
    };
    run.await.map_err(|source| Error::Logger {
        path: program.path.clone(),
        source,
    })
}

fn nonblocking(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(())
}

fn sender(fd: OwnedFd) -> io::Result<pipe::Sender> {
    nonblocking(&fd)?;
    pipe::Sender::from_owned_fd(fd)
}

fn receiver(fd: OwnedFd) -> io::Result<pipe::Receiver> {
    nonblocking(&fd)?;
    pipe::Receiver::from_owned_fd(fd)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[test]
    fn arguments_come_from_the_query() -> Result<(), Error> {
        let p = Program::parse("binary:///usr/bin/log?_A=%2Fvar%2Flog&b=c+d&flag")?;
        assert_eq!(
            p,
            Some(Program {
                path: "/usr/bin/log".into(),
                args: ["_A", "/var/log", "b", "c d", "flag"]
                    .map(String::from)
                    .into(),
            })
        );
        assert_eq!(Program::parse("/run/fifo")?, None);
        assert!(Program::parse("binary://relative").is_err());
        assert!(Program::parse("binary:///x?a=%zz").is_err());
        Ok(())
    }

    #[tokio::test]
    async fn a_logging_program_gets_the_output_and_then_its_end() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let log = dir.path().join("log");
        let script = dir.path().join("logger");
        std::fs::write(
            &script,
            "#!/bin/sh\nexec 5>&-\ncat <&3 >\"$1.tmp\"\necho \"$CONTAINER_NAMESPACE/$CONTAINER_ID\" >>\"$1.tmp\"\nmv \"$1.tmp\" \"$1\"\n",
        )?;
        let mut mode = std::fs::metadata(&script)?.permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o755);
        std::fs::set_permissions(&script, mode)?;
        let uri = format!("binary://{}?{}", script.display(), log.display());
        let program = Program::parse(&uri)?.ok_or_else(|| anyhow::anyhow!("binary"))?;
        let (mut logger, mut out, err) = start(&program, "ns", "c1").await?;
        out.write_all(b"hello\n").await?;
        drop((out, err));
        assert!(logger._child.wait().await?.success());
        assert_eq!(std::fs::read_to_string(log)?, "hello\nns/c1\n");
        Ok(())
    }
}
