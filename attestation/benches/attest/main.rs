//! What one verification costs in CPU time, by family, and whether the goals are met; then the service
//! under load. Writes `target/bench/attest.json`, and fails when the service broke a promise. Evidence
//! is the simulator's; where the folder of real evidence is there, it is measured as well, and the goals
//! are judged by it. `SEALPOD_BENCH_ROUNDS` sets the rounds.

#![expect(
    clippy::unwrap_used,
    reason = "a measurement that cannot be made ends here"
)]

#[path = "../../tests/serve/bad.rs"]
mod bad;
#[path = "../../tests/serve/client.rs"]
#[expect(dead_code, reason = "the tests use the rest")]
mod client;
#[path = "../../tests/serve/drive.rs"]
mod drive;
#[path = "../../tests/serve/lab.rs"]
#[expect(dead_code, reason = "the tests use the rest")]
mod lab;
mod serve;

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::time::{ClockId, clock_gettime};
use sealpod_attestation::appraise::{Embedded, Inputs, Request, Verifier};
use sealpod_attestation::audit::AuditLog;
use sealpod_attestation::binding::{self, EphemeralKey, Nonce};
use sealpod_attestation::evidence::{Bundle, GpuEvidence, Tee, gpu_digest};
use sealpod_attestation::nvidia::{self, Device, NvidiaPolicy};
use sealpod_attestation::policy::Policy;
use sealpod_attestation::reference::ReferenceValues;
use sealpod_attestation::signer::Signer;
use sealpod_attestation::simulate::{Ca, GpuClaims, Minted, SnpClaims, TdxClaims};
use sealpod_attestation::snp::{self, SnpPolicy};
use sealpod_attestation::tdx::{self, TdxPolicy};
use sealpod_attestation::{Collateral, Timestamp, TrustAnchors, encoding, init_data};
use serde_json::{Map, Value, json};

const NOW: i64 = 1_795_219_200;
/// CPU milliseconds, by family.
const GOALS: [(&str, f64); 3] = [("snp", 2.0), ("tdx", 2.0), ("gpu", 5.0)];

/// CPU time of this process, milliseconds.
fn cpu() -> f64 {
    let t = clock_gettime(ClockId::ProcessCPUTime);
    t.tv_sec as f64 * 1e3 + t.tv_nsec as f64 / 1e6
}

/// As the user set them.
fn set_rounds() -> usize {
    let set = std::env::var("SEALPOD_BENCH_ROUNDS").ok();
    set.and_then(|r| r.parse().ok()).unwrap_or(20)
}

fn rounds() -> usize {
    set_rounds() * 25
}

/// Runs something so many times, once more to warm up.
fn measure(name: &str, evidence: &str, mut work: impl FnMut() -> bool) -> (String, Value) {
    assert!(work(), "{name} ({evidence}) is not accepted");
    let mut times: Vec<f64> = (0..rounds())
        .map(|_| {
            let start = cpu();
            assert!(black_box(work()));
            cpu() - start
        })
        .collect();
    times.sort_by(f64::total_cmp);
    let at = |part: f64| times[((times.len() - 1) as f64 * part).round() as usize];
    let round = |x: f64| (x * 1000.0).round() / 1000.0;
    let mean = times.iter().sum::<f64>() / times.len() as f64;
    println!(
        "{name:<22}{evidence:<12}{:>10.3}{:>10.3}{:>12.0}",
        at(0.5),
        at(0.99),
        1e3 / mean
    );
    let figures = json!({
        "p50_cpu_ms": round(at(0.5)), "p99_cpu_ms": round(at(0.99)),
        "per_second_and_core": (1e3 / mean).round(), "rounds": times.len(),
    });
    (format!("{name}-{evidence}"), figures)
}

fn pile(files: &[(String, Vec<u8>)], more: &[Vec<u8>]) -> Collateral {
    let mut pile = Collateral::default();
    for bytes in files.iter().map(|f| &f.1).chain(more) {
        pile.add(bytes).unwrap();
    }
    pile
}

fn device(report: Vec<u8>, pem: &[u8]) -> Device {
    let text = std::str::from_utf8(pem).unwrap();
    let chain = encoding::pem_blocks(text).unwrap();
    Device {
        name: "gpu".into(),
        report,
        chain: chain.into_iter().map(|b| b.1).collect(),
    }
}

fn simulated(ca: &Ca) -> Vec<(String, Value)> {
    let anchors = TrustAnchors::from_file_text(&ca.anchors_file()).unwrap();
    let now = Timestamp(NOW);
    let snp = ca.mint_snp(&SnpClaims::default(), None).unwrap();
    let tdx = ca.mint_tdx(&TdxClaims::default(), None).unwrap();
    let gpu = ca.mint_gpu(&GpuClaims::default(), None).unwrap();
    let snp_pile = pile(&snp.collateral, std::slice::from_ref(&snp.endorsements));
    let (tdx_pile, gpu_pile) = (pile(&tdx.collateral, &[]), pile(&gpu.collateral, &[]));
    let devices = [device(gpu.report.clone(), &gpu.endorsements)];
    vec![
        measure("snp", "simulated", || {
            let policy = SnpPolicy::default();
            snp::verify(&snp.report, &snp_pile, &policy, &anchors, now).accepted()
        }),
        measure("tdx", "simulated", || {
            let policy = TdxPolicy::default();
            tdx::verify(&tdx.report, &tdx_pile, &policy, &anchors, now).accepted()
        }),
        measure("gpu", "simulated", || {
            let policy = NvidiaPolicy::default();
            nvidia::verify(&devices, &gpu_pile, &policy, &anchors, now).accepted()
        }),
        appraisal(ca, &anchors, &tdx, &gpu),
    ]
}

/// Challenge, both verifiers, policy, token and the audit record on the disk.
fn appraisal(ca: &Ca, anchors: &TrustAnchors, tdx: &Minted, gpu: &Minted) -> (String, Value) {
    let dir = tempfile::tempdir().unwrap();
    let signer = Arc::new(Signer::generate().unwrap());
    let log = AuditLog::open(&dir.path().join("audit.log"), Arc::clone(&signer)).unwrap();
    let digits = "02".repeat(48);
    let references = format!(
        r#"{{"snp":{{"measurement":["{digits}"],"limits":{{"minimum_tcb":{{"snp":20}}}}}}}}"#
    );
    let files: Vec<_> = tdx
        .collateral
        .iter()
        .chain(&gpu.collateral)
        .cloned()
        .collect();
    let inputs = Inputs {
        anchors: anchors.clone(),
        allow_simulated: true,
        collateral: pile(&files, &[]),
        references: ReferenceValues::parse(&references).unwrap(),
        policy: Policy::built_in().unwrap(),
    };
    let verifier = Embedded::new(inputs, signer, Some(log), "bench");
    let key = EphemeralKey::from_random(&[1; 48]).unwrap().public();
    let bundle = |nonce: &Nonce| {
        let key_digest = binding::key_digest(&key);
        let claims = GpuClaims {
            nonce: binding::gpu_nonce(nonce, &key_digest),
            ..GpuClaims::default()
        };
        let gpu = ca.mint_gpu(&claims, None).unwrap();
        let gpus = vec![GpuEvidence {
            device_id: "0000:01:00.0".into(),
            report: gpu.report,
            certificates: gpu.endorsements,
        }];
        let data = binding::report_data(
            nonce,
            &key_digest,
            &gpu_digest(&gpus),
            &init_data::digest(b""),
            "pod",
        );
        let claims = SnpClaims {
            report_data: data,
            measurement: [2; 48],
            ..SnpClaims::default()
        };
        let snp = ca.mint_snp(&claims, None).unwrap();
        Bundle {
            tee: Tee::Snp,
            report: snp.report,
            endorsements: snp.endorsements,
            event_log: Vec::new(),
            gpus,
            key,
            init_data: Vec::new(),
        }
    };
    // Minting is not what is measured: all bundles are there before.
    let now = NOW as u64;
    let mut ready: Vec<(Nonce, Bundle)> = (0..=rounds())
        .map(|_| {
            let nonce = verifier.challenge("pod", now).unwrap().nonce;
            (nonce, bundle(&nonce))
        })
        .collect();
    measure("appraise-snp-gpu", "simulated", || {
        let (nonce, bundle) = ready.pop().unwrap();
        let request = Request {
            nonce,
            pod_uid: "pod",
            audience: "gate",
            bundle: &bundle,
        };
        verifier.appraise(&request, now).is_ok()
    })
}

fn real(folder: &Path) -> Vec<(String, Value)> {
    let anchors = TrustAnchors::production();
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
    let files = |names: &[&str]| pile(&[], &names.iter().map(|n| read(n)).collect::<Vec<_>>());
    let at = |text: &str| text.parse::<Timestamp>().unwrap();
    let report = read("snp/genoa-v3/report.bin");
    let snp_pile = files(&[
        "snp/genoa-v3/vcek.pem",
        "snp/ca/genoa-ask.pem",
        "snp/ca/genoa-ark.pem",
    ]);
    let quote = read("tdx/v5-td15-uptodate/quote.bin");
    let tdx_pile = files(&["tdx/v5-td15-nolevel/collateral.json"]);
    let gpu = |name: &str| format!("gpu/h100-550.90-GREEN/{name}");
    let rims = [gpu("driver-rim.xml"), gpu("vbios-rim.xml")];
    let gpu_pile = files(&rims.each_ref().map(String::as_str));
    let devices = [device(read(&gpu("report.bin")), &read(&gpu("chain.pem")))];
    vec![
        measure("snp", "real", || {
            let policy = SnpPolicy::default();
            snp::verify(&report, &snp_pile, &policy, &anchors, at("2026-11-21")).accepted()
        }),
        measure("tdx", "real", || {
            let policy = TdxPolicy::default();
            tdx::verify(&quote, &tdx_pile, &policy, &anchors, at("2026-03-01")).accepted()
        }),
        measure("gpu", "real", || {
            let policy = NvidiaPolicy::default();
            nvidia::verify(&devices, &gpu_pile, &policy, &anchors, at("2025-10-24")).accepted()
        }),
    ]
}

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let ca = Ca::in_memory(Timestamp(NOW)).unwrap();
    println!(
        "{:<22}{:<12}{:>10}{:>10}{:>12}",
        "CPU ms", "evidence", "p50", "p99", "1/s a core"
    );
    let mut figures = simulated(&ca);
    let folder = std::env::var_os("SEALPOD_EVIDENCE_DIR")
        .map_or_else(|| root.join("../../shared/evidence"), PathBuf::from);
    if folder.is_dir() {
        figures.extend(real(&folder));
    } else {
        eprintln!("no real evidence at {}", folder.display());
    }
    let goals: Vec<Value> = GOALS
        .iter()
        .map(|(family, goal)| {
            let of = |evidence: &str| {
                let name = format!("{family}-{evidence}");
                figures.iter().find(|(n, _)| *n == name)
            };
            let found = of("real").or(of("simulated"));
            let p50 = found
                .and_then(|f| f.1["p50_cpu_ms"].as_f64())
                .unwrap_or(f64::NAN);
            let met = p50 <= *goal;
            println!(
                "goal: {family} {goal} ms, p50 {p50} ms: {}",
                if met { "met" } else { "MISSED" }
            );
            json!({ "family": family, "goal_cpu_ms": goal, "p50_cpu_ms": p50, "met": met })
        })
        .collect();
    let (serve, kept) = serve::measure(set_rounds());
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(root.join("../target"), PathBuf::from);
    let file = target.join("bench/attest.json");
    std::fs::create_dir_all(file.with_file_name("")).unwrap();
    let mut result = json!({
        "serve": serve,
        "figures": figures.into_iter().collect::<Map<_, _>>(), "goals": goals,
        "build": if cfg!(debug_assertions) { "debug" } else { "release" },
    });
    // What the gates of pods add was measured before, in VMs.
    let before = std::fs::read(&file).ok();
    let before = before.and_then(|text| serde_json::from_slice::<Value>(&text).ok());
    if let Some(gate) = before.and_then(|mut b| b.get_mut("gate").map(Value::take)) {
        result["gate"] = gate;
    }
    std::fs::write(&file, serde_json::to_string_pretty(&result).unwrap() + "\n").unwrap();
    println!("written to {}", file.display());
    if let Err(broken) = kept {
        eprintln!("the service broke a promise: {broken}");
        std::process::exit(1);
    }
}
