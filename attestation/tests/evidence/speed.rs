//! How long one verification takes: the first, and later ones, where the signatures of endorsements
//! and the manifests were seen before. Only prints: machines differ.
//! Goals: SNP 2 ms, TDX 2 ms, one GPU with both manifests 5 ms.

use std::time::Instant;

use sealpod_attestation::TrustAnchors;
use sealpod_attestation::nvidia::{self, Device, NvidiaPolicy};
use sealpod_attestation::snp::{self, SnpPolicy};
use sealpod_attestation::tdx::{self, TdxPolicy};

use crate::folder::{Folder, at};

fn measure(name: &str, mut verify: impl FnMut() -> bool) {
    const ROUNDS: usize = 50;
    let mut times: Vec<u128> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            assert!(verify(), "{name}");
            start.elapsed().as_micros()
        })
        .collect();
    let first = times[0];
    times.sort_unstable();
    println!(
        "{name}: first {first} µs, median {} µs, fastest {} µs",
        times[ROUNDS / 2],
        times[0]
    );
}

#[test]
fn verification_times_are_printed() {
    let Some(folder) = Folder::open() else { return };
    let anchors = TrustAnchors::production();
    let pile = folder
        .collateral(&[
            "snp/genoa-v3/vcek.pem",
            "snp/ca/genoa-ask.pem",
            "snp/ca/genoa-ark.pem",
        ])
        .unwrap();
    let report = folder.read("snp/genoa-v3/report.bin");
    measure("snp", || {
        snp::verify(
            &report,
            &pile,
            &SnpPolicy::default(),
            &anchors,
            at("2026-11-21"),
        )
        .accepted()
    });

    let pile = folder
        .collateral(&["tdx/v5-td15-nolevel/collateral.json"])
        .unwrap();
    let quote = folder.read("tdx/v5-td15-uptodate/quote.bin");
    measure("tdx", || {
        tdx::verify(
            &quote,
            &pile,
            &TdxPolicy::default(),
            &anchors,
            at("2026-03-01"),
        )
        .accepted()
    });

    let green = |file: &str| format!("gpu/h100-550.90-GREEN/{file}");
    let files = ["chain.pem", "driver-rim.xml", "vbios-rim.xml"].map(green);
    let pile = folder
        .collateral(&files.each_ref().map(String::as_str))
        .unwrap();
    let device = Device {
        report: folder.read(&green("report.bin")),
        ..Device::default()
    };
    measure("gpu with both manifests", || {
        nvidia::verify(
            std::slice::from_ref(&device),
            &pile,
            &NvidiaPolicy::default(),
            &anchors,
            at("2025-10-24"),
        )
        .accepted()
    });
}
