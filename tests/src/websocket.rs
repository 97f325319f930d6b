//! The streaming side of the CRI: channels over a WebSocket, protocol `v4.channel.k8s.io` (one byte of
//! channel number, then data; kubectl's `exec`, `attach` and `port-forward` use the same server).

use std::net::TcpStream;

use anyhow::{Context, Result, bail};
use tungstenite::{Message, WebSocket, client::IntoClientRequest, http::HeaderValue};

use crate::Env;

/// Channel numbers of exec and attach.
pub const STDIN: u8 = 0;
/// See [`STDIN`].
pub const STDOUT: u8 = 1;
/// See [`STDIN`].
pub const STDERR: u8 = 2;
/// The exit status, as a Kubernetes `Status` object.
pub const ERROR: u8 = 3;
/// Terminal sizes, to the server.
pub const RESIZE: u8 = 4;

/// One connection.
#[derive(Debug)]
pub struct Channels {
    socket: WebSocket<TcpStream>,
    /// Bytes that came, by channel.
    pub received: [Vec<u8>; 5],
}

impl Channels {
    /// Opens the URL that the CRI answered with.
    ///
    /// # Errors
    /// Where the server refuses.
    pub fn open(env: &Env, url: &str) -> Result<Self> {
        let address = url.split('/').nth(2).context("URL without an address")?;
        let tcp = env.connect(address.parse()?)?;
        let mut request = url.replacen("http", "ws", 1).into_client_request()?;
        let protocol = HeaderValue::from_static("v4.channel.k8s.io");
        request
            .headers_mut()
            .insert("Sec-WebSocket-Protocol", protocol);
        let (socket, _) = tungstenite::client(request, tcp).map_err(|e| anyhow::anyhow!("{e}"))?;
        Ok(Self {
            socket,
            received: Default::default(),
        })
    }

    /// Sends bytes on a channel.
    ///
    /// # Errors
    /// Where the connection is gone.
    pub fn send(&mut self, channel: u8, data: &[u8]) -> Result<()> {
        let mut message = vec![channel];
        message.extend(data);
        Ok(self.socket.send(Message::Binary(message.into()))?)
    }

    /// Reads until `done` is satisfied or the server closes; `true` where it was satisfied.
    ///
    /// # Errors
    /// Where nothing comes for ten seconds.
    pub fn read_until(&mut self, mut done: impl FnMut(&[Vec<u8>; 5]) -> bool) -> Result<bool> {
        loop {
            if done(&self.received) {
                return Ok(true);
            }
            match self.socket.read() {
                Ok(Message::Binary(data)) if !data.is_empty() => {
                    let Some(channel) = self.received.get_mut(usize::from(data[0])) else {
                        bail!("channel {} is not one", data[0]);
                    };
                    channel.extend(&data[1..]);
                }
                Ok(Message::Close(_)) | Err(tungstenite::Error::ConnectionClosed) => {
                    return Ok(false);
                }
                Ok(_) => {}
                Err(tungstenite::Error::Protocol(_)) => return Ok(false),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Reads until the server closes.
    ///
    /// # Errors
    /// As [`Self::read_until`].
    pub fn read_to_end(&mut self) -> Result<()> {
        self.read_until(|_| false).map(drop)
    }

    /// What came on a channel, as text.
    #[must_use]
    pub fn text(&self, channel: u8) -> String {
        String::from_utf8_lossy(&self.received[usize::from(channel)]).into_owned()
    }
}
