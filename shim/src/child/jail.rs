//! What a jailed child sees of the file system: a new root on a tmpfs, read-only, with the folders
//! that programs and their libraries live in bound read-only, and what it is given by name. The old
//! root is unmounted before the program runs.
//!
//! Only the list of steps is made here; `exec` does them between fork and exec, where nothing can
//! be allocated.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Folders and files that a dynamically linked program needs, where they exist. `/lib` and `/lib64`
/// are links into `/usr` on most systems; a bind mount follows them.
const SYSTEM: [&str; 6] = [
    "/usr",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/nix/store",
    "/gnu/store",
];

/// One step, done with the new root as current folder; targets are relative to it.
#[derive(Debug)]
pub(super) enum Step {
    /// Makes a folder; one that is there is fine.
    Dir(CString),
    /// Makes an empty file to mount on.
    File(CString),
    /// Binds `source` on `target`, and `with` everything mounted below it if `recursive`.
    Bind {
        source: CString,
        target: CString,
        recursive: bool,
        readonly: bool,
    },
    /// Makes a character device for the child's user alone.
    Device {
        target: CString,
        major: u32,
        minor: u32,
    },
    /// Mounts proc, read-only.
    Proc(CString),
}

impl Step {
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Dir(at) => format!("make folder {at:?} in its root"),
            Self::File(at) => format!("make file {at:?} in its root"),
            Self::Bind { source, .. } => format!("bind {source:?} into its root"),
            Self::Device { target, .. } => format!("make device {target:?} in its root"),
            Self::Proc(_) => "mount proc in its root".into(),
        }
    }
}

/// A root file system for a child.
#[derive(Debug)]
pub struct Jail {
    pub(super) root: PathBuf,
    pub(super) steps: Vec<Step>,
    bound: Vec<PathBuf>,
}

impl Jail {
    /// `root` is an empty folder that serves as mount point; nothing is ever written to it. The
    /// system's folders are bound.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        let mut jail = Self {
            root: root.into(),
            steps: Vec::new(),
            bound: Vec::new(),
        };
        for path in SYSTEM.map(Path::new) {
            if path.exists() {
                jail.bind(path, path, true, false);
            }
        }
        jail
    }

    /// Makes `path` visible, read-only, at its own place.
    pub fn visible(&mut self, path: &Path) -> &mut Self {
        if !self.bound.iter().any(|b| path.starts_with(b)) {
            self.bind(path, path, true, false);
        }
        self
    }

    /// Makes the file `source` visible, read-only, as `target` (absolute).
    pub fn file(&mut self, source: &Path, target: &str) -> &mut Self {
        self.bind(source, Path::new(target), true, false);
        self
    }

    /// Makes the folder `source`, with what is mounted below it now and later, visible as `target`.
    pub fn folder(&mut self, source: &Path, target: &str) -> &mut Self {
        self.bind(source, Path::new(target), false, true);
        self
    }

    /// Makes a character device.
    pub fn device(&mut self, target: &str, major: u32, minor: u32) -> &mut Self {
        let target = Path::new(target);
        self.parents(target);
        self.steps.push(Step::Device {
            target: relative(target),
            major,
            minor,
        });
        self
    }

    /// Mounts `/proc`, read-only, with the child's own processes.
    pub fn proc(&mut self) -> &mut Self {
        self.steps.push(Step::Dir(relative(Path::new("/proc"))));
        self.steps.push(Step::Proc(relative(Path::new("/proc"))));
        self
    }

    fn bind(&mut self, source: &Path, target: &Path, readonly: bool, recursive: bool) {
        self.parents(target);
        let at = relative(target);
        // What is not there is not a folder; binding it then fails, and says which it was.
        self.steps.push(if source.is_dir() {
            Step::Dir(at.clone())
        } else {
            Step::File(at.clone())
        });
        self.steps.push(Step::Bind {
            source: c_string(source),
            target: at,
            recursive,
            readonly,
        });
        self.bound.push(target.into());
    }

    fn parents(&mut self, target: &Path) {
        let above: Vec<&Path> = target.ancestors().skip(1).collect();
        for dir in above.into_iter().rev().filter(|d| d.parent().is_some()) {
            self.steps.push(Step::Dir(relative(dir)));
        }
    }
}

fn relative(path: &Path) -> CString {
    c_string(path.strip_prefix("/").unwrap_or(path))
}

/// A path with a NUL names nothing; the empty path does neither, and every call on it fails.
fn c_string(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap_or_default()
}
