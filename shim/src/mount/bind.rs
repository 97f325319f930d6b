//! Bind mounts of the share: cut off from the host where that is wanted, read-only where that is wanted,
//! and only then in the share.

use std::{fs, path::Path};

use nix::mount::MsFlags;

use super::{Error, create_dir, detach, points, raw};
use crate::spec::ReadOnly;

/// An empty folder or file to mount on.
pub(super) fn create_place(path: &Path, is_dir: bool) -> Result<(), Error> {
    if is_dir {
        return create_dir(path);
    }
    let made = fs::File::create(path);
    made.map(drop).map_err(|source| Error::Create {
        path: path.into(),
        source,
    })
}

pub(super) fn bind(source: &Path, target: &Path, recursive: bool) -> Result<(), Error> {
    let recurse = if recursive {
        MsFlags::MS_REC
    } else {
        MsFlags::empty()
    };
    let source = source.to_string_lossy();
    raw("bind", &source, target, MsFlags::MS_BIND | recurse, "")
}

/// A bind mount in the share. In the share each mount is copied to the file server, and what changes of
/// one after that does not change its copy: it is made beside the share and moved into it.
pub(super) struct Bind<'a> {
    pub(super) source: &'a Path,
    /// With what is mounted below.
    pub(super) recursive: bool,
    /// Nothing arrives there that the host mounts later.
    pub(super) private: bool,
    pub(super) readonly: ReadOnly,
}

impl Bind<'_> {
    /// Makes it on `stage`, a place outside the share, and moves it to `target`.
    pub(super) fn place(&self, stage: &Path, target: &Path) -> Result<(), Error> {
        let is_dir = target.is_dir();
        if let Some(stages) = stage.parent() {
            create_dir(stages)?;
        }
        create_place(stage, is_dir)?;
        let make = || {
            bind(self.source, stage, self.recursive)?;
            if self.private {
                let cut_off = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
                raw("propagation", "", stage, cut_off, "")?;
            }
            protect(stage, self.readonly)?;
            let from = stage.to_string_lossy();
            raw("move", &from, target, MsFlags::MS_MOVE, "")
        };
        let made = make();
        if made.is_err() {
            let _ = detach(stage);
        }
        // Only a place: it goes with the pod's folder at the latest.
        let _ = if is_dir {
            fs::remove_dir(stage)
        } else {
            fs::remove_file(stage)
        };
        made
    }
}

/// Makes what is mounted on `target` read-only, with what is below it or without.
fn protect(target: &Path, readonly: ReadOnly) -> Result<(), Error> {
    let all = match readonly {
        ReadOnly::No => return Ok(()),
        ReadOnly::Top => vec![target.to_owned()],
        ReadOnly::Recursive => points(target).map_err(|source| Error::Mount {
            fstype: "bind".into(),
            origin: String::new(),
            target: target.into(),
            source,
        })?,
    };
    for point in all {
        // Fails where the source carries locked flags (nosuid, …); keep those then.
        let kept = nix::sys::statvfs::statvfs(&point).map_or(MsFlags::empty(), |s| {
            MsFlags::from_bits_truncate(s.flags().bits()) & MsFlags::from_bits_truncate(0xf | 0x400)
        });
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | kept;
        raw("bind", "", &point, flags, "")?;
    }
    Ok(())
}
