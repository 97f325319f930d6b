//! End-to-end tests: real containerd, real VMs. One environment per test; see `sealpod_tests`.
//! What drives containerd runs against each supported version.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails with the error"
)]

mod attestation;
mod bad_input;
mod cri_files;
mod cri_limits;
mod cri_namespaces;
mod cri_pod;
mod cri_security;
mod cri_streams;
mod cri_volumes;
mod docker;
mod failure;
mod failure_agent;
mod failure_reads;
mod files;
mod hostile_agent;
mod io;
mod lifecycle;
mod many;
mod network;
mod options;
mod redis;
mod remote_verifier;
mod tasks;
mod templates;

/// One `#[test]` per containerd version for each body, in a module named after it.
#[macro_export]
macro_rules! on_every_containerd {
    ($($name:ident),+ $(,)?) => { $(
        mod $name {
            use sealpod_tests::Version;
            #[test]
            fn containerd_1_6() { super::bodies::$name(Version::V1_6); }
            #[test]
            fn containerd_1_7() { super::bodies::$name(Version::V1_7); }
            #[test]
            fn containerd_2_1() { super::bodies::$name(Version::V2_1); }
        }
    )+ };
}

/// The same for bodies that use the CRI, and once more with the Sandbox API.
#[macro_export]
macro_rules! on_every_cri {
    ($($name:ident),+ $(,)?) => { $(
        mod $name {
            use sealpod_tests::Version;
            #[test]
            fn containerd_1_6() { super::bodies::$name(Version::V1_6); }
            #[test]
            fn containerd_1_7() { super::bodies::$name(Version::V1_7); }
            #[test]
            fn containerd_2_1() { super::bodies::$name(Version::V2_1); }
            #[test]
            fn sandbox_api() {
                // containerd's own runc shim serves no sandboxes.
                sealpod_tests::only_sealpod!();
                super::bodies::$name(Version::V2_1Sandbox);
            }
        }
    )+ };
}
