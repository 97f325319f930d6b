//! Simulated evidence: accepted by the ordinary verifiers under the CA's anchors, refused by the
//! production ones, and every named defect refused by its named check and no other verdict.

use std::sync::OnceLock;

use sealpod_attestation::simulate::{Ca, Defect, Minted, SnpClaims};
use sealpod_attestation::snp::{self, Product, SnpLimits, SnpPolicy, Tcb};
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
