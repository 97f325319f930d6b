//! Component tests of the vsock engine: a model guest on real virtqueues in guest memory on one
//! side, real Unix sockets on the other. No AF_VSOCK socket is ever made.
#![expect(clippy::unwrap_used, reason = "a panic is a failed test")]

mod connections;
mod driver;
mod guest;
mod hostile;
mod kernel;
mod limits;
mod machine;
mod streams;
mod vhost_user;
