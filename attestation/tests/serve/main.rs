//! `sealpod-attest serve` as clients meet it: real TLS on loopback, evidence of the simulator, and
//! clients of every kind, the bad ones too.
#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking, its helpers too"
)]

mod bad;
mod broker;
mod client;
mod drive;
mod hostile;
mod lab;
mod lifecycle;
mod load;
mod pods;
mod policies;
