//! Simulated evidence: accepted by the ordinary verifiers under the CA's anchors, refused by the
//! production ones, and every named defect refused by its named check and no other verdict.

use std::sync::OnceLock;

use sealpod_attestation::nvidia::{self, Device, NvidiaLimits, NvidiaPolicy};
use sealpod_attestation::simulate::{Ca, Defect, GpuClaims, Minted, SnpClaims, TdxClaims, TdxForm};
use sealpod_attestation::snp::{self, Product, SnpLimits, SnpPolicy, Tcb};
use sealpod_attestation::tdx::{self, TdxLimits, TdxPolicy};
use sealpod_attestation::verdict::Tee;
use sealpod_attestation::{Collateral, Outcome, Timestamp, TrustAnchors, Verdict};

const NOW: Timestamp = Timestamp(1_800_000_000);

/// One CA for all tests: its RSA keys take a second.
fn ca() -> &'static Ca {
    static CA: OnceLock<Ca> = OnceLock::new();
    CA.get_or_init(|| Ca::in_memory(NOW).expect("CA"))
}

fn anchors() -> TrustAnchors {
    TrustAnchors::from_file_text(&ca().anchors_file()).expect("anchors")
}

fn pile(minted: &Minted) -> Collateral {
    let mut pile = Collateral::default();
    if !minted.endorsements.is_empty() {
        pile.add(&minted.endorsements).expect("endorsements");
    }
    for (name, bytes) in &minted.collateral {
        pile.add(bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    pile
}

fn failures(verdict: &Verdict) -> Vec<&str> {
    verdict.failures().map(|c| c.name.as_str()).collect()
}

fn assert_refused_by(verdict: &Verdict, defect: Defect, tee: Tee) {
    let check = defect.check(tee).expect("of this kind");
    let failures = failures(verdict);
    assert!(
        !verdict.accepted() && failures.iter().any(|f| f.ends_with(check)),
        "{}: expected {check}, failed {failures:?}",
        defect.name()
    );
}

fn of(tee: Tee) -> impl Iterator<Item = Defect> {
    let all = Defect::ALL.iter().copied();
    all.filter(move |d| d.check(tee).is_some())
}

fn snp_claims(product: Product, version: u32, vlek: bool) -> SnpClaims {
    SnpClaims {
        product,
        version,
        vlek,
        report_data: [1; 64],
        measurement: [2; 48],
        host_data: [3; 32],
        ..SnpClaims::default()
    }
}

fn verify_snp(minted: &Minted, anchors: &TrustAnchors, now: Timestamp) -> Verdict {
    let policy = SnpPolicy {
        report_data: Some([1; 64]),
        host_data: Some([3; 32]),
        measurements: vec![[2; 48]],
        limits: SnpLimits {
            minimum_tcb: Some(Tcb {
                snp: 20,
                ..Tcb::default()
            }),
            require_alias_check: true,
            require_revocation: true,
            ..SnpLimits::default()
        },
        ..SnpPolicy::default()
    };
    snp::verify(&minted.report, &pile(minted), &policy, anchors, now)
}

#[test]
fn snp_reports_of_every_version_product_and_key_are_accepted_under_the_ca_only() {
    for product in [Product::Milan, Product::Genoa, Product::Turin] {
        for version in 2..=5 {
            for vlek in [false, true] {
                let claims = snp_claims(product, version, vlek);
                let minted = ca().mint_snp(&claims, None).unwrap();
                let verdict = verify_snp(&minted, &anchors(), NOW);
                assert!(
                    verdict.complete() && verdict.simulated,
                    "{product} {version} {vlek} {:?}",
                    verdict.checks.iter().find(|c| c.outcome != Outcome::Pass)
                );
                let real = verify_snp(&minted, &TrustAnchors::production(), NOW);
                assert!(!real.accepted(), "{product} {version} {vlek}");
                assert_eq!(failures(&real), ["vek-chain"]);
            }
        }
    }
}

#[test]
fn every_snp_defect_is_refused_by_its_check() {
    for defect in of(Tee::Snp) {
        let claims = snp_claims(Product::Milan, 3, false);
        let minted = ca().mint_snp(&claims, Some(defect)).unwrap();
        assert_refused_by(&verify_snp(&minted, &anchors(), NOW), defect, Tee::Snp);
    }
}

fn tdx_claims(form: TdxForm) -> TdxClaims {
    TdxClaims {
        form,
        report_data: [1; 64],
        mr_td: [2; 48],
        mr_config_id: [3; 48],
        ..TdxClaims::default()
    }
}

fn verify_tdx(minted: &Minted, anchors: &TrustAnchors) -> Verdict {
    let policy = TdxPolicy {
        report_data: Some([1; 64]),
        mr_config_id: Some([3; 48]),
        mr_td: vec![[2; 48]],
        rtmr: tdx_claims(TdxForm::V4).registers().map(|r| vec![r]),
        limits: TdxLimits {
            minimum_evaluation_number: 10,
            ..TdxLimits::default()
        },
        ..TdxPolicy::default()
    };
    tdx::verify(&minted.report, &pile(minted), &policy, anchors, NOW)
}

#[test]
fn tdx_quotes_of_every_form_are_accepted_under_the_ca_only() {
    for form in [
        TdxForm::V4,
        TdxForm::V5Td10,
        TdxForm::V5Td15,
        TdxForm::V5Td15Ex,
    ] {
        let minted = ca().mint_tdx(&tdx_claims(form), None).unwrap();
        let verdict = verify_tdx(&minted, &anchors());
        assert!(
            verdict.complete() && verdict.simulated,
            "{form:?} {:?}",
            verdict.checks.iter().find(|c| c.outcome != Outcome::Pass)
        );
        let real = verify_tdx(&minted, &TrustAnchors::production());
        assert!(!real.accepted() && failures(&real).contains(&"pck-chain"));
    }
}

#[test]
fn every_tdx_defect_is_refused_by_its_check() {
    for defect in of(Tee::Tdx) {
        let minted = ca()
            .mint_tdx(&tdx_claims(TdxForm::V5Td15), Some(defect))
            .unwrap();
        assert_refused_by(&verify_tdx(&minted, &anchors()), defect, Tee::Tdx);
    }
}

fn gpu_claims(chip: &str) -> GpuClaims {
    GpuClaims {
        nonce: [1; 32],
        chip: chip.into(),
        ..GpuClaims::default()
    }
}

fn verify_gpu(minted: &Minted, anchors: &TrustAnchors) -> Verdict {
    let mut pile = pile(minted);
    let device = Device {
        chain: std::mem::take(&mut pile.certificates),
        report: minted.report.clone(),
        ..Device::default()
    };
    let policy = NvidiaPolicy {
        nonce: Some([1; 32]),
        limits: NvidiaLimits {
            require_revocation: true,
            require_rims: true,
            ..NvidiaLimits::default()
        },
    };
    nvidia::verify(&[device], &pile, &policy, anchors, NOW)
}

#[test]
fn gpus_and_switches_are_accepted_under_the_ca_only() {
    for chip in ["GH100", "GB100", "GB202", "LS10"] {
        let minted = ca().mint_gpu(&gpu_claims(chip), None).unwrap();
        let verdict = verify_gpu(&minted, &anchors());
        let open: Vec<_> = verdict
            .checks
            .iter()
            .filter(|c| c.outcome != Outcome::Pass && c.name != "fwid")
            .collect();
        assert!(
            verdict.accepted() && verdict.simulated && open.is_empty(),
            "{chip} {open:?}"
        );
        assert_eq!(
            verdict.check("fwid").unwrap().outcome == Outcome::Pass,
            chip != "LS10"
        );
        let real = verify_gpu(&minted, &TrustAnchors::production());
        let chain = |f: &&str| f.ends_with("chain");
        assert!(failures(&real).iter().all(chain) && failures(&real).contains(&"chain"));
    }
}

#[test]
fn every_gpu_defect_is_refused_by_its_check() {
    for defect in of(Tee::Nvidia) {
        // Only Blackwell names its chip in the report.
        let chip = if defect == Defect::OtherChip {
            "GB100"
        } else {
            "GH100"
        };
        let minted = ca().mint_gpu(&gpu_claims(chip), Some(defect)).unwrap();
        assert_refused_by(&verify_gpu(&minted, &anchors()), defect, Tee::Nvidia);
    }
}

#[test]
fn a_node_with_protected_pcie_is_accepted_and_a_stranger_among_its_switches_refused() {
    let gpu_id = |n: u8| [0x53, 0x49, 0x4d, 0, 0, 0, 0, n];
    let switch_id = |n: u8| [0x4c, 0x53, 0, 0, 0, 0, 0, n];
    let serial = |id: [u8; 8]| sealpod_attestation::encoding::hex(&id);
    let mut devices = Vec::new();
    let mut pile = Collateral::default();
    let mut add = |claims: &GpuClaims| {
        let minted = ca().mint_gpu(claims, None).unwrap();
        let mut one = self::pile(&minted);
        devices.push(Device {
            report: minted.report.clone(),
            chain: std::mem::take(&mut one.certificates),
            ..Device::default()
        });
        pile.ocsp.extend(one.ocsp);
        pile.rims = [std::mem::take(&mut pile.rims), one.rims].concat();
    };
    for n in 0..8 {
        let reversed = |n: u8| {
            let mut id = switch_id(n);
            id.reverse();
            id
        };
        add(&GpuClaims {
            serial: serial(gpu_id(n)),
            mode: nvidia::Mode::Ppcie,
            switch_pdis: (0..4).map(reversed).collect(),
            ..gpu_claims("GH100")
        });
    }
    for n in 0..4 {
        add(&GpuClaims {
            serial: serial(switch_id(n)),
            switch_pdis: vec![switch_id(n)],
            gpu_pdis: (0..8).map(gpu_id).collect(),
            ..gpu_claims("LS10")
        });
    }
    let policy = NvidiaPolicy {
        nonce: Some([1; 32]),
        ..NvidiaPolicy::default()
    };
    let verify = |devices: &[Device]| nvidia::verify(devices, &pile, &policy, &anchors(), NOW);
    let verdict = verify(&devices);
    assert!(verdict.accepted(), "{:?}", failures(&verdict));
    assert!(verdict.check("ppcie-gpu7-switches").is_some());
    let stranger = GpuClaims {
        serial: serial(switch_id(9)),
        switch_pdis: vec![switch_id(9)],
        gpu_pdis: (0..8).map(gpu_id).collect(),
        ..gpu_claims("LS10")
    };
    let minted = ca().mint_gpu(&stranger, None).unwrap();
    devices[11] = Device {
        report: minted.report.clone(),
        chain: self::pile(&minted).certificates,
        ..Device::default()
    };
    let verdict = verify(&devices);
    assert!(failures(&verdict).iter().any(|f| f.starts_with("ppcie-")));
}

/// Formats that no public evidence has: every byte counts there too.
#[test]
fn every_changed_byte_of_simulated_evidence_is_refused() {
    let flip = |bytes: &[u8], at: usize| {
        let mut bytes = bytes.to_vec();
        bytes[at] ^= 1 << (at % 8);
        bytes
    };
    let anchors = anchors();
    for (product, version, vlek) in [(Product::Genoa, 4, true), (Product::Turin, 5, false)] {
        let minted = ca()
            .mint_snp(&snp_claims(product, version, vlek), None)
            .unwrap();
        let pile = pile(&minted);
        for at in 0..minted.report.len() {
            let report = flip(&minted.report, at);
            let verdict = snp::verify(&report, &pile, &SnpPolicy::default(), &anchors, NOW);
            assert!(!verdict.accepted(), "{product} v{version}: byte {at}");
        }
    }
    let minted = ca().mint_tdx(&tdx_claims(TdxForm::V5Td15Ex), None).unwrap();
    let pile = pile(&minted);
    for at in 0..minted.report.len() {
        let quote = flip(&minted.report, at);
        let verdict = tdx::verify(&quote, &pile, &TdxPolicy::default(), &anchors, NOW);
        assert!(!verdict.accepted(), "TD 1.5ex: byte {at}");
    }
    let minted = ca().mint_gpu(&gpu_claims("GB100"), None).unwrap();
    let mut pile = self::pile(&minted);
    let mut device = Device {
        chain: std::mem::take(&mut pile.certificates),
        ..Device::default()
    };
    for at in 0..minted.report.len() {
        device.report = flip(&minted.report, at);
        let policy = NvidiaPolicy::default();
        let one = std::slice::from_ref(&device);
        let verdict = nvidia::verify(one, &pile, &policy, &anchors, NOW);
        assert!(!verdict.accepted(), "GB100: byte {at}");
    }
}
