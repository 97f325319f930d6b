//! TDX: quotes, collateral, event logs.

use sealpod_attestation::tdx::{self, TcbStatus, TdReport, TdxPolicy};
use sealpod_attestation::verdict::{Checks, Tee};
use sealpod_attestation::{TrustAnchors, Verdict, encoding};

use crate::folder::{Case, Expect, Folder, at};

const PASS: &[&str] = &[
    "quote-signature",
    "attestation-key",
    "pck-chain",
    "qe-report-signature",
    "pck-revocation",
    "tcb-info",
    "qe-identity",
    "fmspc",
    "tcb-status",
    "td-debug",
    "xfam",
];

fn quote_bytes(folder: &Folder, file: &str) -> Vec<u8> {
    let bytes = folder.read(file);
    if file.ends_with(".hex") {
        encoding::unhex(std::str::from_utf8(&bytes).unwrap().trim()).unwrap()
    } else {
        bytes
    }
}

fn verify(
    folder: &Folder,
    files: &[&str],
    now: &str,
    policy: &TdxPolicy,
) -> Result<Verdict, String> {
    let collateral = folder.collateral(&files[1..])?;
    Ok(tdx::verify(
        &quote_bytes(folder, files[0]),
        &collateral,
        policy,
        &TrustAnchors::production(),
        at(now),
    ))
}

fn case(files: &'static [&'static str], now: &'static str, expect: Expect) -> Case {
    Case {
        files,
        setting: now,
        expect,
        run: Box::new(move |f| verify(f, files, now, &TdxPolicy::default())),
    }
}

fn case_with(
    files: &'static [&'static str],
    now: &'static str,
    setting: &'static str,
    adjust: fn(&mut TdxPolicy),
    expect: Expect,
) -> Case {
    let run = move |f: &Folder| {
        let mut policy = TdxPolicy::default();
        adjust(&mut policy);
        verify(f, files, now, &policy)
    };
    Case {
        files,
        setting,
        expect,
        run: Box::new(run),
    }
}

/// All cases of this family.
pub(crate) fn cases() -> Vec<Case> {
    use Expect::{Accepted, Refused};
    const EMR: &[&str] = &[
        "tdx/v4-emr-uptodate/quote.bin",
        "tdx/v4-emr-uptodate/collateral.json",
    ];
    const TD15: &[&str] = &[
        "tdx/v5-td15-uptodate/quote.bin",
        "tdx/v5-td15-nolevel/collateral.json",
    ];
    const DEBUG_2023: &[&str] = &[
        "tdx/v4-debug/quote.bin",
        "tdx/collateral/50806f000000-2023-06.json",
    ];
    const DEBUG_2026: &[&str] = &[
        "tdx/v4-debug/quote.bin",
        "tdx/collateral/50806f000000-2026-03.json",
    ];
    const LIVE: &str = "tdx/v4-live-ccel/quote.bin";
    const LIVE_COLLATERAL: &str = "tdx/collateral/b0c06f000000-2026-10.json";
    let allow_debug: fn(&mut TdxPolicy) = |p| p.limits.allow_debug = true;
    let allow_old: fn(&mut TdxPolicy) = |p| p.limits.tcb_statuses.push(TcbStatus::OutOfDate);
    vec![
        case(EMR, "2025-06-25", Accepted(PASS)),
        case(
            EMR,
            "2025-08-01",
            Refused(&[
                ("pck-revocation", "not at 2025-08-01"),
                ("tcb-info", "not current"),
                ("qe-identity", "not current"),
            ]),
        ),
        case(
            EMR,
            "2025-06-01",
            Refused(&[
                ("pck-revocation", "not at 2025-06-01"),
                ("tcb-info", "not current"),
                ("qe-identity", "not current"),
            ]),
        ),
        case(
            &[
                "tdx/v4-mrconfigid/quote.hex",
                "tdx/v4-mrconfigid/collateral.json",
            ],
            "2025-09-15",
            Accepted(PASS),
        ),
        case(TD15, "2026-03-01", Accepted(PASS)),
        case(
            &[
                "tdx/v5-td15-nolevel/quote.bin",
                "tdx/v5-td15-nolevel/collateral.json",
            ],
            "2026-03-01",
            Refused(&[("tcb-level", "No matching TCB level")]),
        ),
        case(DEBUG_2023, "2023-06-25", Refused(&[("td-debug", "on")])),
        case_with(
            DEBUG_2023,
            "2023-06-25",
            "2023-06-25, debug allowed",
            allow_debug,
            Accepted(PASS),
        ),
        case_with(
            DEBUG_2026,
            "2026-03-20",
            "2026-03-20, debug allowed",
            allow_debug,
            Refused(&[("tcb-status", "OutOfDate (")]),
        ),
        case(
            &[
                "tdx/v4-gcp-outofdate/quote.bin",
                "tdx/collateral/00806f050000-2025-02.json",
            ],
            "2025-02-20",
            Refused(&[(
                "tcb-status",
                "OutOfDate (INTEL-SA-00960, INTEL-SA-00982, INTEL-SA-00986)",
            )]),
        ),
        case(
            &[
                "tdx/v4-spr-nolevel/quote.bin",
                "tdx/collateral/50806f000000-2023-06.json",
            ],
            "2023-06-25",
            Refused(&[
                ("quote-padding", "not zero"),
                ("tcb-level", "No matching TCB level"),
                ("td-sept-ve-disable", "off"),
            ]),
        ),
        case(
            &[LIVE, LIVE_COLLATERAL, "tdx/v4-live-ccel/ccel-good.bin"],
            "2026-10-15",
            Refused(&[("tcb-status", "INTEL-SA-01313")]),
        ),
        case_with(
            &[LIVE, LIVE_COLLATERAL, "tdx/v4-live-ccel/ccel-good.bin"],
            "2026-10-15",
            "2026-10-15, OutOfDate allowed",
            allow_old,
            Accepted(&[
                "event-log-rtmr0",
                "event-log-rtmr1",
                "event-log-rtmr2",
                "event-log-rtmr3",
            ]),
        ),
        case_with(
            &[LIVE, LIVE_COLLATERAL, "tdx/v4-live-ccel/ccel-bad-rtmr2.bin"],
            "2026-10-15",
            "2026-10-15, OutOfDate allowed",
            allow_old,
            Refused(&[("event-log-rtmr2", "")]),
        ),
        Case {
            files: &["tdx/tdreport.bin"],
            setting: "parsed only",
            expect: Accepted(&["td-report"]),
            run: Box::new(td_report),
        },
        Case {
            files: &["tdx/intel-root-ca.der"],
            setting: "pinned",
            expect: Accepted(&["pinned"]),
            run: Box::new(intel_root),
        },
    ]
}

fn td_report(folder: &Folder) -> Result<Verdict, String> {
    let mut checks = Checks::new(Tee::Tdx);
    checks.result(
        "td-report",
        "a TDREPORT",
        TdReport::parse(&folder.read("tdx/tdreport.bin")),
    );
    Ok(checks.into_verdict(false, serde_json::Value::Null))
}

fn intel_root(folder: &Folder) -> Result<Verdict, String> {
    let der = folder.read("tdx/intel-root-ca.der");
    let root = sealpod_attestation::x509::Certificate::parse(&der).map_err(|e| e.to_string())?;
    let pin = sealpod_attestation::anchors::pin_of(&root);
    let mut checks = Checks::new(Tee::Tdx);
    checks.require(
        "pinned",
        TrustAnchors::production().intel.contains(&pin),
        "the compiled-in pin",
        encoding::hex(&pin),
    );
    Ok(checks.into_verdict(false, serde_json::Value::Null))
}

#[test]
fn a_kernel_that_real_firmware_booted_gives_the_predicted_rtmr1() {
    let Some(folder) = Folder::open() else { return };
    let log = folder.read("tdx/v4-live-ccel/ccel-good.bin");
    let quote = folder.read("tdx/v4-live-ccel/quote.bin");
    let quote = tdx::Quote::parse(&quote).unwrap();
    // The first event of RTMR1 (register 2 of the log) is the kernel's image.
    let events = tdx::parse_event_log(&log).unwrap();
    let kernel = events.iter().find(|e| e.register == 2).unwrap();
    assert_eq!(
        sealpod_attestation::measure::rtmr1_of(kernel.digest),
        quote.body.rtmr[1]
    );
}
