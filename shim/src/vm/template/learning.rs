//! A template learns from the first VMs that come from it: which pages they write to until their container runs is
//! kept beside the template, and later VMs have copies of these before they run.

use std::fs::File;
use std::time::{Duration, Instant};

use super::store::Store;
use super::{TemplateError, write_set};
use crate::error::chain;

/// A container that comes later is not the reason for what was written by then.
const SOON: Duration = Duration::from_secs(10);

/// To be done when the container runs.
#[derive(Debug)]
pub struct Learning {
    pub(super) store: Store,
    pub(super) name: String,
    pub(super) memory: File,
    /// The VMM's.
    pub(super) pid: u32,
    pub(super) since: Instant,
}

impl Learning {
    /// Looks, and keeps what it finds. The pod does as well without: what goes wrong is in the log. Blocks for some
    /// milliseconds.
    pub fn learn(self) {
        if self.since.elapsed() > SOON {
            return;
        }
        match self.try_learn() {
            Ok(Some(pages)) => {
                tracing::info!("Template {}: VMs from it write to {pages} pages", self.name)
            }
            // Another VM's turn, or a template is being made: a later one will do.
            Ok(None) => {}
            Err(e) => tracing::warn!("The template learns nothing: {}", chain(&e)),
        }
    }

    /// How many pages are known now; none where somebody else has the lock.
    fn try_learn(&self) -> Result<Option<usize>, TemplateError> {
        let found = write_set::of(self.pid, &self.memory);
        let found = found.map_err(|source| TemplateError::Host {
            action: "look at the memory of process",
            path: self.pid.to_string().into(),
            source,
        })?;
        let Some(lock) = self.store.lock()? else {
            return Ok(None);
        };
        Ok(Some(self.store.learn(&lock, &self.name, found)?.len()))
    }
}
