//! The guest's agent. It is PID 1 of a pod's VM and does what the shim asks for: containers, their
//! processes and streams, the pod's network. The shim's word is checked like anyone's.
//!
//! One thread: a current-thread runtime without a blocking pool (see [`launch`] for why), so nothing
//! here may block for long.

pub mod apart;
pub mod attest;
pub mod boot;
pub mod cgroup;
pub mod container;
pub mod init;
pub mod io;
pub mod launch;
pub mod log;
mod memory;
pub mod network;
pub mod reaper;
pub mod sandbox;
pub mod service;
pub mod share;
pub mod slot;
pub mod start;
mod status;
pub mod sys;
pub mod uevent;
