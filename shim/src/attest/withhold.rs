//! Devices that are in a VM from its start, for platforms that know no hot-plug and for what a CDI specification
//! names: reserved on the host before the VM is, withheld from containers in it until the gates have opened.

use async_trait::async_trait;

use super::{
    release::{Release, ReleaseError, way},
    wanted::Wanted,
};
use crate::{
    ledger::Ledger,
    vm::{Passed, Vm},
};

/// Devices that are in a VM from its start. Whoever drops them gives them back.
#[derive(Default)]
pub struct Withheld(Vec<Box<dyn Release>>);

impl Withheld {
    /// Reserves them, and says what the VM is started with.
    ///
    /// # Errors
    /// [`ReleaseError`]; then the host has all of them.
    pub fn reserve(
        wanted: &[Wanted],
        ledger: &Ledger,
    ) -> Result<(Self, Vec<Passed>), ReleaseError> {
        let (mut all, mut given) = (Self::default(), Vec::new());
        for one in wanted {
            let mut way = way(one);
            given.push(way.reserve(ledger)?);
            all.0.push(way);
        }
        Ok((all, given))
    }

    /// Takes out the one with this id.
    pub(super) fn take(&mut self, id: &str) -> Option<Box<dyn Release>> {
        let at = self.0.iter().position(|one| one.id() == id)?;
        Some(self.0.swap_remove(at))
    }
}

impl Drop for Withheld {
    fn drop(&mut self) {
        for mut one in self.0.drain(..) {
            if let Err(e) = one.give_back() {
                tracing::error!("{}", crate::error::chain(&e));
            }
        }
    }
}

/// A device that is in the VM from its start, where the guest gate withholds it, with everything else that a
/// CDI specification gives a container, until there is a token. Afterwards it goes the way of all: closed in
/// the guest, unplugged, given back.
pub(super) struct CdiWithhold(pub(super) Box<dyn Release>);

#[async_trait]
impl Release for CdiWithhold {
    fn id(&self) -> &str {
        self.0.id()
    }

    fn reserve(&mut self, ledger: &Ledger) -> Result<Passed, ReleaseError> {
        self.0.reserve(ledger)
    }

    fn reserved(&self) -> bool {
        self.0.reserved()
    }

    fn give_back(&mut self) -> Result<(), ReleaseError> {
        self.0.give_back()
    }

    /// There it is already, or it cannot come any more.
    async fn attach(&mut self, _: &dyn Vm, _: &Ledger) -> Result<(), ReleaseError> {
        match self.reserved() {
            true => Ok(()),
            false => Err(ReleaseError::Late(self.id().into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{super::release::tests::disk, *};
    use crate::attest::fake::Fake;

    #[tokio::test]
    async fn a_withheld_device_is_reserved_before_the_vm_and_never_given_to_a_running_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("content");
        fs::write(&path, "x").unwrap();
        let ledger = Ledger::open(&dir.path().join("pod")).unwrap();
        let (cold, vm) = (disk(path.clone(), true), Fake::default());
        let e = way(&cold).attach(&vm, &ledger).await.unwrap_err();
        assert!(matches!(e, ReleaseError::Late(_)), "{e}");
        let one = std::slice::from_ref(&cold);
        let (mut withheld, given) = Withheld::reserve(one, &ledger).unwrap();
        assert_eq!(
            given,
            [Passed::StandIn {
                id: "gpu0".into(),
                path: path.clone()
            }]
        );
        // Nobody else gets it; another device of these is not there.
        let busy = way(&disk(path.clone(), false)).attach(&vm, &ledger).await;
        assert!(matches!(busy, Err(ReleaseError::Busy(_))));
        assert!(withheld.take("gpu1").is_none());
        let mut device = withheld.take("gpu0").unwrap();
        device.attach(&vm, &ledger).await.unwrap();
        assert!(vm.ever().is_empty());
        device.detach(Some(&vm)).await.unwrap();
        // A VM that never came up leaves it free as well.
        drop(Withheld::reserve(one, &ledger).unwrap());
        let again = way(&disk(path, false)).attach(&vm, &ledger).await;
        again.unwrap();
    }
}
