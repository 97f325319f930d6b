//! The first line of a stream connection: which stream of which process, or which TCP port, it is.
//! Definitions and their encoding only.
//!
//! The shim connects to [`STREAM_PORT`](crate::STREAM_PORT) and sends one line; the agent answers
//! `OK\n` and from then on the connection carries raw bytes, or answers `ERR <reason>\n` and closes.
//!
//! ```text
//! stdin  <container id> <exec id, or - for init>\n     host → guest; the host's half-close is EOF
//! stdout <container id> <exec id, or ->\n              guest → host; EOF when all writers are gone
//! stderr <container id> <exec id, or ->\n
//! tcp    <port>\n                                      both ways, to 127.0.0.1 (then ::1) in the guest
//! ```
//! A process with a terminal has one output stream, `stdout`. Each stream is attached at most once.

use crate::valid_id;

/// Longest header line, newline included.
pub const HEADER_MAX: usize = 2 * crate::ID_MAX + 16;

/// Which standard stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stdio {
    /// To the process.
    Stdin,
    /// From the process, or from its terminal.
    Stdout,
    /// From the process.
    Stderr,
}

/// What a stream connection is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Header {
    /// A standard stream of a process; `exec_id` is empty for the container's init.
    Stdio {
        /// Which stream.
        stream: Stdio,
        /// Container.
        container_id: String,
        /// Exec id, or empty.
        exec_id: String,
    },
    /// A TCP connection to a port on the guest's loopback.
    Tcp {
        /// Port, not 0.
        port: u16,
    },
}

/// A header line that is not one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("Not a stream header: expected `stdin|stdout|stderr <container> <exec>` or `tcp <port>`")]
pub struct BadHeader;

impl Header {
    /// The line, newline included.
    #[must_use]
    pub fn encode(&self) -> String {
        match self {
            Self::Stdio {
                stream,
                container_id,
                exec_id,
            } => {
                let name = match stream {
                    Stdio::Stdin => "stdin",
                    Stdio::Stdout => "stdout",
                    Stdio::Stderr => "stderr",
                };
                let exec = if exec_id.is_empty() { "-" } else { exec_id };
                format!("{name} {container_id} {exec}\n")
            }
            Self::Tcp { port } => format!("tcp {port}\n"),
        }
    }

    /// Reads a line, with or without its newline.
    ///
    /// # Errors
    /// [`BadHeader`] for anything that [`Header::encode`] does not write.
    pub fn decode(line: &[u8]) -> Result<Self, BadHeader> {
        if line.len() > HEADER_MAX {
            return Err(BadHeader);
        }
        let line = std::str::from_utf8(line).map_err(|_| BadHeader)?;
        let line = line.strip_suffix('\n').unwrap_or(line);
        let words: Vec<&str> = line.split(' ').collect();
        let stream = match words.as_slice() {
            ["tcp", port] => {
                let port: u16 = port.parse().map_err(|_| BadHeader)?;
                return if port == 0 {
                    Err(BadHeader)
                } else {
                    Ok(Self::Tcp { port })
                };
            }
            ["stdin", _, _] => Stdio::Stdin,
            ["stdout", _, _] => Stdio::Stdout,
            ["stderr", _, _] => Stdio::Stderr,
            _ => return Err(BadHeader),
        };
        if !valid_id(words[1]) || !(words[2] == "-" || valid_id(words[2])) {
            return Err(BadHeader);
        }
        let exec_id = if words[2] == "-" { "" } else { words[2] };
        Ok(Self::Stdio {
            stream,
            container_id: words[1].into(),
            exec_id: exec_id.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_header_survives_a_round_trip() {
        let stdio = |stream, exec: &str| Header::Stdio {
            stream,
            container_id: "c1".into(),
            exec_id: exec.into(),
        };
        for h in [
            stdio(Stdio::Stdin, ""),
            stdio(Stdio::Stdout, "e1"),
            stdio(Stdio::Stderr, "e-2"),
            Header::Tcp { port: 80 },
        ] {
            assert_eq!(Header::decode(h.encode().as_bytes()), Ok(h));
        }
    }

    #[test]
    fn hostile_headers_are_refused() {
        for bad in [
            "",
            "\n",
            "stdin",
            "stdin c",
            "stdin c e x",
            "stdin ../x -",
            "tcp 0",
            "tcp 65536",
            "tcp -1",
            "console x",
            "STDIN c -",
            "stdin  -",
            "stdout c \n",
        ] {
            assert_eq!(Header::decode(bad.as_bytes()), Err(BadHeader), "{bad:?}");
        }
        assert_eq!(Header::decode(&[0xff; 8]), Err(BadHeader));
        assert_eq!(Header::decode(&vec![b'a'; HEADER_MAX + 1]), Err(BadHeader));
    }
}
