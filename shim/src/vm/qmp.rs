//! A client of QEMU's monitor protocol (QMP): one JSON object a line over a connection that was
//! opened before QEMU ran. QEMU may be under the guest's control, so what it says is capped and
//! checked like the guest's own words.

use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, oneshot};

use super::VmError;

/// Longest line that is read, bytes. QEMU's replies to what is asked here have a few hundred.
const LINE_MAX: usize = 64 << 10;
/// Events that wait for a slow listener; older ones are dropped.
const EVENTS_MAX: usize = 32;
/// How long QEMU may take for an answer. It answers in milliseconds unless the machine is overloaded.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longest text of QEMU that is put into an error, characters.
const REASON_MAX: usize = 500;

/// An asynchronous message of QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) name: String,
    /// The member of its data that matters: `reason` of SHUTDOWN, `device` of DEVICE_DELETED.
    pub(super) subject: String,
}

/// A line of QEMU.
#[derive(Debug, PartialEq)]
enum Message {
    Greeting,
    Reply(u64, Answer),
    Event(Event),
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    id: Option<u64>,
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    data: Option<Value>,
}

#[derive(Debug, PartialEq, Deserialize)]
struct Refusal {
    #[serde(default)]
    class: String,
    desc: String,
}

fn parse(line: &[u8]) -> Option<Message> {
    let line: Line = serde_json::from_slice(line).ok()?;
    if line.greeting.is_some() {
        return Some(Message::Greeting);
    }
    if let Some(name) = line.event {
        let member = |key| Some(line.data.as_ref()?.get(key)?.as_str()?.to_owned());
        let subject = member("device").or_else(|| member("reason"));
        return Some(Message::Event(Event {
            name,
            subject: subject.unwrap_or_default(),
        }));
    }
    let answer = match (line.value, line.error) {
        (Some(value), None) => Ok(value),
        (None, Some(mut refusal)) => {
            refusal.desc = refusal.desc.chars().take(REASON_MAX).collect();
            Err(refusal)
        }
        _ => return None,
    };
    Some(Message::Reply(line.id?, answer))
}

type Answer = Result<Value, Refusal>;

/// What the reading task and the callers share.
struct Shared {
    /// Callers that wait for an answer; `None` once the connection has ended.
    waiting: Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>,
    events: broadcast::Sender<Event>,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Option<HashMap<u64, oneshot::Sender<Answer>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An open monitor.
pub(super) struct Qmp {
    stream: Arc<UnixStream>,
    shared: Arc<Shared>,
    /// Keeps lines whole.
    writing: tokio::sync::Mutex<()>,
    next: AtomicU64,
}

impl Qmp {
    /// Waits for QEMU's greeting on `stream` and enters command mode.
    pub(super) async fn connect(stream: UnixStream) -> Result<Self, VmError> {
        let stream = Arc::new(stream);
        let shared = Arc::new(Shared {
            waiting: Mutex::new(Some(HashMap::new())),
            events: broadcast::Sender::new(EVENTS_MAX),
        });
        let (greeted, greeting) = oneshot::channel();
        tokio::spawn(read(Arc::clone(&stream), Arc::clone(&shared), greeted));
        match tokio::time::timeout(PATIENCE, greeting).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(VmError::Ended),
            Err(_) => return Err(silent("greeting")),
        }
        let qmp = Self {
            stream,
            shared,
            writing: tokio::sync::Mutex::new(()),
            next: AtomicU64::new(1),
        };
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Events from now on.
    pub(super) fn events(&self) -> broadcast::Receiver<Event> {
        self.shared.events.subscribe()
    }

    /// Has QEMU do `command`.
    pub(super) async fn execute(&self, command: &str, args: Value) -> Result<Value, VmError> {
        self.call(command, args, None).await
    }

    /// Has QEMU do `command`, which takes the descriptor `fd`.
    pub(super) async fn execute_with_fd(
        &self,
        command: &str,
        args: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, VmError> {
        self.call(command, args, Some(fd)).await
    }

    async fn call(
        &self,
        command: &str,
        args: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, VmError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let subject = args.get("id").and_then(Value::as_str).map(str::to_owned);
        let mut line = json!({"execute": command, "arguments": args, "id": id}).to_string();
        line.push('\n');
        let (tell, answer) = oneshot::channel();
        match self.shared.waiting().as_mut() {
            Some(waiting) => waiting.insert(id, tell),
            None => return Err(VmError::Ended),
        };
        let asked = async {
            self.send(line.as_bytes(), fd)
                .await
                .map_err(|_| VmError::Ended)?;
            match answer.await {
                Ok(Ok(value)) => Ok(value),
                // qapi/error.json
                Ok(Err(refusal)) if refusal.class == "DeviceNotFound" => {
                    Err(VmError::NoDevice(subject.unwrap_or_default()))
                }
                Ok(Err(refusal)) => Err(VmError::Refused {
                    command: command.into(),
                    reason: refusal.desc,
                }),
                Err(_) => Err(VmError::Ended),
            }
        };
        let result = tokio::time::timeout(PATIENCE, asked).await;
        if let Some(waiting) = self.shared.waiting().as_mut() {
            waiting.remove(&id);
        }
        result.unwrap_or_else(|_| Err(silent(command)))
    }

    async fn send(&self, line: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let _whole = self.writing.lock().await;
        let mut rest = line;
        let mut fd = fd;
        while !rest.is_empty() {
            let sent = self.stream.async_io(Interest::WRITABLE, || {
                let fds = fd.as_slice();
                let mut space =
                    [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
                let parts = [io::IoSlice::new(rest)];
                let n = sendmsg(&*self.stream, &parts, &mut control, SendFlags::NOSIGNAL)?;
                Ok(n)
            });
            rest = &rest[sent.await?..];
            fd = None;
        }
        Ok(())
    }
}

fn silent(command: &str) -> VmError {
    VmError::Silent {
        command: command.into(),
        seconds: PATIENCE.as_secs(),
    }
}

/// Reads until the connection ends or a line is no line of QMP's.
async fn read(stream: Arc<UnixStream>, shared: Arc<Shared>, greeted: oneshot::Sender<()>) {
    let mut greeted = Some(greeted);
    let mut pending = Vec::new();
    let mut chunk = vec![0u8; 4096];
    loop {
        let n = match stream
            .async_io(Interest::READABLE, || stream.try_read(&mut chunk))
            .await
        {
            Ok(n @ 1..) => n,
            _ => break,
        };
        pending.extend_from_slice(&chunk[..n]);
        while let Some(end) = pending.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            match parse(&line) {
                Some(Message::Greeting) => {
                    if let Some(greeted) = greeted.take() {
                        let _ = greeted.send(());
                    }
                }
                Some(Message::Event(event)) => {
                    // Nobody need listen.
                    let _ = shared.events.send(event);
                }
                Some(Message::Reply(id, answer)) => {
                    let asked = shared.waiting().as_mut().and_then(|w| w.remove(&id));
                    if let Some(asked) = asked {
                        let _ = asked.send(answer);
                    }
                }
                None => {}
            }
        }
        if pending.len() > LINE_MAX {
            tracing::warn!("QEMU sent a line of more than {LINE_MAX} bytes; its monitor is closed");
            break;
        }
    }
    // Drops the callers' channels, which tells them.
    shared.waiting().take();
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    #[test]
    fn hostile_lines_are_no_messages() {
        for bad in [
            "",
            "{}",
            "[]",
            "null",
            "{\"return\":{}}",
            "{\"id\":-1,\"return\":{}}",
            "{\"id\":\"1\",\"return\":{}}",
            "{\"id\":1,\"return\":{},\"error\":{\"desc\":\"x\"}}",
            "{\"id\":1}",
            "{\"event\":7}",
            "{\"id\":1,\"error\":\"x\"}",
            "{\"QMP\":",
            "\u{0}",
        ] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad:?}");
        }
        assert_eq!(parse(&[0xff; 100]), None);
        let deep = "[".repeat(10_000);
        assert_eq!(parse(deep.as_bytes()), None);
        let long = format!(
            "{{\"id\":1,\"error\":{{\"desc\":\"{}\"}}}}",
            "x".repeat(9000)
        );
        let Some(Message::Reply(1, Err(reason))) = parse(long.as_bytes()) else {
            panic!("not a refusal");
        };
        assert_eq!(reason.desc.len(), REASON_MAX);
    }

    #[test]
    fn events_carry_what_matters() {
        let event = |line: &str| match parse(line.as_bytes()) {
            Some(Message::Event(e)) => (e.name, e.subject),
            other => panic!("{other:?}"),
        };
        assert_eq!(
            event(
                r#"{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-reset"},"timestamp":{}}"#
            ),
            ("SHUTDOWN".into(), "guest-reset".into())
        );
        assert_eq!(
            event(r#"{"event":"DEVICE_DELETED","data":{"device":"d1","path":"/x"}}"#),
            ("DEVICE_DELETED".into(), "d1".into())
        );
        assert_eq!(
            event(r#"{"event":"X","data":[]}"#),
            ("X".into(), String::new())
        );
    }

    /// A QEMU that answers each line by `answer`.
    fn pretend(answer: impl Fn(Value) -> String + Send + 'static) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn(async move {
            let (read, mut write) = theirs.into_split();
            write
                .write_all(b"{\"QMP\":{\"version\":{}}}\r\n")
                .await
                .unwrap();
            let mut lines = BufReader::new(read).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let text = answer(serde_json::from_str(&line).unwrap());
                if write.write_all(text.as_bytes()).await.is_err() {
                    break;
                }
            }
        });
        ours
    }

    #[tokio::test]
    async fn answers_reach_their_askers_whatever_comes_between() {
        let stream = pretend(|ask| {
            let id = &ask["id"];
            format!(
                "{{\"event\":\"RESUME\"}}\nnonsense\n{{\"return\":{{}},\"id\":99999}}\n{{\"return\":{{\"echo\":{}}},\"id\":{id}}}\n",
                ask["execute"]
            )
        });
        let qmp = Arc::new(Qmp::connect(stream).await.unwrap());
        let mut events = qmp.events();
        let asks = ["a", "b", "c"].map(|name| {
            let qmp = Arc::clone(&qmp);
            tokio::spawn(async move { (name, qmp.execute(name, json!({})).await.unwrap()) })
        });
        for ask in asks {
            let (name, value) = ask.await.unwrap();
            assert_eq!(value["echo"], name);
        }
        assert_eq!(events.recv().await.unwrap().name, "RESUME");
    }

    #[tokio::test]
    async fn a_refusal_names_the_command_and_the_reason() {
        let stream = pretend(|ask| match ask["execute"].as_str() {
            Some("qmp_capabilities") => format!("{{\"return\":{{}},\"id\":{}}}\n", ask["id"]),
            _ => format!(
                "{{\"error\":{{\"class\":\"GenericError\",\"desc\":\"no bus\"}},\"id\":{}}}\n",
                ask["id"]
            ),
        });
        let qmp = Qmp::connect(stream).await.unwrap();
        let error = qmp.execute("device_add", json!({})).await.unwrap_err();
        assert_eq!(error.to_string(), "The VMM refused \"device_add\": no bus");
    }

    #[tokio::test]
    async fn an_endless_line_ends_the_monitor_and_its_callers() {
        let stream = pretend(|ask| match ask["execute"].as_str() {
            Some("qmp_capabilities") => format!("{{\"return\":{{}},\"id\":{}}}\n", ask["id"]),
            _ => "x".repeat(2 * LINE_MAX),
        });
        let qmp = Qmp::connect(stream).await.unwrap();
        for _ in 0..2 {
            let error = qmp.execute("stop", json!({})).await.unwrap_err();
            assert!(matches!(error, VmError::Ended), "{error}");
        }
    }

    #[tokio::test]
    async fn a_connection_that_ends_before_the_greeting_is_an_ended_vm() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(matches!(Qmp::connect(ours).await, Err(VmError::Ended)));
    }
}
