//! Clients below the library's: whole requests, half ones, and bytes that are none, over TLS to a
//! pinned certificate.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;

use crate::lab::Server;

pub(crate) type Tls = StreamOwned<ClientConnection, TcpStream>;

/// Longest that a client of a test waits for anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// A TLS connection, as any client makes one that was given the server's certificate: names and dates
/// are checked.
pub(crate) fn connect(server: &Server) -> Tls {
    connect_from(server, [127, 0, 0, 1].into())
}

/// As [`connect`], from another address of loopback.
pub(crate) fn connect_from(server: &Server, from: IpAddr) -> Tls {
    let mut roots = RootCertStore::empty();
    let path = server.dir.path().join("state/tls-certificate.pem");
    roots
        .add(CertificateDer::from_pem_file(path).expect("certificate"))
        .expect("root");
    let config = ClientConfig::builder_with_provider(Arc::new(
        rustls::crypto::aws_lc_rs::default_provider(),
    ))
    .with_protocol_versions(&[&rustls::version::TLS13])
    .expect("TLS 1.3")
    .with_root_certificates(roots)
    .with_no_client_auth();
    let name = ServerName::try_from("localhost").expect("name");
    let connection = ClientConnection::new(Arc::new(config), name).expect("client");
    StreamOwned::new(connection, tcp(server.address, from))
}

/// A TCP connection from an address of loopback.
pub(crate) fn tcp(to: SocketAddr, from: IpAddr) -> TcpStream {
    use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
    let fd = socket(AddressFamily::INET, SocketType::STREAM, None).expect("socket");
    bind(&fd, &SocketAddr::new(from, 0)).expect("bind");
    connect(&fd, &to).expect("connect");
    let stream = TcpStream::from(fd);
    stream.set_nodelay(true).expect("no delay");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
    stream
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The value of a header.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|l| l.split_once(':'));
        let mut found = lines.filter(|(n, _)| n.eq_ignore_ascii_case(name));
        found.next().map(|(_, value)| value.trim())
    }
}

/// Reads an answer; `None` when the connection ends first.
pub(crate) fn receive(stream: &mut impl Read) -> Option<Answer> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    let (head, length) = loop {
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..at]).into_owned();
            let length = head.lines().find_map(|l| {
                l.to_ascii_lowercase()
                    .strip_prefix("content-length:")?
                    .trim()
                    .parse()
                    .ok()
            });
            break (head, at + 4 + length.unwrap_or(0));
        }
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => return None,
            Ok(n) => bytes.extend_from_slice(&chunk[..n]),
        }
    };
    while bytes.len() < length {
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => return None,
            Ok(n) => bytes.extend_from_slice(&chunk[..n]),
        }
    }
    let body = bytes.split_off(head.len() + 4);
    Some(Answer {
        status: head.split(' ').nth(1)?.parse().ok()?,
        head,
        body: String::from_utf8_lossy(&body).into_owned(),
    })
}

/// The text of a request.
pub(crate) fn request(method: &str, path: &str, headers: &str, body: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n{headers}\r\n{body}",
        body.len()
    )
}

/// One request on a connection of its own.
pub(crate) fn send(server: &Server, method: &str, path: &str, headers: &str, body: &str) -> Answer {
    let mut stream = connect(server);
    let text = request(method, path, headers, body);
    // A server that refuses early does not read it all.
    let _ = stream.write_all(text.as_bytes());
    receive(&mut stream).unwrap_or_else(|| panic!("no answer to {method} {path}"))
}

/// Status and body of a GET.
pub(crate) fn get(server: &Server, path: &str) -> (u16, String) {
    let answer = send(server, "GET", path, "", "");
    (answer.status, answer.body)
}

/// Status and body of a POST of JSON.
pub(crate) fn post(server: &Server, path: &str, body: &Value) -> Answer {
    let headers = "Content-Type: application/json\r\n";
    send(server, "POST", path, headers, &body.to_string())
}
