//! User-space virtio-vsock: stream connections between a guest and Unix sockets of the host.
//! `docs/vsock.md` has the protocol, the limits and what a hostile guest can do.
//!
//! ```text
//!  guest ──tx──▶ queues ──packet──▶ engine ──bytes──▶ Unix sockets   (backlog only when one is full)
//!  guest ◀─rx── queues ◀──packet── engine ◀──bytes── Unix sockets   (read straight into guest memory)
//! ```
//! [`Engine`] knows packets and Unix sockets, [`queues`] knows virtqueues, [`vhost_user`] knows QEMU.
//! A VMM in process owns an [`Engine`] and calls [`queues::service`] itself.

mod connection;
mod credit;
mod engine;
mod error;
mod hybrid;
mod limits;
mod packet;
pub mod queues;
mod socket;
mod table;
pub mod vhost_user;

pub use engine::{Config, Engine};
pub use error::Error;
pub use limits::Limits;
pub use packet::{HEADER_LEN, HOST_CID, Header, MAX_PAYLOAD, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE};
pub use packet::{SHUTDOWN_SEND, TYPE_STREAM};
pub use vhost_user::VhostUserVsock;
