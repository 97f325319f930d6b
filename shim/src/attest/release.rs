//! How a device of the host gets to a VM once the host gate has opened, and how it comes back. One type
//! for each way; the gate knows the trait only.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use super::{
    wanted::{Given, Wanted},
    withhold::CdiWithhold,
};
use crate::{
    ledger::{EntryId, Ledger, LedgerError, Resource},
    vm::{Passed, Vm, VmError},
};

/// A device that was not given, or not given back.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// Another pod has it.
    #[error("Device {0:?} is in use by another pod")]
    Busy(String),
    /// It would have had to be there from the start.
    #[error("Device {0:?} is in VMs from their start only: the pod's sandbox has to name it too")]
    Late(String),
    /// The host.
    #[error("Device {id:?}: cannot {action} {path}")]
    Host {
        /// Which.
        id: String,
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It could not be written down; then it is not taken.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The VM.
    #[error("Device {id:?}")]
    Vm {
        /// Which.
        id: String,
        /// Why.
        source: VmError,
    },
}

/// A device on its way to a VM and back.
#[async_trait]
pub trait Release: Send + Sync {
    /// By what the guest and the token know it.
    fn id(&self) -> &str;
    /// Takes it from everyone else on the host. Returns what the VM is to be given.
    ///
    /// # Errors
    /// [`ReleaseError`]; then the host has it as before.
    fn reserve(&mut self, ledger: &Ledger) -> Result<Passed, ReleaseError>;
    /// Whether it is.
    fn reserved(&self) -> bool;
    /// Gives it back to the host, reset. Idempotent.
    ///
    /// # Errors
    /// [`ReleaseError`].
    fn give_back(&mut self) -> Result<(), ReleaseError>;

    /// Gives it to the VM.
    ///
    /// # Errors
    /// [`ReleaseError`]; then the host has it as before.
    async fn attach(&mut self, vm: &dyn Vm, ledger: &Ledger) -> Result<(), ReleaseError> {
        let passed = self.reserve(ledger)?;
        let given = vm.pass(passed).await.map_err(vm_error(self.id()));
        if given.is_err()
            && let Err(e) = self.give_back()
        {
            tracing::warn!("{}", crate::error::chain(&e));
        }
        given
    }
    /// Takes it from the VM, if that still runs (`vm`), and gives it back to the host. Idempotent.
    ///
    /// # Errors
    /// [`ReleaseError`]: the guest did not let go of it. Once the VM has ended, call again without it.
    async fn detach(&mut self, vm: Option<&dyn Vm>) -> Result<(), ReleaseError> {
        if let (true, Some(vm)) = (self.reserved(), vm) {
            gone(vm.take_back(self.id()).await).map_err(vm_error(self.id()))?;
        }
        self.give_back()
    }
}

/// The way for a device.
#[must_use]
pub fn way(wanted: &Wanted) -> Box<dyn Release> {
    let id = wanted.id.clone();
    let way: Box<dyn Release> = match &wanted.device {
        Given::Disk { path } => Box::new(StandInNvme {
            id,
            path: path.clone(),
            held: None,
        }),
        Given::Function { address } => Box::new(VfioAttach {
            id,
            function: Path::new("/sys/bus/pci/devices").join(address),
            held: None,
        }),
    };
    match wanted.cold {
        true => Box::new(CdiWithhold(way)),
        false => way,
    }
}

fn vm_error(id: &str) -> impl FnOnce(VmError) -> ReleaseError {
    let id = id.to_owned();
    |source| ReleaseError::Vm { id, source }
}

/// The disk that stands in for a GPU. The lock on its content is what VFIO's own exclusive open is.
struct StandInNvme {
    id: String,
    path: PathBuf,
    held: Option<File>,
}

#[async_trait]
impl Release for StandInNvme {
    fn id(&self) -> &str {
        &self.id
    }

    fn reserve(&mut self, _: &Ledger) -> Result<Passed, ReleaseError> {
        let host = |action| {
            let (id, path) = (self.id.clone(), self.path.clone());
            move |source| ReleaseError::Host {
                id,
                action,
                path,
                source,
            }
        };
        let file = File::open(&self.path).map_err(host("open"))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(ReleaseError::Busy(self.id.clone())),
            Err(e) => return Err(host("lock")(e.into())),
        }
        self.held = Some(file);
        let (id, path) = (self.id.clone(), self.path.clone());
        Ok(Passed::StandIn { id, path })
    }

    fn reserved(&self) -> bool {
        self.held.is_some()
    }

    fn give_back(&mut self) -> Result<(), ReleaseError> {
        self.held = None;
        Ok(())
    }
}

/// A VM that has ended holds nothing.
fn gone(taken: Result<(), VmError>) -> Result<(), VmError> {
    match taken {
        Err(VmError::Ended | VmError::NoDevice(_)) => Ok(()),
        other => other,
    }
}

/// Has the function leave the driver that has it, for the one that `driver` names, or any where it is empty.
fn rebind(function: &Path, driver: &str) -> io::Result<()> {
    let address = function.file_name().unwrap_or_default().as_encoded_bytes();
    fs::write(function.join("driver_override"), format!("{driver}\n"))?;
    if function.join("driver").exists() {
        fs::write(function.join("driver/unbind"), address)?;
    }
    // The function's folder is a link, its parent is not.
    let devices = function.parent().unwrap_or(Path::new("/"));
    fs::write(devices.join("../drivers_probe"), address)
}

/// Gives a function back to the host: reset, and probed by any driver.
pub(crate) fn give_back(function: &Path) -> io::Result<()> {
    // What the pod left in it is no one's business; one that cannot be reset goes back all the same.
    if let Err(e) = fs::write(function.join("reset"), "1") {
        tracing::warn!("{} was not reset: {e}", function.display());
    }
    rebind(function, "")
}

/// A PCI function: bound to vfio-pci for as long as a pod has it, reset before and after.
struct VfioAttach {
    id: String,
    /// Its folder in sysfs.
    function: PathBuf,
    held: Option<(Ledger, EntryId)>,
}

impl VfioAttach {
    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> ReleaseError {
        let (id, path) = (self.id.clone(), self.function.clone());
        move |source| ReleaseError::Host {
            id,
            action,
            path,
            source,
        }
    }

    /// `/dev/vfio/devices/vfio<n>`.
    fn cdev(&self) -> Result<PathBuf, ReleaseError> {
        let folder = self.function.join("vfio-dev");
        let first = fs::read_dir(&folder).and_then(|mut d| {
            let entry = d.next().ok_or(io::ErrorKind::NotFound)?;
            Ok(entry?.file_name())
        });
        let name = first.map_err(|source| ReleaseError::Host {
            id: self.id.clone(),
            action: "find the VFIO device in",
            path: folder,
            source,
        })?;
        Ok(Path::new("/dev/vfio/devices").join(name))
    }
}

#[async_trait]
impl Release for VfioAttach {
    fn id(&self) -> &str {
        &self.id
    }

    fn reserve(&mut self, ledger: &Ledger) -> Result<Passed, ReleaseError> {
        let function = self.function.clone();
        let entry = ledger.record(Resource::VfioFunction { function })?;
        self.held = Some((ledger.clone(), entry));
        // What the last user left in it is no one's business.
        let bound = || {
            rebind(&self.function, "vfio-pci").map_err(self.failed("bind to vfio-pci"))?;
            let reset = fs::write(self.function.join("reset"), "1");
            reset.map_err(self.failed("reset"))?;
            let (id, cdev) = (self.id.clone(), self.cdev()?);
            Ok(Passed::Vfio { id, cdev })
        };
        let bound = bound();
        if bound.is_err()
            && let Err(e) = self.give_back()
        {
            tracing::warn!("{}", crate::error::chain(&e));
        }
        bound
    }

    fn reserved(&self) -> bool {
        self.held.is_some()
    }

    fn give_back(&mut self) -> Result<(), ReleaseError> {
        let Some((ledger, entry)) = self.held.take() else {
            return Ok(());
        };
        give_back(&self.function).map_err(self.failed("give back"))?;
        Ok(ledger.release(entry)?)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::attest::fake::Fake;

    pub(in super::super) fn disk(path: PathBuf, cold: bool) -> Wanted {
        Wanted {
            id: "gpu0".into(),
            path: "/dev/gpu0".into(),
            device: Given::Disk { path },
            cold,
        }
    }

    #[tokio::test]
    async fn a_stand_in_is_one_pods_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("content");
        fs::write(&path, "x").unwrap();
        let ledger = Ledger::open(&dir.path().join("pod")).unwrap();
        let wanted = disk(path, false);
        let (vm, other) = (Fake::default(), Fake::default());
        let (mut first, mut second) = (way(&wanted), way(&wanted));
        first.attach(&vm, &ledger).await.unwrap();
        let e = second.attach(&other, &ledger).await.unwrap_err();
        assert!(matches!(e, ReleaseError::Busy(_)), "{e}");
        assert!(other.passed().is_empty());
        first.detach(Some(&vm)).await.unwrap();
        first.detach(Some(&vm)).await.unwrap();
        assert!(vm.passed().is_empty());
        second.attach(&other, &ledger).await.unwrap();
    }

    /// A function in a folder that looks like sysfs; what is written to its files stays in them.
    fn function(root: &Path) -> VfioAttach {
        let folder = root.join("bus/pci/devices/0000:65:00.0");
        for sub in ["driver", "vfio-dev/vfio3"] {
            fs::create_dir_all(folder.join(sub)).unwrap();
        }
        VfioAttach {
            id: "0000-65-00-0".into(),
            function: folder,
            held: None,
        }
    }

    #[tokio::test]
    async fn a_function_is_reset_on_both_ways_and_goes_back_to_its_driver() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let read = |file: &str| fs::read_to_string(root.join("bus/pci").join(file)).unwrap();
        let of = |file: &str| read(&format!("devices/0000:65:00.0/{file}"));
        let (mut device, vm) = (function(root), Fake::default());
        let ledger = Ledger::open(&root.join("pod")).unwrap();
        device.attach(&vm, &ledger).await.unwrap();
        assert_eq!(vm.passed(), ["0000-65-00-0"]);
        assert_eq!(of("driver_override"), "vfio-pci\n");
        assert_eq!(of("driver/unbind"), "0000:65:00.0");
        assert_eq!(
            (read("drivers_probe"), of("reset")),
            ("0000:65:00.0".into(), "1".into())
        );
        fs::write(root.join("bus/pci/devices/0000:65:00.0/reset"), "").unwrap();
        device.detach(Some(&vm)).await.unwrap();
        assert!(vm.passed().is_empty());
        assert_eq!(
            (of("reset").as_str(), of("driver_override").as_str()),
            ("1", "\n")
        );
    }

    #[tokio::test]
    async fn a_function_that_the_vm_refuses_goes_back_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut device = function(dir.path());
        let vm = Fake::that_refuses();
        let ledger = Ledger::open(&dir.path().join("pod")).unwrap();
        assert!(device.attach(&vm, &ledger).await.is_err());
        let left = device.function.join("driver_override");
        assert_eq!(fs::read_to_string(left).unwrap(), "\n");
        device.detach(Some(&vm)).await.unwrap();
    }
}
