//! Waiting for a condition with a deadline. For states that have no event to wait for. Where everything
//! is slow (the lab), `SEALPOD_TEST_PATIENCE` multiplies every time limit of the tests.

use std::time::{Duration, Instant};

/// How often a condition is looked at.
const STEP: Duration = Duration::from_millis(20);

/// How many times longer than usual tests wait.
///
/// # Panics
/// Where `SEALPOD_TEST_PATIENCE` is no number.
#[must_use]
pub fn patience() -> u32 {
    std::env::var("SEALPOD_TEST_PATIENCE").map_or(1, |n| n.parse().expect("SEALPOD_TEST_PATIENCE"))
}

/// Looks at `check` until it yields a value.
///
/// # Panics
/// When it has not after `limit`, times [`patience`].
pub fn until<T>(what: &str, limit: Duration, mut check: impl FnMut() -> Option<T>) -> T {
    let limit = limit * patience();
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(Instant::now() < end, "{what}: not within {limit:?}");
        std::thread::sleep(STEP);
    }
}
