//! Clients that are no good: each kind breaks one rule, and tells what became of it.

use std::io::Write;
use std::net::IpAddr;
use std::time::Duration;

use serde_json::Value;

use crate::client::{connect_from, receive, request};
use crate::drive::Load;
use crate::lab::Server;

/// What a bad client does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// Half a head, and nothing more.
    Half,
    /// A body of which a byte comes ten times a second.
    Slow,
    /// A body beyond the cap.
    Oversized,
    /// As large as is allowed, and a million arrays deep.
    Deep,
    /// Bytes that are no request.
    Noise,
    /// A part of a body, and gone.
    Gone,
    /// Evidence that was accepted before, once more.
    Replay,
}

impl Kind {
    pub(crate) const ALL: [Self; 7] = [
        Self::Half,
        Self::Slow,
        Self::Oversized,
        Self::Deep,
        Self::Noise,
        Self::Gone,
        Self::Replay,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Half => "half",
            Self::Slow => "slow",
            Self::Oversized => "oversized",
            Self::Deep => "deep",
            Self::Noise => "noise",
            Self::Gone => "gone",
            Self::Replay => "replay",
        }
    }

    /// Tries it once: how that ended. `None` if there is nothing to try yet.
    fn once(self, server: &Server, from: IpAddr, load: &Load) -> Option<String> {
        if matches!(self, Self::Replay) {
            let used = load.used()?;
            return Some(load.judge(server, from, &used).1);
        }
        let mut stream = connect_from(server, from);
        let announced = |length: usize| {
            format!("POST /v1/appraise HTTP/1.1\r\nHost: l\r\nContent-Length: {length}\r\n\r\n")
        };
        // What a server that refuses early does not read any more is an error here, and no matter.
        let _ = match self {
            Self::Half => stream.write_all(b"POST /v1/appraise HTTP/1.1\r\nHost: l"),
            Self::Slow => stream.write_all(announced(1000).as_bytes()),
            Self::Oversized => stream.write_all(announced((4 << 20) + 1).as_bytes()),
            Self::Deep => {
                let body = "[".repeat(1 << 20);
                stream.write_all(request("POST", "/v1/appraise", "", &body).as_bytes())
            }
            Self::Noise => stream.write_all(&[0xff; 5000]),
            Self::Gone => {
                let part = [announced(4_000_000).into_bytes(), vec![b'['; 100_000]].concat();
                stream.write_all(&part)
            }
            Self::Replay => Ok(()),
        };
        if matches!(self, Self::Gone) {
            return Some("left".into());
        }
        if matches!(self, Self::Slow) {
            drip(&mut stream);
        }
        Some(receive(&mut stream).map_or("cut".into(), |answer| {
            let check = serde_json::from_str::<Value>(&answer.body).unwrap_or_default();
            match check["error"].as_str() {
                Some(error) => format!("{} {error}", answer.status),
                None => answer.status.to_string(),
            }
        }))
    }

    /// Again and again, until the load is over.
    pub(crate) fn run(self, server: &Server, from: IpAddr, load: &Load) {
        while !load.over() {
            if let Some(end) = self.once(server, from, load) {
                load.bad(self, end);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// A byte at a time, until shortly before a body's time is over: whoever writes on after that loses
/// the answer.
fn drip(stream: &mut impl Write) {
    for _ in 0..15 {
        if stream
            .write_all(b"[")
            .and_then(|()| stream.flush())
            .is_err()
        {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}
