//! The devices of a node as a whole: one nonce, one mode, no device twice, and for protected PCIe
//! that GPUs and switches name each other.

use std::collections::BTreeSet;

use super::device::{Checked, Kind};
use super::report::Mode;
use super::verify::NvidiaLimits;
use crate::encoding::hex;
use crate::verdict::Checks;

/// A protected-PCIe node.
const PPCIE_GPUS: usize = 8;
const PPCIE_SWITCHES: usize = 4;

/// Checks the devices against each other.
pub(super) fn verify(checks: &mut Checks, devices: &[Checked], limits: &NvidiaLimits) {
    let gpus: Vec<&Checked> = devices.iter().filter(|d| d.kind == Kind::Gpu).collect();
    let switches: Vec<&Checked> = devices.iter().filter(|d| d.kind == Kind::Switch).collect();
    if let Some(count) = limits.gpus {
        checks.require("gpu-count", gpus.len() == count, count, gpus.len());
    }
    if let Some(count) = limits.switches {
        checks.require(
            "switch-count",
            switches.len() == count,
            count,
            switches.len(),
        );
    }
    let modes: Vec<Option<Mode>> = gpus.iter().map(|g| g.mode).collect();
    let text = |m: &Option<Mode>| m.map_or("unknown".to_owned(), |m| format!("{m:?}"));
    if let Some(first) = modes.first() {
        let all: BTreeSet<String> = modes.iter().map(text).collect();
        checks.require(
            "mode",
            first.is_some() && all.len() == 1,
            "one known mode",
            all.into_iter().collect::<Vec<_>>().join(", "),
        );
    }
    if devices.len() > 1 {
        let nonces: BTreeSet<[u8; 32]> = devices.iter().map(|d| d.nonce).collect();
        checks.require(
            "one-nonce",
            nonces.len() == 1,
            "one nonce",
            format!("{} nonces", nonces.len()),
        );
        let serials: BTreeSet<&str> = devices
            .iter()
            .map(|d| d.serial.as_str())
            .filter(|s| !s.is_empty())
            .collect();
        checks.require(
            "distinct-devices",
            serials.len() == devices.len(),
            devices.len(),
            format!("{} serial numbers", serials.len()),
        );
    }
    if !gpus.is_empty() && modes.iter().all(|m| *m == Some(Mode::Ppcie)) {
        if switches.is_empty() {
            checks.not_checked(
                "ppcie-topology",
                "no NVSwitch evidence given",
                format!("{} GPUs", gpus.len()),
            );
        } else {
            protected_pcie(checks, &gpus, &switches);
        }
    }
}

fn protected_pcie(checks: &mut Checks, gpus: &[&Checked], switches: &[&Checked]) {
    let found = format!("{} and {}", gpus.len(), switches.len());
    checks.require(
        "ppcie-counts",
        gpus.len() == PPCIE_GPUS && switches.len() == PPCIE_SWITCHES,
        format!("{PPCIE_GPUS} GPUs and {PPCIE_SWITCHES} switches"),
        found,
    );
    let list = |set: &BTreeSet<[u8; 8]>| set.iter().map(|p| hex(p)).collect::<Vec<_>>().join(" ");

    // A switch reports its id, a GPU the ids at its links, in the other byte order.
    let own: BTreeSet<[u8; 8]> = switches
        .iter()
        .filter_map(|s| s.switch_pdis.as_ref())
        .filter_map(|p| <[_; 1]>::try_from(p.clone()).ok())
        .map(|[p]| p)
        .collect();
    for (n, gpu) in gpus.iter().enumerate() {
        let reverse = |mut p: [u8; 8]| {
            p.reverse();
            p
        };
        let seen: BTreeSet<[u8; 8]> = gpu
            .switch_pdis
            .iter()
            .flatten()
            .map(|p| reverse(*p))
            .collect();
        checks.require(
            &format!("ppcie-gpu{n}-switches"),
            seen == own && own.len() == switches.len(),
            list(&own),
            list(&seen),
        );
    }
    let gpu_ids: BTreeSet<[u8; 8]> = gpus.iter().filter_map(|g| g.pdi).collect();
    for (n, switch) in switches.iter().enumerate() {
        let seen: BTreeSet<[u8; 8]> = switch.gpu_pdis.iter().flatten().copied().collect();
        checks.require(
            &format!("ppcie-switch{n}-gpus"),
            seen == gpu_ids && gpu_ids.len() == gpus.len(),
            list(&gpu_ids),
            list(&seen),
        );
    }
}
