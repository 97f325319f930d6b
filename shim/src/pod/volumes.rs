//! The volumes of a pod: each mounted once below the share, however many of its containers use it, for
//! as long as one does.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use crate::{
    mount::{self, Error},
    spec::HostMount,
};

/// See the file's head. Blocks for as long as mount(2) does.
#[derive(Debug)]
pub(crate) struct Volumes {
    dir: PathBuf,
    /// Outside the share.
    stages: PathBuf,
    /// Users of each volume, by its name.
    users: Mutex<HashMap<String, u32>>,
}

impl Volumes {
    pub(super) fn new(dir: PathBuf, stages: PathBuf) -> Self {
        Self {
            dir,
            stages,
            users: Mutex::default(),
        }
    }

    /// A place outside the share for the root of the container `id`.
    pub(crate) fn root_stage(&self, id: &str) -> PathBuf {
        self.stages.join(format!("root-{id}"))
    }

    /// Mounts what is not mounted yet, for one more user. Each name that it got to is added to `held`,
    /// to be given to [`Volumes::release`], also when it fails.
    pub(crate) fn hold(&self, volumes: &[HostMount], held: &mut Vec<String>) -> Result<(), Error> {
        for volume in volumes {
            let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
            let count = users.entry(volume.name.clone()).or_insert(0);
            *count += 1;
            held.push(volume.name.clone());
            if *count == 1 {
                mount::volume(volume, &self.dir, &self.stages)?;
            }
        }
        Ok(())
    }

    /// One user less of each of `held`.
    pub(crate) fn release(&self, held: &[String]) -> Result<(), Error> {
        let mut result = Ok(());
        for name in held {
            let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(count) = users.get_mut(name) else {
                continue;
            };
            *count -= 1;
            if *count == 0 {
                users.remove(name);
                result = result.and(mount::detach(&self.dir.join(name)));
            }
        }
        result
    }
}
