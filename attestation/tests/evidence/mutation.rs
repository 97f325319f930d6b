//! Every byte of every real report, quote, GPU report and manifest is changed, one at a time, and
//! the result must not be accepted. Zero padding behind a quote is no exception: a byte that is not
//! zero there is refused as well. What does not count as a change, because nothing is read from it:
//! white space replaced by other white space in base64 and between the attributes of an XML tag (a
//! flipped bit never makes one out of the other).
//!
//! Collateral, certificates and times are those under which the unchanged file is accepted. A file
//! that is refused even unchanged (an old TCB, a debug policy) is judged by the checks that passed:
//! a change must make one of them fail. The one exception, which is listed: a quote whose padding is
//! not zero is refused for its padding, whatever else is changed in that. Not here are the files whose
//! signature is wrong as they are; each is refused in its own test, and no change is to be seen in it.
//!
//! All of it takes some two and a half minutes of one processor; nothing of what a change can touch is remembered
//! (the crate remembers good signatures of endorsements and manifests by their whole content).

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use sealpod_attestation::nvidia::{self, Device, NvidiaPolicy, Rim};
use sealpod_attestation::snp::{self, SnpPolicy};
use sealpod_attestation::tdx::{self, Quote, TdxPolicy};
use sealpod_attestation::{Collateral, Outcome, TrustAnchors, Verdict, encoding};

use crate::folder::{Folder, at};

/// The failing checks of a verdict.
fn failures(verdict: &Verdict) -> BTreeSet<String> {
    verdict
        .checks
        .iter()
        .filter(|c| c.outcome == Outcome::Fail)
        .map(|c| c.name.clone())
        .collect()
}

/// Changes each byte in turn, on all cores, and asserts that `judge` names a failing check that the
/// unchanged file does not have.
fn mutate(name: &str, original: &[u8], judge: impl Fn(&[u8]) -> BTreeSet<String> + Sync) {
    mutate_all_but(name, original, original.len(), judge);
}

/// The same, where what stands from `padding` on makes no difference any more.
fn mutate_all_but(
    name: &str,
    original: &[u8],
    padding: usize,
    judge: impl Fn(&[u8]) -> BTreeSet<String> + Sync,
) {
    let before = judge(original);
    let next = AtomicUsize::new(0);
    let survivors = std::sync::Mutex::new(Vec::new());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                let mut bytes = original.to_vec();
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= padding {
                        return;
                    }
                    // One bit, a different one at each place.
                    let bit = 1 << (at % 8);
                    bytes[at] ^= bit;
                    if judge(&bytes).is_subset(&before) {
                        survivors.lock().unwrap().push(at);
                    }
                    bytes[at] ^= bit;
                }
            });
        }
    });
    let survivors = survivors.into_inner().unwrap();
    println!(
        "{name}: {padding} changes, {} not refused, {} bytes of padding left out",
        survivors.len(),
        original.len() - padding,
    );
    assert!(
        survivors.is_empty(),
        "{name}: changes at {survivors:?} were not refused"
    );
}

#[test]
fn every_changed_snp_report_is_refused() {
    let Some(folder) = Folder::open() else { return };
    let anchors = TrustAnchors::production();
    for (name, line, vek) in [
        ("milan-v2b", "milan", "vcek.der"),
        ("milan-v2-debug", "milan", "vcek.der"),
        ("milan-v3", "milan", "vcek.pem"),
        ("genoa-v3", "genoa", "vcek.pem"),
        ("turin-v5", "turin", "vcek.pem"),
    ] {
        let files = [
            format!("snp/{name}/{vek}"),
            format!("snp/ca/{line}-ask.pem"),
            format!("snp/ca/{line}-ark.pem"),
        ];
        let collateral = folder
            .collateral(&files.each_ref().map(String::as_str))
            .unwrap();
        let report = folder.read(&format!("snp/{name}/report.bin"));
        mutate(name, &report, |bytes| {
            failures(&snp::verify(
                bytes,
                &collateral,
                &SnpPolicy::default(),
                &anchors,
                at("2026-11-21"),
            ))
        });
    }
}

#[test]
fn every_changed_tdx_quote_is_refused() {
    let Some(folder) = Folder::open() else { return };
    let anchors = TrustAnchors::production();
    for (file, collateral, now) in [
        (
            "tdx/v4-emr-uptodate/quote.bin",
            "tdx/v4-emr-uptodate/collateral.json",
            "2025-06-25",
        ),
        (
            "tdx/v4-debug/quote.bin",
            "tdx/collateral/50806f000000-2023-06.json",
            "2023-06-25",
        ),
        (
            "tdx/v4-gcp-outofdate/quote.bin",
            "tdx/collateral/00806f050000-2025-02.json",
            "2025-02-20",
        ),
        (
            "tdx/v4-live-ccel/quote.bin",
            "tdx/collateral/b0c06f000000-2026-10.json",
            "2026-10-15",
        ),
        (
            "tdx/v5-td15-uptodate/quote.bin",
            "tdx/v5-td15-nolevel/collateral.json",
            "2026-03-01",
        ),
        (
            "tdx/v5-td15-nolevel/quote.bin",
            "tdx/v5-td15-nolevel/collateral.json",
            "2026-03-01",
        ),
        (
            "tdx/v4-mrconfigid/quote.hex",
            "tdx/v4-mrconfigid/collateral.json",
            "2025-09-15",
        ),
        (
            "tdx/v4-spr-nolevel/quote.bin",
            "tdx/collateral/50806f000000-2023-06.json",
            "2023-06-25",
        ),
    ] {
        let collateral = folder.collateral(&[collateral]).unwrap();
        let quote = folder.read(file);
        let quote = match file.strip_suffix(".hex") {
            Some(_) => encoding::unhex(String::from_utf8(quote).unwrap().trim()).unwrap(),
            None => quote,
        };
        let read = Quote::parse(&quote).unwrap();
        let dirty = read.trailing.iter().any(|b| *b != 0);
        let padding = quote.len() - if dirty { read.trailing.len() } else { 0 };
        mutate_all_but(file, &quote, padding, |bytes| {
            failures(&tdx::verify(
                bytes,
                &collateral,
                &TdxPolicy::default(),
                &anchors,
                at(now),
            ))
        });
    }
}

#[test]
fn every_changed_gpu_report_is_refused() {
    let Some(folder) = Folder::open() else { return };
    let anchors = TrustAnchors::production();
    let judge = |device: &Device, collateral: &Collateral, bytes: &[u8]| {
        let device = Device {
            report: bytes.to_vec(),
            ..device.clone()
        };
        failures(&nvidia::verify(
            &[device],
            collateral,
            &NvidiaPolicy::default(),
            &anchors,
            at("2025-10-24"),
        ))
    };
    let reports = [
        (
            "gpu/h100-550.90-GREEN/report.bin",
            "gpu/h100-550.90-GREEN/chain.pem",
        ),
        ("gpu/h100-535.86/report.bin", "gpu/h100-535.86/chain.pem"),
        (
            "gpu/bad/report-570.bin",
            "gpu/bad/report-invalid-signature.chain.pem",
        ),
    ];
    for (report, chain) in reports {
        // The chain belongs to the device, so that it is not searched for with every change.
        let device = Device {
            chain: folder.collateral(&[chain]).unwrap().certificates,
            ..Device::default()
        };
        let none = Collateral::default();
        mutate(report, &folder.read(report), |bytes| {
            judge(&device, &none, bytes)
        });
    }
    for file in [
        "gpu/blackwell-8gpu-mpt.json",
        "gpu/switch-ls10-GREEN/evidence.json",
        "gpu/h200class-8gpu-ppcie.json",
        "gpu/h200class-4switch-ppcie.json",
    ] {
        let text = String::from_utf8(folder.read(file)).unwrap();
        let devices = nvidia::parse_evidence_json(&text).unwrap();
        for (n, device) in devices.iter().enumerate() {
            mutate(&format!("{file} {n}"), &device.report, |bytes| {
                judge(device, &Collateral::default(), bytes)
            });
        }
    }
}

#[test]
fn every_changed_manifest_is_refused() {
    let Some(folder) = Folder::open() else { return };
    let anchors = TrustAnchors::production();
    let manifests = [
        ("gpu/h100-550.90-GREEN/driver-rim.xml", "2025-10-24"),
        ("gpu/h100-550.90-GREEN/vbios-rim.xml", "2025-10-24"),
        ("gpu/switch-ls10-GREEN/switch-rim.xml", "2026-11-21"),
        ("gpu/h100-535.86/vbios-rim.xml", "2025-01-01"),
        ("gpu/rims/NV_GPU_DRIVER_GH100_550.144.03.xml", "2025-10-24"),
        (
            "gpu/rims/NV_GPU_DRIVER_545.00_test_no_gpu.xml",
            "2025-01-01",
        ),
        ("gpu/rims/NV_GPU_VBIOS_96.00.74.00.1C.xml", "2025-01-01"),
    ];
    for (file, now) in manifests {
        mutate(file, &folder.read(file), |bytes| {
            let verify = || {
                let rim = Rim::parse(bytes).ok()?;
                rim.verify_signature().ok()?;
                rim.verify_chain(&anchors.nvidia_rim, at(now)).ok()
            };
            if verify().is_some() {
                BTreeSet::new()
            } else {
                BTreeSet::from(["manifest".to_owned()])
            }
        });
    }
}
