//! A VM for tests: notes what is passed into it, whether that stays, and that it was stopped.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;

use crate::vm::{Accelerator, Disk, Mark, Nic, Passed, Vm, VmError, VmExit};

/// See the file's head.
#[derive(Default)]
pub(crate) struct Fake {
    passed: Mutex<Vec<String>>,
    ever: Mutex<Vec<String>>,
    refuses: bool,
    stopped: AtomicBool,
}

impl Fake {
    /// One that takes no device.
    pub(crate) fn that_refuses() -> Self {
        Self {
            refuses: true,
            ..Self::default()
        }
    }

    /// What it has.
    pub(crate) fn passed(&self) -> Vec<String> {
        self.passed.lock().expect("lock").clone()
    }

    /// What it has or had.
    pub(crate) fn ever(&self) -> Vec<String> {
        self.ever.lock().expect("lock").clone()
    }

    /// Whether it was stopped.
    pub(crate) fn stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl Vm for Fake {
    fn pid(&self) -> u32 {
        0
    }
    fn pidfd(&self) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn accelerator(&self) -> Accelerator {
        Accelerator::Tcg
    }
    fn marks(&self) -> Vec<Mark> {
        Vec::new()
    }
    fn console_tail(&self) -> Vec<String> {
        Vec::new()
    }
    async fn describe(&self) -> Result<Vec<String>, VmError> {
        Ok(Vec::new())
    }
    async fn pause(&self) -> Result<(), VmError> {
        Ok(())
    }
    async fn resume(&self) -> Result<(), VmError> {
        Ok(())
    }
    async fn add_disk(&self, _: Disk) -> Result<(), VmError> {
        Err(VmError::Ended)
    }
    async fn remove_disk(&self, _: &str) -> Result<(), VmError> {
        Err(VmError::Ended)
    }
    async fn add_nic(&self, _: Nic) -> Result<(), VmError> {
        Err(VmError::Ended)
    }
    async fn pass(&self, device: Passed) -> Result<(), VmError> {
        if self.refuses {
            return Err(VmError::NoPort { ports: 0 });
        }
        for list in [&self.passed, &self.ever] {
            list.lock().expect("lock").push(device.id().into());
        }
        Ok(())
    }
    async fn take_back(&self, id: &str) -> Result<(), VmError> {
        self.passed
            .lock()
            .expect("lock")
            .retain(|other| other != id);
        Ok(())
    }
    async fn wait(&self) -> VmExit {
        std::future::pending().await
    }
    async fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
    }
}
