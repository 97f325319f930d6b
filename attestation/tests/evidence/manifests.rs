//! NVIDIA's manifests, OCSP responses and roots, each for itself.

use sealpod_attestation::nvidia::Rim;
use sealpod_attestation::ocsp::OcspResponse;
use sealpod_attestation::verdict::{Checks, Tee, chain_text};
use sealpod_attestation::x509::Certificate;
use sealpod_attestation::{TrustAnchors, anchors, encoding};
use serde_json::Value;

use crate::folder::{Case, Expect, Folder, at};
use crate::nvidia::{GREEN_CHAIN, GREEN_DRIVER, GREEN_VBIOS, SWITCH_RIM, case};

/// A manifest on its own.
fn rim(file: &'static str, now: &'static str, expect: Expect) -> Case {
    let run = move |folder: &Folder| {
        let rim = Rim::parse(&folder.read(file)).map_err(|e| chain_text(&e))?;
        let mut checks = Checks::new(Tee::Nvidia);
        checks.result("rim-signature", "signed", rim.verify_signature());
        let result = rim.verify_chain(&TrustAnchors::production().nvidia_rim, at(now));
        checks.result("rim-chain", "under the pinned root", result);
        Ok(checks.into_verdict(false, Value::Null))
    };
    Case {
        files: vec![file].leak(),
        setting: now,
        expect,
        run: Box::new(run),
    }
}

pub(crate) fn root(file: &'static str) -> Case {
    let run = move |folder: &Folder| {
        let der = encoding::pem_blocks(std::str::from_utf8(&folder.read(file)).unwrap())
            .map_err(|e| e.to_string())?
            .remove(0)
            .1;
        let certificate = Certificate::parse(&der).map_err(|e| e.to_string())?;
        let pin = anchors::pin_of(&certificate);
        let production = TrustAnchors::production();
        let mut checks = Checks::new(Tee::Nvidia);
        let pinned =
            production.nvidia_device.contains(&pin) || production.nvidia_rim.contains(&pin);
        checks.require("pinned", pinned, "a compiled-in pin", encoding::hex(&pin));
        Ok(checks.into_verdict(false, Value::Null))
    };
    Case {
        files: vec![file].leak(),
        setting: "pinned",
        expect: Expect::Accepted(&["pinned"]),
        run: Box::new(run),
    }
}

/// One OCSP response, for the certificate it is about, within and outside of its window.
pub(crate) fn ocsp(file: &'static str, now: &'static str, expect: Expect) -> Case {
    let run = move |folder: &Folder| {
        let bytes = folder.read(file);
        let response = OcspResponse::parse(&bytes).map_err(|e| chain_text(&e))?;
        let mut chains = vec![folder.collateral(&[GREEN_CHAIN])?.certificates];
        for rim in [GREEN_DRIVER, GREEN_VBIOS] {
            chains.push(
                Rim::parse(&folder.read(rim))
                    .map_err(|e| chain_text(&e))?
                    .chain,
            );
        }
        let mut checks = Checks::new(Tee::Nvidia);
        for chain in &chains {
            let chain = sealpod_attestation::x509::parse_all(chain).map_err(|e| chain_text(&e))?;
            if let Some(pair) = chain.windows(2).find(|p| response.is_about(&p[0], &p[1])) {
                checks.result(
                    "ocsp",
                    "good",
                    response.verify(&pair[0], &pair[1], None, at(now)),
                );
                break;
            }
        }
        Ok(checks.into_verdict(false, Value::Null))
    };
    Case {
        files: vec![file].leak(),
        setting: now,
        expect,
        run: Box::new(run),
    }
}

pub(crate) fn manifests() -> Vec<Case> {
    use Expect::{Accepted, Refused, Unreadable};
    const SIGNED: Expect = Accepted(&["rim-signature", "rim-chain"]);
    vec![
        rim(GREEN_DRIVER, "2026-05-01", SIGNED),
        rim(
            GREEN_DRIVER,
            "2026-06-02",
            Refused(&[("rim-chain", "not at 2026-06-02")]),
        ),
        rim(GREEN_VBIOS, "2025-10-24", SIGNED),
        rim(SWITCH_RIM, "2026-11-21", SIGNED),
        rim("gpu/h100-535.86/vbios-rim.xml", "2025-01-01", SIGNED),
        rim(
            "gpu/rims/NV_GPU_DRIVER_GH100_550.144.03.xml",
            "2026-11-21",
            SIGNED,
        ),
        rim(
            "gpu/rims/NV_GPU_DRIVER_545.00_test_no_gpu.xml",
            "2025-06-01",
            SIGNED,
        ),
        rim(
            "gpu/rims/NV_GPU_DRIVER_545.00_test_no_gpu.xml",
            "2025-06-27",
            Refused(&[("rim-chain", "not at 2025-06-27")]),
        ),
        rim(
            "gpu/rims/NV_GPU_VBIOS_96.00.74.00.1C.xml",
            "2025-10-24",
            SIGNED,
        ),
        rim(
            "gpu/h100-535.86/bad-driver-rim-mismatch.xml",
            "2026-01-01",
            Refused(&[("rim-signature", "digest")]),
        ),
        rim(
            "gpu/bad/rim-expired-signer-570.xml",
            "2026-11-21",
            Refused(&[
                ("rim-signature", "digest"),
                ("rim-chain", "not at 2026-11-21"),
            ]),
        ),
        rim(
            "gpu/bad/rim-invalid-signature.xml",
            "2026-11-21",
            Refused(&[("rim-signature", "signature is not that of")]),
        ),
        case(
            &["gpu/bad/report-570.bin"],
            &[
                "gpu/bad/report-invalid-signature.chain.pem",
                "gpu/bad/rim-expired-signer-570.xml",
            ],
            "with the expired manifest",
            "2026-11-21",
            Refused(&[
                ("driver-rim-signature", "digest"),
                ("driver-rim-chain", "not at 2026-11-21"),
                ("measurements", "not index"),
            ]),
        ),
        rim(
            "gpu/bad/rim-malformed/failure_duplicate_index.xml",
            "2026-11-21",
            Unreadable("RIM"),
        ),
        rim(
            "gpu/bad/rim-malformed/failure_empty_payload.xml",
            "2026-11-21",
            Unreadable("no valid measurement in its Payload"),
        ),
        rim(
            "gpu/bad/rim-malformed/failure_invalid_alternatives.xml",
            "2026-11-21",
            Unreadable("number of alternatives"),
        ),
        rim(
            "gpu/bad/rim-malformed/failure_invalid_base64_cert.xml",
            "2026-11-21",
            Unreadable("no valid SoftwareIdentity"),
        ),
        rim(
            "gpu/bad/rim-malformed/failure_missing_hash.xml",
            "2026-11-21",
            Unreadable("fewer hashes"),
        ),
        rim(
            "gpu/bad/rim-malformed/failure_missing_index.xml",
            "2026-11-21",
            Unreadable("no valid index"),
        ),
        rim(
            "gpu/bad/rim-malformed/failure_missing_meta.xml",
            "2026-11-21",
            Unreadable("no valid SoftwareIdentity"),
        ),
    ]
}
