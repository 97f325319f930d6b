//! Component tests of the VMM with real guests, on real KVM: `make lab` runs them anywhere. Outside of the
//! lab they skip, loudly: a `/dev/kvm` that exists may not be a real one.
#![expect(clippy::unwrap_used, reason = "a panic is a failed test")]

mod bench;
mod control;
mod snapshot;
mod speed;
mod storm;
