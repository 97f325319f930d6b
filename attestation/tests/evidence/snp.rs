//! SEV-SNP: reports and their certificates.

use sealpod_attestation::snp::{self, SnpPolicy};
use sealpod_attestation::{TrustAnchors, Verdict};

use crate::folder::{Case, Expect, Folder, at};

const NOW: &str = "2026-11-21";
const PASS: &[&str] = &[
    "report-signature",
    "vek-chain",
    "vek-tcb",
    "chip-id",
    "product",
    "tcb-committed",
    "policy-debug",
];

fn verify(
    folder: &Folder,
    report: &str,
    certificates: &[&str],
    now: &str,
) -> Result<Verdict, String> {
    let collateral = folder.collateral(certificates)?;
    Ok(snp::verify(
        &folder.read(report),
        &collateral,
        &SnpPolicy::default(),
        &TrustAnchors::production(),
        at(now),
    ))
}

fn case(
    files: &'static [&'static str],
    setting: &'static str,
    now: &'static str,
    expect: Expect,
) -> Case {
    Case {
        files,
        setting,
        expect,
        run: Box::new(move |f| verify(f, files[0], &files[1..], now)),
    }
}

/// All cases of this family.
pub(crate) fn cases() -> Vec<Case> {
    use Expect::{Accepted, Refused};
    const MILAN: [&str; 2] = ["snp/ca/milan-ask.pem", "snp/ca/milan-ark.pem"];
    vec![
        case(
            &[
                "snp/milan-v2b/report.bin",
                "snp/milan-v2b/vcek.der",
                MILAN[0],
                MILAN[1],
            ],
            "",
            NOW,
            Accepted(PASS),
        ),
        case(
            &[
                "snp/milan-v2-debug/report.bin",
                "snp/milan-v2-debug/vcek.der",
                MILAN[0],
                MILAN[1],
            ],
            "",
            NOW,
            Refused(&[("policy-debug", "on")]),
        ),
        case(
            &[
                "snp/milan-v3/report.bin",
                "snp/milan-v3/vcek.pem",
                MILAN[0],
                MILAN[1],
            ],
            "",
            NOW,
            Accepted(PASS),
        ),
        case(
            &[
                "snp/milan-v3/report.bin",
                "snp/milan-v3/vcek-other-issue.pem",
                MILAN[0],
                MILAN[1],
            ],
            "the other issue of the VCEK",
            NOW,
            Accepted(PASS),
        ),
        case(
            &[
                "snp/genoa-v3/report.bin",
                "snp/genoa-v3/vcek.pem",
                "snp/ca/genoa-ask.pem",
                "snp/ca/genoa-ark.pem",
            ],
            "",
            NOW,
            Accepted(PASS),
        ),
        case(
            &[
                "snp/turin-v5/report.bin",
                "snp/turin-v5/vcek.pem",
                "snp/ca/turin-ask.pem",
                "snp/ca/turin-ark.pem",
            ],
            "",
            NOW,
            Accepted(PASS),
        ),
        case(
            &[
                "snp/milan-v3/report.bin",
                "snp/milan-v3/vcek.pem",
                MILAN[0],
                MILAN[1],
            ],
            "before the VCEK was issued",
            "2026-01-01",
            Refused(&[("vek-chain", "not at 2026-01-01")]),
        ),
        case(
            &[
                "snp/milan-v3/report.bin",
                "snp/milan-v3/vcek.pem",
                MILAN[0],
                MILAN[1],
            ],
            "after the VCEK expired",
            "2034-01-01",
            Refused(&[("vek-chain", "not at 2034-01-01")]),
        ),
        case(
            &[
                "snp/milan-v3/report.bin",
                "snp/milan-v2b/vcek.der",
                MILAN[0],
                MILAN[1],
            ],
            "another chip's VCEK",
            NOW,
            Refused(&[("report-signature", "not by any of 1")]),
        ),
        case(
            &[
                "snp/milan-v3/report.bin",
                "snp/milan-v3/vcek.pem",
                "snp/ca/milan-asvk.pem",
                MILAN[1],
            ],
            "ASVK in place of the ASK",
            NOW,
            Refused(&[("vek-chain", "no certificate SEV-Milan")]),
        ),
        case(
            &[
                "snp/genoa-v3/report.bin",
                "snp/genoa-v3/vcek.pem",
                "snp/ca/genoa-asvk.pem",
                "snp/ca/genoa-ark.pem",
            ],
            "ASVK in place of the ASK",
            NOW,
            Refused(&[("vek-chain", "no certificate SEV-Genoa")]),
        ),
        case(
            &[
                "snp/turin-v5/report.bin",
                "snp/turin-v5/vcek.pem",
                "snp/ca/turin-asvk.pem",
                "snp/ca/turin-ark.pem",
            ],
            "ASVK in place of the ASK",
            NOW,
            Refused(&[("vek-chain", "no certificate SEV-Turin")]),
        ),
        case(
            &["snp/milan-v3/report.bin", "snp/milan-v3/vcek.pem"],
            "no CA given",
            NOW,
            Refused(&[("vek-chain", "no certificate ARK-Milan")]),
        ),
    ]
}

/// Every AMD intermediate is its pinned root's.
#[test]
fn every_intermediate_leads_to_the_pinned_root() {
    use sealpod_attestation::{encoding, x509};
    let Some(folder) = Folder::open() else { return };
    let anchors = TrustAnchors::production();
    for (product, line) in [
        (snp::Product::Milan, "milan"),
        (snp::Product::Genoa, "genoa"),
        (snp::Product::Turin, "turin"),
    ] {
        let der = |kind: &str| {
            let text =
                String::from_utf8(folder.read(&format!("snp/ca/{line}-{kind}.pem"))).unwrap();
            encoding::pem_blocks(&text).unwrap().remove(0).1
        };
        let root = der("ark");
        let root = x509::Certificate::parse(&root).unwrap();
        for kind in ["ask", "asvk"] {
            let middle = der(kind);
            let middle = x509::Certificate::parse(&middle).unwrap();
            x509::verify_chain(&[&middle, &root], &anchors.amd_pins(product), at(NOW)).unwrap();
        }
    }
}
