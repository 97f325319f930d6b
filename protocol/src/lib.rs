//! What shim, agent and VMM say to each other. Definitions only: no logic beyond encoding, no I/O.
//!
//! One vsock connection, dialled by the agent to [`AGENT_PORT`] of the host, carries ttrpc with the
//! agent as server (`proto/agent.proto`). Each standard stream of a process is a connection that the
//! shim opens to [`STREAM_PORT`] of the guest ([`streams`]). A guest without a TEE asks [`SIMULATOR_PORT`]
//! for evidence where a simulator stands in for one ([`simulator`]).

pub mod simulator;
pub mod streams;

/// Version of `proto/agent.proto`. Raised by every change that the other side must know of.
pub const PROTOCOL_VERSION: u32 = 2;

/// Host port (CID 2) that the agent dials when it is ready.
pub const AGENT_PORT: u32 = 1024;
/// Guest port on which the agent accepts stream connections.
pub const STREAM_PORT: u32 = 1025;
/// Host port (CID 2) of the TEE simulator, while the shim runs one.
pub const SIMULATOR_PORT: u32 = 1026;
/// CID of every guest. Each VM has its own vsock engine, so one number serves all.
pub const GUEST_CID: u64 = 3;

/// virtiofs tag of the pod's shared folder.
pub const SHARE_TAG: &str = "sealpod";
/// Where the agent mounts the share.
pub const SHARE_DIR: &str = "/run/sealpod/share";
/// A tmpfs of the pod, for `/dev/shm` of its containers.
pub const SANDBOX_SHM_DIR: &str = "/run/sealpod/shm";
/// Below it the agent makes the pod's volumes in memory, each by its name.
pub const MEMORY_DIR: &str = "/run/sealpod/memory";

/// Longest container or exec id that is accepted, bytes (containerd's own limit is 76).
pub const ID_MAX: usize = 128;

/// Whether `id` is a container or exec id: 1 to [`ID_MAX`] bytes of `[A-Za-z0-9_.-]`, not starting
/// with a dot or dash.
#[must_use]
pub fn valid_id(id: &str) -> bool {
    let ok = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    (1..=ID_MAX).contains(&id.len())
        && id.bytes().all(ok)
        && !matches!(id.as_bytes()[0], b'.' | b'-')
}

#[allow(
    clippy::allow_attributes,
    reason = "generated code carries its own `allow`s"
)]
#[allow(
    missing_docs,
    unreachable_pub,
    non_camel_case_types,
    clippy::unwrap_used,
    reason = "generated code"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub use generated::agent;
pub use generated::agent_ttrpc;
pub use generated::cri;
pub use generated::vmm;
pub use generated::vmm_ttrpc;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_would_break_a_path_or_a_line_are_refused() {
        for bad in ["", ".", "..", "-x", "a/b", "a b", "a\n", "a\0", "é"] {
            assert!(!valid_id(bad), "{bad:?}");
        }
        assert!(!valid_id(&"a".repeat(ID_MAX + 1)));
        for good in ["a", "A-1_b.c", &"a".repeat(ID_MAX)] {
            assert!(valid_id(good), "{good:?}");
        }
    }
}
