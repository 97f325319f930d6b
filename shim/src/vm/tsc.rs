//! How fast this machine's time stamp counter runs. A translated guest sees the host's counter, and
//! has nothing good to measure it against: on a busy machine it was seen to come out ten times too
//! slow, and with it every clock of the guest.

#![expect(
    unsafe_code,
    reason = "the time stamp counter is read by an instruction"
)]

use std::ops::RangeInclusive;
use std::path::Path;
use std::time::{Duration, Instant};

use super::cache;

/// File, in the state folder, that remembers the answer for this boot.
const CACHE_FILE: &str = "tsc.json";
/// Time between two readings. Each is exact to some 100 ns: an error of 5 in a million.
const INTERVAL: Duration = Duration::from_millis(20);
/// Readings of which the one is taken that was interrupted least.
const TRIES: u32 = 16;
/// What a real counter can have, kHz.
const PLAUSIBLE: RangeInclusive<u64> = 100_000..=10_000_000;

/// Its rate, kHz, from the file in `state_dir` or by measuring, which takes 20 ms. `None` for a rate
/// that no real counter has.
pub(super) fn khz(state_dir: &Path) -> Option<u64> {
    cache::remembered(&state_dir.join(CACHE_FILE), measure)
}

fn measure() -> Option<u64> {
    let (ticks, time) = reading();
    std::thread::sleep(INTERVAL);
    let (ticks_then, time_then) = reading();
    let nanos = time_then.duration_since(time).as_nanos();
    let ticks = u128::from(ticks_then.saturating_sub(ticks));
    let khz = u64::try_from(ticks * 1_000_000 / nanos.max(1)).ok()?;
    PLAUSIBLE.contains(&khz).then_some(khz)
}

/// The counter and the clock at one moment.
fn reading() -> (u64, Instant) {
    // SAFETY: every x86-64 processor has the instruction, and no host forbids it to programs that
    // are to run a translator, which uses it itself.
    let counter = || unsafe { core::arch::x86_64::_rdtsc() };
    let once = || {
        let (before, time, after) = (counter(), Instant::now(), counter());
        let took = after.saturating_sub(before);
        (took, before + took / 2, time)
    };
    let first = once();
    let best = (1..TRIES).map(|_| once()).fold(
        first,
        |best, next| if next.0 < best.0 { next } else { best },
    );
    (best.1, best.2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let (Some(one), Some(two)) = (measure(), measure()) else {
            eprintln!("SKIPPED: this machine's time stamp counter has no plausible rate");
            return;
        };
        eprintln!("TSC: {one} kHz, {two} kHz");
        assert!(one.abs_diff(two) < one / 1000, "{one} {two}");
    }
}
