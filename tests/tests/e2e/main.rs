//! End-to-end tests: real containerd, real VMs. One environment per test; see `sealpod_tests`.
//! Every test that drives containerd runs against each supported version.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod lifecycle;

/// One `#[test]` per containerd version, in a module named after the test.
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
