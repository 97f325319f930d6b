//! `make bench`: what the two gates add to a start with a device, beyond what the guest takes for its evidence and
//! QEMU for the device. Writes `gate` in `target/bench/attest.json`, to which the bench of verifications adds the
//! rest. Half as many rounds as `SEALPOD_BENCH_ROUNDS` says.

use anyhow::{Context, Result, ensure};
use sealpod_tests::{
    Env, Version, assets,
    attest::{CONTENT, DEVICE},
    measure::marks,
    stats::percentile,
};
use serde_json::{Value, json};

/// Most that the gates may add, milliseconds.
const GOAL: f64 = 150.0;

/// Milliseconds of one start: both gates in all, the guest's two answers, giving the device to QEMU.
fn start(env: &Env, round: usize) -> Result<[f64; 3]> {
    let device = format!("io.sealpod.attestation.devices={DEVICE}");
    let id = env.id(&format!("gate{round}"));
    env.ctr_start(&["--annotation", &device], &id, &["sleep", "600"]);
    let read = format!("head -c {} /dev/gpu0", CONTENT.len());
    let done = env.ctr_exec(&id, "read", &["sh", "-c", &read]);
    let marks = marks(env).context("no timeline");
    env.ctr_remove(&id);
    ensure!(done.stdout == CONTENT, "not released: {}", done.text());
    let marks = marks?;
    let ms = |name: &str| Some(marks.get(name)?.as_u64()? as f64 / 1e6);
    let all = [
        "gate_took_ns",
        "gate_evidence_took_ns",
        "gate_attach_took_ns",
    ];
    let [Some(all), Some(evidence), Some(attach)] = all.map(ms) else {
        anyhow::bail!("the gates are not in the timeline: {marks}");
    };
    Ok([all, evidence, attach])
}

fn main() -> Result<()> {
    let version = Version::parse(&std::env::args().nth(1).unwrap_or_else(|| "1.7".into()))?;
    let rounds = std::env::var("SEALPOD_BENCH_ROUNDS").ok();
    let rounds = rounds.and_then(|n| n.parse().ok()).unwrap_or(20_usize);
    let rounds = rounds.div_ceil(2);
    assets::complete()?;
    let env = Env::attesting(version)?;
    let mut starts = Vec::new();
    // Round 0 warms caches and is not counted.
    for round in 0..=rounds {
        eprint!("\rround {round} of {rounds}");
        let start = start(&env, round)?;
        if round > 0 {
            starts.push(start);
        }
    }
    eprintln!();
    let of = |part: fn(&[f64; 3]) -> f64| -> Value {
        let all: Vec<f64> = starts.iter().map(part).collect();
        let at = |p| (percentile(&all, p) * 10.0).round() / 10.0;
        json!({ "p50_ms": at(0.5), "p95_ms": at(0.95) })
    };
    let added = of(|s| s[0] - s[1] - s[2]);
    let met = added["p50_ms"].as_f64().is_some_and(|ms| ms <= GOAL);
    let gate = json!({
        "rounds": starts.len(), "whole": of(|s| s[0]), "evidence": of(|s| s[1]), "device": of(|s| s[2]),
        "added": added, "goal_ms": GOAL, "met": met,
    });
    println!("\n{:<24}{:>10}{:>10}", "gates, ms", "p50", "p95");
    for part in ["whole", "evidence", "device", "added"] {
        let (p50, p95) = (&gate[part]["p50_ms"], &gate[part]["p95_ms"]);
        println!("{part:<24}{:>10}{:>10}", p50.to_string(), p95.to_string());
    }
    let verdict = if met { "met" } else { "MISSED" };
    println!("goal: added {GOAL} ms: {verdict}");
    let file = assets::target().join("bench/attest.json");
    std::fs::create_dir_all(file.with_file_name(""))?;
    let text = serde_json::to_string_pretty(&json!({ "gate": gate }))?;
    std::fs::write(&file, text + "\n")?;
    println!("written to {}", file.display());
    Ok(())
}
