//! Clocks in the forms that others want them. No state.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;

/// CLOCK_REALTIME, ns since the Unix epoch.
#[must_use]
pub fn unix_ns() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// CLOCK_BOOTTIME, ns since the host booted: what the timeline of a start is written in.
#[must_use]
pub fn boot_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map(Duration::from);
    u64::try_from(now.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}

/// `ns` since the Unix epoch as a protobuf timestamp.
#[must_use]
pub fn timestamp(ns: i64) -> Timestamp {
    Timestamp {
        seconds: ns.div_euclid(1_000_000_000),
        // Always below 10^9.
        nanos: i32::try_from(ns.rem_euclid(1_000_000_000)).unwrap_or(0),
        ..Default::default()
    }
}

/// The present as a protobuf timestamp.
#[must_use]
pub fn now_timestamp() -> Timestamp {
    timestamp(unix_ns())
}
