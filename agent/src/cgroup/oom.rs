//! Watches for the OOM killer in containers' cgroups and queues an event for each time it struck.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::{WatchedFile, stats};

/// Most events that wait to be fetched; later ones are dropped, they would tell nothing new.
pub const QUEUE: usize = 256;

/// Where events go: the container's id.
pub type Events = mpsc::Sender<String>;

#[derive(Debug)]
struct Group {
    id: String,
    path: PathBuf,
    seen: AtomicU64,
    events: Events,
}

impl Group {
    fn check(&self) {
        let now = stats::oom_kills(&self.path);
        if self.seen.swap(now, Ordering::Relaxed) < now {
            let _ = self.events.try_send(self.id.clone());
        }
    }
}

/// A watch on one container. Ends when it is dropped.
#[derive(Debug)]
pub struct OomWatch {
    group: Arc<Group>,
    task: AbortHandle,
}

impl OomWatch {
    /// Watches the container `id`, whose cgroup is at `path`.
    #[must_use]
    pub fn start(id: &str, path: &Path, events: Events) -> Self {
        let group = Arc::new(Group {
            id: id.into(),
            path: path.into(),
            seen: AtomicU64::new(0),
            events,
        });
        let task = tokio::spawn(watch(group.clone()));
        Self {
            group,
            task: task.abort_handle(),
        }
    }

    /// Looks now, so that an event is queued before the exit that it caused is told.
    pub fn check(&self) {
        self.group.check();
    }
}

impl Drop for OomWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn watch(group: Arc<Group>) -> std::io::Result<()> {
    // Without a memory controller there is no such file, and nothing to watch.
    let file = WatchedFile::open(&group.path.join("memory.events"))?;
    loop {
        file.read()?;
        group.check();
        file.changed().await?;
    }
}
