//! The machine side of sealpod: devices that a VM is given, written against guest memory and
//! virtqueues and not against one hypervisor, and the built-in VMM that gives them to a guest on KVM.

pub mod confine;
pub mod control;
mod huge;
pub mod log;
pub mod machine;
mod memfd;
pub mod mmio;
pub mod snapshot;
pub mod virtio;
pub mod vsock;
