//! The pod's shared folder in the guest.

use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use sealpod_protocol::{SHARE_DIR, SHARE_TAG};

use crate::container::plan::{MountKind, MountPlan};
use crate::uevent;

/// Mounts the share, which the shim serves by virtiofs. Its device may have come after the boot.
///
/// # Errors
/// When there is no such device in the guest.
pub fn attach() -> io::Result<()> {
    std::fs::create_dir_all(SHARE_DIR)?;
    let attach = || {
        let (tag, kind) = (Some(SHARE_TAG), Some("virtiofs"));
        mount(tag, SHARE_DIR, kind, MsFlags::empty(), None::<&str>)
    };
    match attach() {
        // No device has this tag.
        Err(Errno::EINVAL) => {
            uevent::probe_slots(Path::new(uevent::PLATFORM));
            attach()?;
        }
        done => done?,
    }
    Ok(())
}

/// Looks into the volumes that `mounts` take from the share, here where every container's mounts are
/// copied from. A mount of the host becomes one of the guest when it is first looked into, with caches
/// of its own: looked into by each container, one volume would be several that do not agree.
pub fn look_into(mounts: &[MountPlan]) {
    for mount in mounts {
        if let MountKind::Bind { source, .. } = &mount.kind
            && source.starts_with(SHARE_DIR)
        {
            // What is not there is told when it is to be mounted.
            let _ = std::fs::metadata(source);
        }
    }
}
