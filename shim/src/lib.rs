//! The shim's library: containerd's services on one side, the pod's VM on the other.
//!
//! ```text
//! bootstrap  start / delete / serve: the process
//!    └─ service    Task v2, v3 and Sandbox requests, translated
//!         └─ container  one task each: init and exec processes, their states and events
//!              └─ pod        the VM they share: boot, network, share, end
//!                   ├─ spec, mount, io, hooks, guest (the agent's client)
//!                   ├─ attest     the host gate: devices only for pods that were affirmed
//!                   └─ vm, virtiofs, network, host_cgroup, ledger, child
//! config, annotations, sizing, check: what this node and this pod are allowed
//! ```

pub mod annotations;
pub mod attest;
pub mod bootstrap;
pub mod check;
pub mod child;
pub mod clock;
pub mod config;
pub mod container;
pub mod error;
pub mod events;
pub mod guest;
pub mod hooks;
pub mod host_cgroup;
pub mod io;
pub mod ledger;
pub mod mount;
pub mod network;
pub mod owner;
pub mod pod;
pub mod podfile;
pub mod service;
pub mod sizing;
pub mod spec;
pub mod virtiofs;
pub mod vm;
