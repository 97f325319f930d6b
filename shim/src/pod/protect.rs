//! Whether a pod's guest is a confidential one, decided before anything is taken: what the pod or the node
//! asks for, and whether this node has all of it.

use std::path::{Path, PathBuf};

use sealpod_attestation::evidence::Tee;

use crate::{
    config::{self, Config},
    error::{Error, Kind, Result},
    vm::{self, Accelerator, Confidential, ConfidentialError, confidential},
};

/// How the guest is protected; `None` for a plain one. Blocks for as long as QEMU takes to say what it has.
///
/// # Errors
/// What this node lacks.
pub(crate) fn decide(
    config: &Config,
    wish: Option<config::Confidential>,
    accelerator: Accelerator,
) -> Result<Option<Confidential>> {
    let refused = |e: &dyn std::error::Error| Error::chain(Kind::FailedPrecondition, e);
    let hypervisor = &config.hypervisor;
    let tee = match wish.unwrap_or(hypervisor.confidential) {
        config::Confidential::None => return Ok(None),
        config::Confidential::Auto => confidential::of_host(Path::new("/sys")),
        config::Confidential::Snp => Ok(Tee::Snp),
        config::Confidential::Tdx => Ok(Tee::Tdx),
    };
    let tee = tee.map_err(|e| refused(&e))?;
    let found = of_node(config, tee);
    if hypervisor.driver == config::Driver::Vmm {
        let tee = confidential::name(tee);
        return Err(refused(&ConfidentialError::Driver { tee }));
    }
    confidential::host_has(tee, accelerator, Path::new("/")).map_err(|e| refused(&e))?;
    let qemu = vm::find_program(&hypervisor.qemu).map_err(|e| refused(&e))?;
    confidential::qemu_has(tee, &qemu).map_err(|e| refused(&e))?;
    let files = confidential::check_files(
        &found,
        &hypervisor.confidential_kernel,
        &hypervisor.initramfs,
    );
    files.map_err(|e| refused(&e))?;
    Ok(Some(found))
}

/// A guest of this kind as the configuration has it, without what its owner says.
pub(crate) fn of_node(config: &Config, tee: Tee) -> Confidential {
    let hypervisor = &config.hypervisor;
    let socket = &hypervisor.quote_socket;
    let named = tee == Tee::Tdx && !socket.as_os_str().is_empty();
    Confidential {
        tee,
        firmware: hypervisor.firmware.clone(),
        init_data: Vec::new(),
        cpu: hypervisor.snp_cpu.clone(),
        quote_socket: named.then(|| PathBuf::from(socket)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_confidential_guest_is_refused_by_name_where_the_node_has_none_and_a_plain_one_is_not() {
        let mut config = Config::default();
        let tcg = Accelerator::Tcg;
        assert_eq!(decide(&config, None, tcg).expect("plain"), None);
        for (wish, said) in [
            (
                config::Confidential::Snp,
                "SEV-SNP guests need hardware KVM",
            ),
            (config::Confidential::Tdx, "TDX guests need hardware KVM"),
        ] {
            let e = decide(&config, Some(wish), tcg).expect_err("refused");
            assert!(e.message.contains(said), "{}", e.message);
        }
        // The node's own wish counts where the pod has none.
        config.hypervisor.confidential = config::Confidential::Snp;
        assert!(decide(&config, None, tcg).is_err());
        config.hypervisor.driver = config::Driver::Vmm;
        let e = decide(&config, None, tcg).expect_err("refused");
        assert!(e.message.contains("on QEMU only"), "{}", e.message);
    }
}
