//! The guest's console: its last lines, for errors. What the guest writes is read no faster than a
//! budget allows; then the VMM's serial port fills up and the guest loses its own output, nothing
//! else.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::child::Tail;

/// Lines and bytes of a line that are kept.
const LINES: usize = 50;
const LINE_BYTES: usize = 240;
/// What the guest may write at once, bytes: a verbose boot is 60 KiB.
const BURST: usize = 256 << 10;
/// And after that, bytes a second.
const RATE: u32 = 64 << 10;
/// How the kernel begins its last words.
const PANIC: &str = "Kernel panic - not syncing: ";

/// The last lines of a guest's console.
#[derive(Debug, Clone)]
pub(super) struct Console(Arc<Mutex<Tail>>);

impl Console {
    /// Reads from `stream` until it ends, in a task.
    pub(super) fn read(stream: UnixStream) -> (Self, tokio::task::JoinHandle<()>) {
        let tail = Arc::new(Mutex::new(Tail::new(LINES, LINE_BYTES)));
        let task = tokio::spawn(pump(stream, Arc::clone(&tail)));
        (Self(tail), task)
    }

    pub(super) fn lines(&self) -> Vec<String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .lines()
    }
}

/// The message of a kernel panic, if the lines hold one.
pub(super) fn panic_message(lines: &[String]) -> Option<String> {
    let message = |line: &String| Some(line.split_once(PANIC)?.1.to_owned());
    lines.iter().rev().find_map(message)
}

async fn pump(mut stream: UnixStream, tail: Arc<Mutex<Tail>>) {
    let mut buffer = [0u8; 2048];
    let mut budget = Budget::new(Instant::now());
    while let Ok(n @ 1..) = stream.read(&mut buffer).await {
        tail.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(&buffer[..n]);
        let pause = budget.spend(n, Instant::now());
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
    }
}

/// What may still be read, earned with time.
struct Budget {
    left: Duration,
    since: Instant,
}

impl Budget {
    /// Bytes as the time that earns them.
    fn cost(bytes: usize) -> Duration {
        Duration::from_secs(1).mul_f64(bytes as f64 / f64::from(RATE))
    }

    fn new(now: Instant) -> Self {
        Self {
            left: Self::cost(BURST),
            since: now,
        }
    }

    /// Takes `bytes` out; says how long to wait before the next read.
    fn spend(&mut self, bytes: usize, now: Instant) -> Duration {
        let earned = now.saturating_duration_since(self.since);
        let have = (self.left + earned).min(Self::cost(BURST));
        let cost = Self::cost(bytes);
        let pause = cost.saturating_sub(have);
        self.left = have.saturating_sub(cost);
        // What is earned while waiting is spent already.
        self.since = now + pause;
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    #[tokio::test]
    async fn the_last_lines_are_there_when_the_guest_is_gone() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (console, task) = Console::read(ours);
        let text =
            "[    0.1] one\r\n[    0.2] Kernel panic - not syncing: No working init found.\r\n";
        guest.write_all(text.as_bytes()).await.unwrap();
        drop(guest);
        task.await.unwrap();
        let lines = console.lines();
        assert_eq!(lines.len(), 2);
        assert_eq!(
            panic_message(&lines).as_deref(),
            Some("No working init found.")
        );
        assert_eq!(panic_message(&lines[..1]), None);
    }

    #[test]
    fn a_guest_that_floods_its_console_is_slowed_to_the_rate() {
        let mut now = Instant::now();
        let mut budget = Budget::new(now);
        assert_eq!(budget.spend(BURST, now), Duration::ZERO);
        let start = now;
        for _ in 0..640 {
            now += budget.spend(1024, now);
        }
        let took = (now - start).as_secs_f64();
        assert!((9.9..10.1).contains(&took), "{took}");
        assert_eq!(
            budget.spend(1024, now + Duration::from_secs(60)),
            Duration::ZERO
        );
    }
}
