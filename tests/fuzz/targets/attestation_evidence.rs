//! What a guest and its devices sign: SNP reports and certificate tables, TDX quotes and event logs,
//! GPU and NVSwitch reports, and the bundle that carries all of them. Nothing may panic, and no input
//! is accepted under the manufacturers' roots.
//!
//! The first byte of the input chooses the reader.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sealpod_attestation::evidence::Bundle;
use sealpod_attestation::nvidia::{self, Device, NvidiaPolicy};
use sealpod_attestation::snp::{self, SnpPolicy};
use sealpod_attestation::tdx::{self, TdReport, TdxPolicy};
use sealpod_attestation::{Collateral, Timestamp, TrustAnchors};

/// 2026-11-21.
const NOW: Timestamp = Timestamp(1_795_219_200);

/// The verifiers of a part of the bundle, or of bytes that stand alone.
fn refused(report: &[u8], device: &Device, pile: &Collateral) {
    let anchors = TrustAnchors::production();
    let verdicts = [
        snp::verify(report, pile, &SnpPolicy::default(), &anchors, NOW),
        tdx::verify(report, pile, &TdxPolicy::default(), &anchors, NOW),
        nvidia::verify(
            std::slice::from_ref(device),
            pile,
            &NvidiaPolicy::default(),
            &anchors,
            NOW,
        ),
    ];
    assert!(verdicts.iter().all(|v| !v.accepted()), "accepted");
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, bytes)) = data.split_first() else {
        return;
    };
    let text = || std::str::from_utf8(bytes).unwrap_or_default();
    match choice % 7 {
        // A report or quote behind its length, with what follows it as its collateral.
        0 => {
            let Some((length, bytes)) = bytes.split_first_chunk() else {
                return;
            };
            let length = usize::from(u16::from_le_bytes(*length));
            let (report, rest) = bytes.split_at(length.min(bytes.len()));
            let mut pile = Collateral::default();
            let _ = pile.add(rest);
            refused(report, &Device::default(), &pile);
        }
        1 => drop(snp::cert_table(bytes)),
        2 => drop(tdx::parse_event_log(bytes).map(|events| tdx::replay(&events))),
        3 => drop(TdReport::parse(bytes)),
        4 => {
            let device = Device {
                report: bytes.to_vec(),
                ..Device::default()
            };
            refused(&[], &device, &Collateral::default());
        }
        5 => {
            for device in nvidia::parse_evidence_json(text()).unwrap_or_default() {
                refused(&[], &device, &Collateral::default());
            }
        }
        _ => {
            if let Ok(bundle) = Bundle::from_json(bytes) {
                let again = bundle.to_json().expect("what was read can be written");
                let again = Bundle::from_json(&again).expect("and read");
                assert_eq!(bundle.digest(), again.digest());
            }
        }
    }
});
