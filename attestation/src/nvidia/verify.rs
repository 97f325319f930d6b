//! The NVIDIA verifier: all devices of a node, each by its report, chain and manifests, and then as
//! a whole.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::device::{self, Checked};
use super::evidence::Device;
use super::rim::Rim;
use super::topology;
use crate::anchors::TrustAnchors;
use crate::collateral::Collateral;
use crate::time::Timestamp;
use crate::verdict::{Checks, Tee, Verdict};

/// What evidence is compared with.
#[derive(Clone, Debug, Default)]
pub struct NvidiaPolicy {
    /// The verifier's nonce, exactly.
    pub nonce: Option<[u8; 32]>,
    /// The rest: limits that a file can set.
    pub limits: NvidiaLimits,
}

/// Limits of what is accepted, as a file can set them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NvidiaLimits {
    /// Refuse when an OCSP response is missing for a certificate that has to have one.
    pub require_revocation: bool,
    /// Refuse when a manifest for the driver, the VBIOS or the switch BIOS is missing.
    pub require_rims: bool,
    /// Number of GPUs, exactly.
    pub gpus: Option<usize>,
    /// Number of NVSwitches, exactly.
    pub switches: Option<usize>,
}

/// Verifies the devices of one node with the manifests, certificates and OCSP responses of
/// `collateral` at the time `now`.
pub fn verify(
    devices: &[Device],
    collateral: &Collateral,
    policy: &NvidiaPolicy,
    anchors: &TrustAnchors,
    now: Timestamp,
) -> Verdict {
    let mut checks = Checks::new(Tee::Nvidia);
    let mut rims = Vec::new();
    for bytes in &collateral.rims {
        match Rim::read(bytes) {
            Ok(rim) => rims.push(rim),
            Err(error) => checks.unreadable("rim-format", "a reference integrity manifest", &error),
        }
    }
    let several = devices.len() > 1;
    let mut checked: Vec<Checked> = Vec::new();
    let mut claims = Vec::new();
    for (n, device) in devices.iter().enumerate() {
        if several {
            checks.set_prefix(format!("{n}/"));
        }
        let context = device::Context {
            collateral,
            rims: &rims,
            policy,
            anchors,
            now,
        };
        let (result, mut claim) = device::verify(&mut checks, device, &context);
        if let (Value::Object(map), Some(result)) = (&mut claim, &result) {
            map.insert("chip".into(), result.chip.clone().into());
            map.insert("serial".into(), result.serial.clone().into());
        }
        claims.push(claim);
        checked.extend(result);
    }
    checks.set_prefix("");
    if checked.len() == devices.len() {
        topology::verify(&mut checks, &checked, &policy.limits);
    }
    checks.into_verdict(anchors.simulated, serde_json::json!({ "devices": claims }))
}
