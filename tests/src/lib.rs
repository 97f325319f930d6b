//! Support for the end-to-end tests, the demo and the benches: a private containerd in namespaces of
//! its own, images built on the spot, and clients that drive it. Test material only; nothing of the
//! product depends on it.
//!
//! An environment ([`Env`]) is thrown away as a whole: its processes live in a PID namespace, its
//! mounts, interfaces and `/run` in a mount and a network namespace, its files in one temporary folder.
//! The machine's own containerd, bridges and firewall rules are never touched.

pub mod assets;
pub mod attest;
pub mod cni;
pub mod containerd;
pub mod cri;
pub mod ctr;
pub mod docker;
pub mod env;
pub mod image;
pub mod leak;
pub mod measure;
pub mod namespaces;
pub mod net;
pub mod skip;
pub mod stats;
pub mod wait;
pub mod websocket;

pub use containerd::Version;
pub use env::{Env, Settings};
