//! One request over one connection. HTTP/1.0, so that the answer has a length and no chunks and the
//! connection ends with it; everything has a cap and one deadline.

use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::RemoteError;

/// Longest head of an answer.
const MAX_HEAD: usize = 16 << 10;
/// Most header lines of an answer.
const MAX_HEADERS: usize = 48;
/// Longest body of an answer: a token has at most 64 KiB.
const MAX_BODY: usize = 256 << 10;

/// A socket all of whose operations end by one deadline.
pub(super) struct Timed {
    stream: TcpStream,
    end: Instant,
}

impl Timed {
    /// Connects to the first address that answers.
    pub(super) fn connect(host: &str, port: u16, time: Duration) -> Result<Self, RemoteError> {
        let end = Instant::now() + time;
        let failed = |error| RemoteError::Connect(format!("{host}:{port}"), error);
        let mut last = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
        for address in (host, port).to_socket_addrs().map_err(failed)? {
            match TcpStream::connect_timeout(&address, left(end).map_err(failed)?) {
                Ok(stream) => {
                    stream.set_nodelay(true).map_err(failed)?;
                    return Ok(Self { stream, end });
                }
                Err(error) => last = error,
            }
        }
        Err(failed(last))
    }
}

fn left(end: Instant) -> std::io::Result<Duration> {
    match end.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(std::io::ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.stream.set_read_timeout(Some(left(self.end)?))?;
        self.stream.read(buffer)
    }
}

impl Write for Timed {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        self.stream.set_write_timeout(Some(left(self.end)?))?;
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stream.flush()
    }
}

/// Sends a request; a body makes it a POST.
pub(super) fn send(
    stream: &mut impl Write,
    host: &str,
    path: &str,
    body: Option<&[u8]>,
) -> std::io::Result<()> {
    let head = match body {
        Some(body) => format!(
            "POST {path} HTTP/1.0\r\nHost: {host}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        ),
        None => format!("GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n"),
    };
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.unwrap_or_default())?;
    stream.flush()
}

/// Reads an answer: its status and body.
pub(super) fn receive(stream: &mut impl Read) -> Result<(u16, Vec<u8>), RemoteError> {
    let mut bytes = Vec::new();
    let (status, start, length) = loop {
        let mut chunk = [0; 4096];
        let read = stream.read(&mut chunk).map_err(RemoteError::Read)?;
        if read == 0 {
            return Err(RemoteError::Answer("ends within its head"));
        }
        bytes.extend_from_slice(&chunk[..read]);
        if let Some(head) = parse(&bytes)? {
            break head;
        }
        if bytes.len() > MAX_HEAD {
            return Err(RemoteError::Answer("head is longer than 16 KiB"));
        }
    };
    let mut body = bytes.split_off(start);
    if body.len() > length {
        return Err(RemoteError::Answer("is longer than its Content-Length"));
    }
    let from = body.len();
    body.resize(length, 0);
    stream
        .read_exact(&mut body[from..])
        .map_err(RemoteError::Read)?;
    Ok((status, body))
}

/// Status, where the body begins and its length; `None` while the head is not whole.
fn parse(bytes: &[u8]) -> Result<Option<(u16, usize, usize)>, RemoteError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let start = match response.parse(bytes) {
        Ok(httparse::Status::Complete(start)) => start,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(RemoteError::Answer("is not HTTP")),
    };
    let named = |name: &str| {
        let found = response.headers.iter();
        found
            .filter(|h| h.name.eq_ignore_ascii_case(name))
            .map(|h| h.value)
            .collect::<Vec<_>>()
    };
    if !named("Transfer-Encoding").is_empty() {
        return Err(RemoteError::Answer("comes in chunks"));
    }
    let length = match named("Content-Length")[..] {
        [value] => std::str::from_utf8(value).ok().and_then(|v| v.parse().ok()),
        _ => None,
    };
    match (response.code, length) {
        (Some(status), Some(length)) if length <= MAX_BODY => Ok(Some((status, start, length))),
        _ => Err(RemoteError::Answer(
            "has no Content-Length of at most 256 KiB",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_from_any_pieces() {
        struct Slow<'a>(&'a [u8]);
        impl Read for Slow<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
                let n = self.0.len().min(3).min(buffer.len());
                buffer[..n].copy_from_slice(&self.0[..n]);
                self.0 = &self.0[n..];
                Ok(n)
            }
        }
        let text = b"HTTP/1.0 403 Forbidden\r\ncontent-length: 4\r\nx: y\r\n\r\nbody";
        let (status, body) = receive(&mut Slow(text)).unwrap();
        assert_eq!((status, &body[..]), (403, &b"body"[..]));
        assert!(receive(&mut Slow(&text[..text.len() - 1])).is_err());
    }

    #[test]
    fn answers_without_one_length_are_refused() {
        for text in [
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\na",
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab",
            "SSH-2.0-x\r\n\r\n",
            "",
        ] {
            assert!(receive(&mut text.as_bytes()).is_err(), "{text}");
        }
    }
}
