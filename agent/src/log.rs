//! What the agent says on the console: short lines, a bounded number of them, since a container can
//! cause them and the host keeps them.

use std::io::Write;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lines that may be written at once.
const BURST: u32 = 20;
/// A further line becomes possible after this.
const REFILL: Duration = Duration::from_secs(1);
/// Longest line, bytes.
const LINE_MAX: usize = 400;

/// Tokens left, and when they were counted.
static BUCKET: Mutex<Option<(u32, Instant)>> = Mutex::new(None);

fn allowed(now: Instant) -> bool {
    let Ok(mut bucket) = BUCKET.lock() else {
        return false;
    };
    let (tokens, since) = bucket.unwrap_or((BURST, now));
    let new = now.duration_since(since).as_millis() / REFILL.as_millis();
    let new = u32::try_from(new).unwrap_or(BURST);
    let tokens = tokens.saturating_add(new).min(BURST);
    let since = if new > 0 { now } else { since };
    *bucket = Some((tokens.saturating_sub(1), since));
    tokens > 0
}

/// Writes one line to the console, unless too many were written lately.
pub fn line(text: &std::fmt::Arguments<'_>) {
    if allowed(Instant::now()) {
        always(text);
    }
}

/// Writes one line to the console in any case: for what ends the agent.
pub fn always(text: &std::fmt::Arguments<'_>) {
    let mut line = format!("agent: {text}").replace('\n', " | ");
    if line.len() > LINE_MAX {
        line.truncate(
            (0..=LINE_MAX)
                .rfind(|n| line.is_char_boundary(*n))
                .unwrap_or(0),
        );
    }
    line.push('\n');
    // Standard error is the console (see boot). Nothing can be done when it does not take it.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Writes a line to the console, as `format!` does.
#[macro_export]
macro_rules! log {
    ($($arg:tt)*) => { $crate::log::line(&format_args!($($arg)*)) };
}
