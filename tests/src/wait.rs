//! Waiting for a condition with a deadline. For states that have no event to wait for.

use std::time::{Duration, Instant};

/// How often a condition is looked at.
const STEP: Duration = Duration::from_millis(20);

/// Looks at `check` until it yields a value.
///
/// # Panics
/// When it has not after `limit`.
pub fn until<T>(what: &str, limit: Duration, mut check: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(Instant::now() < end, "{what}: not within {limit:?}");
        std::thread::sleep(STEP);
    }
}
