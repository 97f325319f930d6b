//! The pod's ledger: every resource a pod takes from the host is written here *before* it is taken,
//! so that whoever comes after a crash can undo it all without luck. Only this module writes
//! `<pod dir>/ledger.jsonl`; undoing is [`clean()`].
//!
//! One JSON object a line, each written by one `write(2)` to a file opened with `O_APPEND`:
//!
//! ```text
//! {"op":"taken","id":1,"resource":{"kind":"process","name":"virtiofsd"}}   about to be spawned
//! {"op":"started","id":1,"pid":4711,"start_time":123456}                   it runs
//! {"op":"released","id":1}                                                 gone, and reaped
//! ```
//! A record begins and ends with a newline, so one that a crash (or a full disk) tore apart damages
//! nothing after it. Nothing is synced to disk: what a crash of the host destroys, it also frees.
//!
//! Between the first two lines a process may exist whose pid nobody wrote down. Two things cover
//! that: it dies with its parent (`PR_SET_PDEATHSIG`, see `child`), and it is in the pod's cgroup,
//! which was written down before it and is emptied first.

mod clean;
mod remove;
mod undo_net;

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

pub use clean::{CleanReport, clean};
pub use remove::remove_tree;

/// Name of the ledger in the pod's folder.
pub const FILE_NAME: &str = "ledger.jsonl";
/// Most that is read of a ledger, bytes: some 40,000 records.
const SIZE_MAX: u64 = 8 << 20;

/// Something of the host that a pod holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Resource {
    /// A child process. Undone by `SIGKILL`, if it is still the same process.
    Process {
        /// What it is, for people.
        name: String,
    },
    /// A mount in the host's mount namespace, below the pod's folder. Undone by a lazy unmount.
    Mount {
        /// Mount point.
        target: PathBuf,
    },
    /// A network namespace held by a bind mount on a file below the pod's folder.
    Netns {
        /// The file.
        path: PathBuf,
    },
    /// A network link that the pod added to a network namespace (which may belong to CNI).
    Link {
        /// The namespace's file.
        netns: PathBuf,
        /// Name of the link.
        name: String,
    },
    /// An ingress qdisc, with its filters, on a link that belongs to someone else.
    Qdisc {
        /// The namespace's file.
        netns: PathBuf,
        /// Name of the link.
        ifname: String,
    },
    /// Cgroup directories, one for each hierarchy. Undone by killing what is inside.
    Cgroup {
        /// The directories, below `/sys/fs/cgroup`.
        paths: Vec<PathBuf>,
    },
    /// A PCI function that was taken from its driver for VFIO. Undone by a reset and a new probe.
    VfioFunction {
        /// Its folder below `/sys/bus/pci/devices`.
        function: PathBuf,
    },
    /// A file, socket or folder below the pod's folder. The pod's folder itself needs no record.
    Path {
        /// Where.
        path: PathBuf,
    },
}

/// Names a record of a [`Ledger`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EntryId(u64);

/// A line of the file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
enum Record {
    Taken {
        id: EntryId,
        resource: Resource,
    },
    Started {
        id: EntryId,
        pid: u32,
        start_time: u64,
    },
    Released {
        id: EntryId,
    },
}

/// Why the ledger could not be used.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The folder cannot be made or is not the caller's alone.
    #[error("Pod folder {path} cannot be used: {reason}")]
    Folder {
        /// Pod folder.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Reading or writing failed.
    #[error("Ledger {path} cannot be {action}")]
    Io {
        /// The ledger.
        path: PathBuf,
        /// `opened`, `read` or `written`.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file of a pod is small; this is something else.
    #[error("Ledger {path} has {size} bytes, at most {SIZE_MAX} are read")]
    TooLarge {
        /// The ledger.
        path: PathBuf,
        /// Its size, bytes.
        size: u64,
    },
    /// A process has no `/proc` entry.
    #[error("Process {pid} is not there")]
    NoProcess {
        /// Its id.
        pid: u32,
    },
}

/// Writer of a pod's ledger. Cheap to clone; all clones write to the same file.
#[derive(Debug, Clone)]
pub struct Ledger(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: File,
    dir: PathBuf,
    next: AtomicU64,
}

impl Ledger {
    /// Opens the ledger of the pod folder `dir`, making both (folder mode 0700) where absent.
    ///
    /// # Errors
    /// [`LedgerError`] when the folder is not a folder of this user's alone or the file cannot be
    /// opened.
    pub fn open(dir: &Path) -> Result<Self, LedgerError> {
        let refuse = |reason: String| LedgerError::Folder {
            path: dir.into(),
            reason,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| refuse(e.to_string()))?;
        check_folder(dir).map_err(refuse)?;
        let path = dir.join(FILE_NAME);
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(io_error(&path, "opened"))?;
        let next = read(dir)?.entries.last().map_or(1, |e| e.id.0 + 1);
        Ok(Self(Arc::new(Inner {
            file,
            dir: dir.into(),
            next: AtomicU64::new(next),
        })))
    }

    /// The pod's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// Writes down that `resource` is about to be taken.
    ///
    /// # Errors
    /// [`LedgerError::Io`]; then the resource must not be taken.
    pub fn record(&self, resource: Resource) -> Result<EntryId, LedgerError> {
        let id = EntryId(self.0.next.fetch_add(1, Ordering::Relaxed));
        self.append(&Record::Taken { id, resource })?;
        Ok(id)
    }

    /// Completes the record `id` of a [`Resource::Process`] once it runs.
    ///
    /// # Errors
    /// [`LedgerError`] when the process is gone already or the file cannot be written.
    pub fn started(&self, id: EntryId, pid: u32) -> Result<(), LedgerError> {
        let start_time = start_time(pid).ok_or(LedgerError::NoProcess { pid })?;
        self.append(&Record::Started {
            id,
            pid,
            start_time,
        })
    }

    /// Writes down that the resource of `id` is gone.
    ///
    /// # Errors
    /// [`LedgerError::Io`]; cleaning will then find the resource gone, which is fine too.
    pub fn release(&self, id: EntryId) -> Result<(), LedgerError> {
        self.append(&Record::Released { id })
    }

    fn append(&self, record: &Record) -> Result<(), LedgerError> {
        let path = || self.0.dir.join(FILE_NAME);
        let io = |source| io_error(&path(), "written")(source);
        let mut line = vec![b'\n'];
        serde_json::to_writer(&mut line, record).map_err(|e| io(e.into()))?;
        line.push(b'\n');
        match (&self.0.file).write(&line) {
            Ok(n) if n == line.len() => Ok(()),
            Ok(_) => Err(io(io::ErrorKind::StorageFull.into())),
            Err(e) => Err(io(e)),
        }
    }
}

fn io_error(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> LedgerError {
    let path = path.to_path_buf();
    move |source| LedgerError::Io {
        path,
        action,
        source,
    }
}

/// A folder that anyone else could write to could make root undo anything.
fn check_folder(dir: &Path) -> Result<(), String> {
    let meta = std::fs::symlink_metadata(dir).map_err(|e| e.to_string())?;
    if !meta.is_dir() {
        return Err("it is not a folder".into());
    }
    let me = rustix::process::geteuid().as_raw();
    if meta.uid() != me {
        return Err(format!("it belongs to user {}, not {me}", meta.uid()));
    }
    if meta.mode() & 0o022 != 0 {
        return Err(format!(
            "others may write to it (mode {:o})",
            meta.mode() & 0o7777
        ));
    }
    Ok(())
}

/// What is still held, in the order it was taken.
#[derive(Debug, Default)]
struct Contents {
    entries: Vec<Entry>,
    /// Lines that are no records: torn by a crash.
    torn: usize,
}

#[derive(Debug)]
struct Entry {
    id: EntryId,
    resource: Resource,
    /// Pid and start time, once a process runs.
    process: Option<(u32, u64)>,
    released: bool,
}

/// Reads the ledger of `dir`. One that is not there is empty.
fn read(dir: &Path) -> Result<Contents, LedgerError> {
    let path = dir.join(FILE_NAME);
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path);
    let file = match file {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Contents::default()),
        Err(e) => return Err(io_error(&path, "opened")(e)),
    };
    let size = file.metadata().map_err(io_error(&path, "read"))?.len();
    if size > SIZE_MAX {
        return Err(LedgerError::TooLarge { path, size });
    }
    let mut text = Vec::new();
    file.take(SIZE_MAX)
        .read_to_end(&mut text)
        .map_err(io_error(&path, "read"))?;
    Ok(parse(&text))
}

fn parse(text: &[u8]) -> Contents {
    let mut all = Contents::default();
    for line in text.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        let Ok(record) = serde_json::from_slice::<Record>(line) else {
            all.torn += 1;
            continue;
        };
        let find = |entries: &mut Vec<Entry>, id| entries.iter().rposition(|e| e.id == id);
        match record {
            Record::Taken { id, resource } => all.entries.push(Entry {
                id,
                resource,
                process: None,
                released: false,
            }),
            Record::Started {
                id,
                pid,
                start_time,
            } => {
                if let Some(at) = find(&mut all.entries, id) {
                    all.entries[at].process = Some((pid, start_time));
                }
            }
            Record::Released { id } => {
                if let Some(at) = find(&mut all.entries, id) {
                    all.entries[at].released = true;
                }
            }
        }
    }
    all
}

/// When process `pid` started, clock ticks since boot: field 22 of `/proc/<pid>/stat` (proc(5)).
/// With the pid it names a process for as long as the host is up. `None` when it is gone.
#[must_use]
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command in parentheses and may hold anything; 20 follow before ours.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests;
