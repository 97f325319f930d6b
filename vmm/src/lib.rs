//! The machine side of sealpod: devices that a VM is given, written against guest memory and
//! virtqueues and not against one hypervisor. Today that is the user-space vsock engine; the
//! built-in VMM will live here too.

pub mod virtio;
pub mod vsock;
