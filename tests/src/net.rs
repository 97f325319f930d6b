//! TCP from the "host" of an environment: connections made inside its network namespace.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result};

use crate::{Env, wait};

const LIMIT: Duration = Duration::from_secs(10);

impl Env {
    /// The IPv4 address that a container's `eth0` has, as seen from inside.
    ///
    /// # Panics
    /// Where it has none.
    #[track_caller]
    pub fn pod_address(&self, id: &str) -> IpAddr {
        let script = "ip -4 -o addr show eth0 | sed 's/.*inet \\([0-9.]*\\).*/\\1/'";
        let done = self.ctr_exec(id, "address", &["sh", "-c", script]).ok();
        done.stdout.trim().parse().expect(&done.stdout)
    }

    /// A connection from the environment's host side.
    ///
    /// # Errors
    /// Where nobody answers.
    pub fn connect(&self, address: SocketAddr) -> Result<TcpStream> {
        // A socket stays in the namespace that it was made in.
        let stream = self
            .namespaces
            .enter_net(|| TcpStream::connect_timeout(&address, LIMIT * wait::patience()))
            .with_context(|| address.to_string())?;
        stream.set_read_timeout(Some(LIMIT * wait::patience()))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// One HTTP GET of `/`; returns status line and body as they came.
    ///
    /// # Errors
    /// Where nobody answers.
    pub fn http_get(&self, address: SocketAddr) -> Result<String> {
        let mut stream = self.connect(address)?;
        write!(stream, "GET / HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }
}
