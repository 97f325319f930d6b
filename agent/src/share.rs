//! The pod's shared folder in the guest.

use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
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

/// Lets go of the file systems that a container's folder of the share consists of: each mount of the
/// host below it is a mount of its own here, made when it was first looked into.
pub fn forget(id: &str) {
    let folder = Path::new(SHARE_DIR).join(id);
    let Ok(table) = std::fs::read_to_string("/proc/self/mountinfo") else {
        return;
    };
    for path in below(&table, &folder).iter().rev() {
        let _ = umount2(path, MntFlags::MNT_DETACH);
    }
}

/// Mount points at or below `folder`, in the order of their making (proc_pid_mountinfo(5), field 5).
fn below(table: &str, folder: &Path) -> Vec<PathBuf> {
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|field| PathBuf::from(field.replace("\\040", " ")))
        .filter(|path| path.starts_with(folder))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_of_that_container_are_let_go() {
        let table = "21 1 0:5 / / rw - tmpfs t rw\n\
             22 21 0:6 / /run/sealpod/share rw - virtiofs sealpod rw\n\
             23 22 0:7 / /run/sealpod/share/c1/rootfs rw - virtiofs sealpod rw\n\
             24 23 0:8 / /run/sealpod/share/c1/rootfs/a\\040b rw - virtiofs sealpod rw\n\
             25 22 0:9 / /run/sealpod/share/c10/rootfs rw - virtiofs sealpod rw\n";
        let found = below(table, Path::new("/run/sealpod/share/c1"));
        assert_eq!(
            found,
            [
                Path::new("/run/sealpod/share/c1/rootfs"),
                Path::new("/run/sealpod/share/c1/rootfs/a b")
            ]
        );
    }
}
