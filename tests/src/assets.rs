//! Where the things under test and their clients lie: the build tree and the download cache.
//! Reads the environment; creates nothing.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Runtime that the tests ask containerd for; `SEALPOD_TEST_RUNTIME` names another one (runc's, to
/// check the tests themselves).
pub const SEALPOD_RUNTIME: &str = "io.containerd.sealpod.v2";
/// containerd's own runtime: the reference that behaviour and times are compared with.
pub const RUNC_RUNTIME: &str = "io.containerd.runc.v2";

/// The runtime under test.
#[must_use]
pub fn runtime() -> String {
    std::env::var("SEALPOD_TEST_RUNTIME").unwrap_or_else(|_| SEALPOD_RUNTIME.into())
}

/// `kvm` or `tcg` for all pods; by default the shim finds out.
#[must_use]
pub fn accelerator() -> Option<String> {
    std::env::var("SEALPOD_TEST_ACCELERATOR").ok()
}

/// The build tree's `target` folder.
#[must_use]
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"),
        PathBuf::from,
    )
}

/// Folder with the built programs; `SEALPOD_TEST_PROFILE` chooses `debug`.
#[must_use]
pub fn programs() -> PathBuf {
    let profile = std::env::var("SEALPOD_TEST_PROFILE").unwrap_or_else(|_| "release".into());
    target().join(profile)
}

/// Packages that `tests/setup/setup.sh clients` unpacked.
#[must_use]
pub fn packages() -> PathBuf {
    cache().join("debs")
}

/// The cache outside the tree.
#[must_use]
pub fn cache() -> PathBuf {
    std::env::var_os("SEALPOD_CACHE").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/sealpod"),
        PathBuf::from,
    )
}

/// The guest kernel that pods boot.
#[must_use]
pub fn kernel() -> PathBuf {
    target().join("guest/vmlinux")
}

/// The guest's root; the packer chooses the compression.
#[must_use]
pub fn initramfs() -> PathBuf {
    let guest = target().join("guest");
    [
        "initramfs.cpio.zst",
        "initramfs.cpio.gz",
        "initramfs.cpio.lz4",
        "initramfs.cpio",
    ]
    .iter()
    .map(|name| guest.join(name))
    .find(|path| path.exists())
    .unwrap_or_else(|| guest.join("initramfs.cpio"))
}

/// A guest's root with an agent that breaks the rules of attestation.
///
/// # Errors
/// It is not there; names the command that makes it.
pub fn hostile_initramfs() -> Result<PathBuf> {
    let file = target().join("guest/hostile.cpio");
    (file.canonicalize())
        .with_context(|| format!("{} is not there: run make hostile-guest", file.display()))
}

/// virtiofsd, as `shim/get-virtiofsd.sh` built it.
#[must_use]
pub fn virtiofsd() -> PathBuf {
    let newest = std::fs::read_dir(cache())
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with("virtiofsd-"))
        .map(|e| e.path().join("bin/virtiofsd"))
        .filter(|p| p.exists())
        .max();
    newest.unwrap_or_else(|| cache().join("virtiofsd-?/bin/virtiofsd"))
}

/// A program of the packages in `packages()/<name>`.
#[must_use]
pub fn unpacked(name: &str) -> PathBuf {
    packages().join(name)
}

/// That everything which a pod needs has been built.
///
/// # Errors
/// Names the first thing that is missing and the command that makes it.
pub fn complete() -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "not root: the tests make namespaces and VMs"
    );
    let clients = unpacked("containerd-1.6/usr/bin/ctr");
    ensure!(
        clients.exists(),
        "{} is not there: run tests/setup/setup.sh clients",
        clients.display()
    );
    if runtime() == SEALPOD_RUNTIME {
        for needed in [
            programs().join("containerd-shim-sealpod-v2"),
            kernel(),
            initramfs(),
            virtiofsd(),
        ] {
            ensure!(
                needed.exists(),
                "{} is not there: run make build",
                needed.display()
            );
        }
    }
    Ok(())
}
