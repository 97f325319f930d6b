//! NVIDIA: GPU and NVSwitch reports with their chains, OCSP responses and manifests, whole nodes.

use sealpod_attestation::nvidia::{self, Device, NvidiaPolicy};
use sealpod_attestation::verdict::chain_text;
use sealpod_attestation::{TrustAnchors, encoding};

use crate::folder::{Case, Expect, Folder, at};
use crate::manifests::{manifests, ocsp, root};

const GREEN: &str = "gpu/h100-550.90-GREEN/report.bin";
pub(crate) const GREEN_CHAIN: &str = "gpu/h100-550.90-GREEN/chain.pem";
pub(crate) const GREEN_DRIVER: &str = "gpu/h100-550.90-GREEN/driver-rim.xml";
pub(crate) const GREEN_VBIOS: &str = "gpu/h100-550.90-GREEN/vbios-rim.xml";
const GREEN_NONCE: &str = "gpu/h100-550.90-GREEN/nonce.hex";
const OCSP: [&str; 7] = [
    "gpu/h100-550.90-GREEN/ocsp/gpu_certificate_l2.der",
    "gpu/h100-550.90-GREEN/ocsp/gpu_certificate_l3.der",
    "gpu/h100-550.90-GREEN/ocsp/gpu_certificate_l4.der",
    "gpu/h100-550.90-GREEN/ocsp/gpu_rim_l2.der",
    "gpu/h100-550.90-GREEN/ocsp/gpu_driver_rim_l3.der",
    "gpu/h100-550.90-GREEN/ocsp/gpu_driver_rim_l4.der",
    "gpu/h100-550.90-GREEN/ocsp/gpu_vbios_l4.der",
];
const SWITCH: &str = "gpu/switch-ls10-GREEN/evidence.json";
pub(crate) const SWITCH_RIM: &str = "gpu/switch-ls10-GREEN/switch-rim.xml";
const GPUS_PPCIE: &str = "gpu/h200class-8gpu-ppcie.json";
const SWITCHES_PPCIE: &str = "gpu/h200class-4switch-ppcie.json";
const BLACKWELL: &str = "gpu/blackwell-8gpu-mpt.json";
const OLD: &str = "gpu/h100-535.86/report.bin";
const OLD_CHAIN: &str = "gpu/h100-535.86/chain.pem";
const PASS: &[&str] = &["report-signature", "chain", "fwid", "chip", "mode"];

/// What other verifiers said about devices. It is input for a policy, never evidence.
const CLAIMS: [&str; 5] = [
    "gpu/claims/hopperClaimsv3_decoded.json",
    "gpu/claims/nras-eat-example.json",
    "gpu/claims/nras-x5c-chain.json",
    "gpu/claims/nvattest-h100-measres-fail.json",
    "gpu/claims/nvattest-h100-pass.json",
];

fn claims(file: &'static str) -> Case {
    let run = move |folder: &Folder| {
        let text = String::from_utf8(folder.read(file)).unwrap();
        let devices = nvidia::parse_evidence_json(&text).map_err(|e| chain_text(&e))?;
        Ok(nvidia::verify(
            &devices,
            &sealpod_attestation::Collateral::default(),
            &NvidiaPolicy::default(),
            &TrustAnchors::production(),
            at("2026-11-21"),
        ))
    };
    Case {
        files: vec![file].leak(),
        setting: "claims offered as evidence",
        expect: Expect::Unreadable("Not a JSON list of devices"),
        run: Box::new(run),
    }
}

fn devices(folder: &Folder, file: &str) -> Vec<Device> {
    let bytes = folder.read(file);
    if file.ends_with(".json") {
        nvidia::parse_evidence_json(std::str::from_utf8(&bytes).unwrap()).unwrap()
    } else {
        vec![Device {
            name: String::new(),
            report: bytes,
            chain: Vec::new(),
        }]
    }
}

fn nonce(folder: &Folder) -> [u8; 32] {
    encoding::unhex_array(
        std::str::from_utf8(&folder.read(GREEN_NONCE))
            .unwrap()
            .trim(),
    )
    .unwrap()
}

pub(crate) fn case(
    evidence: &'static [&'static str],
    collateral: &'static [&'static str],
    setting: &'static str,
    now: &'static str,
    expect: Expect,
) -> Case {
    case_with(evidence, collateral, setting, now, |_, _| {}, expect)
}

fn case_with(
    evidence: &'static [&'static str],
    collateral: &'static [&'static str],
    setting: &'static str,
    now: &'static str,
    adjust: fn(&mut NvidiaPolicy, &Folder),
    expect: Expect,
) -> Case {
    let run = move |folder: &Folder| {
        let all: Vec<Device> = evidence.iter().flat_map(|f| devices(folder, f)).collect();
        let mut policy = NvidiaPolicy::default();
        adjust(&mut policy, folder);
        Ok(nvidia::verify(
            &all,
            &folder.collateral(collateral)?,
            &policy,
            &TrustAnchors::production(),
            at(now),
        ))
    };
    Case {
        files: [evidence, collateral].concat().leak(),
        setting,
        expect,
        run: Box::new(run),
    }
}

/// All cases of this family.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = single();
    cases.extend(nodes());
    cases.extend(manifests());
    for (n, file) in OCSP.into_iter().enumerate() {
        let (inside, outside) = if n < 3 {
            ("2025-08-21T12:00:00Z", "2025-08-22T06:48:00Z")
        } else {
            ("2025-10-24T12:00:00Z", "2025-10-25T11:33:00Z")
        };
        cases.push(ocsp(file, inside, Expect::Accepted(&["ocsp"])));
        cases.push(ocsp(
            file,
            outside,
            Expect::Refused(&[("ocsp", "not at 2025")]),
        ));
    }
    cases.extend(CLAIMS.map(claims));
    cases.push(root("gpu/roots/nvidia-device-identity-ca.pem"));
    cases.push(root("gpu/roots/nvidia-rim-root.pem"));
    cases
}

fn single() -> Vec<Case> {
    use Expect::{Accepted, Refused};
    const WITH_RIMS: &[&str] = &[GREEN_CHAIN, GREEN_DRIVER, GREEN_VBIOS];
    const FULL: &[&str] = &[
        "nonce",
        "report-signature",
        "chain",
        "fwid",
        "driver-rim-signature",
        "vbios-rim-signature",
        "rim-overlap",
        "measurements",
    ];
    let with_nonce: fn(&mut NvidiaPolicy, &Folder) = |p, f| p.nonce = Some(nonce(f));
    let other_nonce: fn(&mut NvidiaPolicy, &Folder) = |p, _| p.nonce = Some([1; 32]);
    let strict: fn(&mut NvidiaPolicy, &Folder) = |p, _| {
        p.limits.require_revocation = true;
        p.limits.require_rims = true;
    };
    vec![
        case_with(
            &[GREEN, GREEN_NONCE][..1],
            WITH_RIMS,
            "nonce given",
            "2025-10-24",
            with_nonce,
            Accepted(FULL),
        ),
        Case {
            files: &[GREEN_NONCE],
            ..case_with(
                &[GREEN],
                WITH_RIMS,
                "another nonce",
                "2025-10-24",
                other_nonce,
                Refused(&[("nonce", "931d8d")]),
            )
        },
        case(
            &[GREEN],
            WITH_RIMS,
            "after the VBIOS RIM's signer",
            "2026-03-01",
            Refused(&[("vbios-rim-chain", "not at 2026-03-01")]),
        ),
        case(
            &[GREEN],
            &[GREEN_CHAIN],
            "without manifests",
            "2025-10-24",
            Accepted(PASS),
        ),
        case_with(
            &[GREEN],
            &[GREEN_CHAIN],
            "without manifests, strict",
            "2025-10-24",
            strict,
            Refused(&[
                ("chain-revocation", "no response"),
                ("chain-revocation", "no response"),
                ("chain-revocation", "no response"),
                ("driver-rim", "none"),
                ("vbios-rim", "none"),
            ]),
        ),
        case(
            &[GREEN],
            &[
                GREEN_CHAIN,
                GREEN_DRIVER,
                GREEN_VBIOS,
                OCSP[0],
                OCSP[1],
                OCSP[2],
            ],
            "OCSP within its window",
            "2025-08-21T12:00:00Z",
            Accepted(&["chain-revocation", "measurements"]),
        ),
        case(
            &[GREEN],
            &[GREEN_CHAIN, OCSP[0], OCSP[1], OCSP[2]],
            "OCSP after its window",
            "2025-08-23",
            Refused(&[
                ("chain-revocation", "not at"),
                ("chain-revocation", "not at"),
                ("chain-revocation", "not at"),
            ]),
        ),
        case(
            &[GREEN],
            &[
                GREEN_CHAIN,
                "gpu/rims/NV_GPU_DRIVER_GH100_550.144.03.xml",
                GREEN_VBIOS,
            ],
            "another driver's manifest",
            "2025-10-24",
            Refused(&[
                ("driver-rim-version", "550.144.03"),
                ("measurements", "27 of 32"),
            ]),
        ),
        case(
            &[OLD],
            &[OLD_CHAIN, "gpu/h100-535.86/vbios-rim.xml"],
            "",
            "2025-01-01",
            Refused(&[("fwid", "none in the report")]),
        ),
        case(
            &[OLD],
            &[OLD_CHAIN, "gpu/h100-535.86/bad-driver-rim-mismatch.xml"],
            "tampered driver manifest",
            "2026-01-01",
            Refused(&[
                ("fwid", "none in the report"),
                ("driver-rim-signature", "digest"),
                ("measurements", "6 of 21"),
            ]),
        ),
        case(
            &["gpu/bad/report-invalid-signature.bin"],
            &["gpu/bad/report-invalid-signature.chain.pem"],
            "",
            "2025-10-24",
            Refused(&[("report-signature", "not the leaf"), ("fwid", "")]),
        ),
        case(
            &[GREEN],
            &["gpu/bad/report-invalid-signature.chain.pem"],
            "another chain",
            "2025-10-24",
            Refused(&[("report-signature", "not the leaf"), ("fwid", "")]),
        ),
    ]
}

fn nodes() -> Vec<Case> {
    use Expect::{Accepted, Refused};
    const NODE: &[&str] = &[
        "0/report-signature",
        "0/chain",
        "0/fwid",
        "7/report-signature",
        "7/chain",
        "7/fwid",
        "mode",
        "one-nonce",
        "distinct-devices",
    ];
    const TOPOLOGY: &[&str] = &[
        "ppcie-counts",
        "ppcie-gpu0-switches",
        "ppcie-gpu7-switches",
        "ppcie-switch0-gpus",
        "ppcie-switch3-gpus",
    ];
    vec![
        case(
            &[SWITCH],
            &[SWITCH_RIM],
            "",
            "2026-11-21",
            Accepted(&[
                "report-signature",
                "chain",
                "switch-rim-version",
                "switch-rim-signature",
                "measurements",
            ]),
        ),
        case(
            &[SWITCH],
            &[SWITCH_RIM],
            "before the manifest's signer",
            "2026-05-01",
            Refused(&[("switch-rim-chain", "not at 2026-05-01")]),
        ),
        case(&[BLACKWELL], &[], "", "2026-11-21", Accepted(NODE)),
        case(
            &[GPUS_PPCIE],
            &[],
            "GPUs alone",
            "2026-11-21",
            Accepted(NODE),
        ),
        case(
            &[GPUS_PPCIE, SWITCHES_PPCIE],
            &[],
            "whole node",
            "2026-11-21",
            Accepted(TOPOLOGY),
        ),
        Case {
            files: &[SWITCHES_PPCIE],
            ..case(
                &[SWITCHES_PPCIE],
                &[],
                "switches alone",
                "2026-11-21",
                Accepted(&[
                    "0/report-signature",
                    "3/chain",
                    "one-nonce",
                    "distinct-devices",
                ]),
            )
        },
        case(
            &[BLACKWELL, BLACKWELL],
            &[],
            "every device twice",
            "2026-11-21",
            Refused(&[("distinct-devices", "8 serial")]),
        ),
        case(
            &[GPUS_PPCIE, SWITCH],
            &[],
            "a switch of another node",
            "2026-11-21",
            foreign_switch(),
        ),
    ]
}

/// A switch that is not of the node fails the nonce, the counts, and every GPU's and its own links.
fn foreign_switch() -> Expect {
    Expect::Refused(&[
        ("one-nonce", "2 nonces"),
        ("ppcie-counts", "8 and 1"),
        ("ppcie-gpu0-switches", ""),
        ("ppcie-gpu1-switches", ""),
        ("ppcie-gpu2-switches", ""),
        ("ppcie-gpu3-switches", ""),
        ("ppcie-gpu4-switches", ""),
        ("ppcie-gpu5-switches", ""),
        ("ppcie-gpu6-switches", ""),
        ("ppcie-gpu7-switches", ""),
        ("ppcie-switch0-gpus", ""),
    ])
}
