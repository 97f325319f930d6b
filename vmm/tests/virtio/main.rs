//! Component tests of the virtio devices: a model driver on real virtqueues in guest memory on one
//! side, real files, taps and daemons on the other.
#![expect(clippy::unwrap_used, reason = "a panic is a failed test")]

mod balloon;
mod block;
mod block_deep;
mod confined;
mod driver;
mod event_loop;
mod fs;
mod hostile;
mod net;
mod rng;
mod vsock;
