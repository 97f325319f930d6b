//! sealpod-vmm's log, which is its standard error: the shim takes it into its own. What a guest or a daemon
//! does wrong is told a few times only, as they may do it without end.

use std::sync::atomic::{AtomicU32, Ordering};

/// Faults of others that are told in the life of a process.
const MAX: u32 = 16;

/// Has what this process logs written to its standard error, one line each, from any thread, also a confined one.
pub fn start() {
    let log = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .with_ansi(false)
        .with_target(false)
        .without_time()
        .with_writer(std::io::stderr);
    // Fails where there is a log, which would do as well.
    let _ = log.try_init();
}

/// Whether this fault of somebody else's may be told. Each call counts.
pub(crate) fn worth_telling() -> bool {
    static TOLD: AtomicU32 = AtomicU32::new(0);
    counts(&TOLD)
}

fn counts(told: &AtomicU32) -> bool {
    let before = told.fetch_add(1, Ordering::Relaxed);
    told.fetch_min(MAX, Ordering::Relaxed); // no way around to 0
    before < MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_are_told_however_many_there_are() {
        let told = AtomicU32::new(0);
        let telling = (0..1000).filter(|_| counts(&told)).count();
        assert_eq!(telling, MAX as usize);
        assert_eq!(told.into_inner(), MAX);
    }
}
