//! The service under load: what the clients of `tests/serve` find when they meet the program as it is
//! released, once alone and once 64 at a time, half of them bad.

use serde_json::{Map, Value, json};

use crate::drive::{self, Family, LIMITS, MOST_MEMORY, Outcome, Phase, Plan};
use crate::lab::Server;

const GOOD: u8 = 32;
const BAD: u8 = 32;

/// Figures, and the promise that was broken.
pub(crate) fn measure(rounds: usize) -> (Value, Result<(), String>) {
    let server = Server::with(LIMITS);
    println!("\nsealpod-attest serve: one pod at a time, nobody else");
    let alone = Plan {
        good: 1,
        bad: 0,
        rounds: rounds * 5,
        race: 0,
    };
    let alone = drive::run(&server, alone, &Family::ALL);
    let quiet = table(&alone.phases);
    println!("\nsealpod-attest serve: {GOOD} pods and {BAD} bad clients at once");
    let loaded = Plan {
        good: GOOD,
        bad: BAD,
        rounds: rounds * 2,
        race: 4,
    };
    let loaded = drive::run(&server, loaded, &Family::ALL);
    let families = table(&loaded.phases);
    print(&loaded);
    let kept = alone.check().and(loaded.check());
    let count = loaded.phases.iter().map(|p| p.latencies_ms.len());
    let seconds = loaded.phases.iter().map(|p| p.seconds).sum::<f64>();
    let [affirming, refused] = loaded.decisions;
    let figures = json!({
        "clients": GOOD + BAD, "good": GOOD, "bad": BAD, "seconds": round(seconds),
        "verifications": count.sum::<usize>(),
        "families": families, "alone": quiet,
        "memory_mib": { "idle": mib(alone.idle_kib), "peak": mib(loaded.peak_kib), "bound": mib(MOST_MEMORY) },
        "bad_clients": loaded.bad,
        "replays": { "tried": loaded.replays, "accepted": loaded.replays_accepted },
        "audit": {
            "expected": affirming + refused, "found": loaded.records.iter().sum::<usize>(),
            "verify": loaded.audit_error.as_deref().unwrap_or("intact"),
        },
        "kept": kept.is_ok(),
    });
    (figures, kept)
}

/// Prints each family's line; the same as JSON.
fn table(phases: &[Phase]) -> Map<String, Value> {
    println!(
        "{:<10}{:>10}{:>10}{:>10}{:>10}{:>14}",
        "family", "tokens", "1/s", "p50 ms", "p99 ms", "CPU ms each"
    );
    let one = |phase: &Phase| {
        let (name, times) = (phase.family.name(), &phase.latencies_ms);
        let at = |part: f64| times[((times.len() - 1) as f64 * part).round() as usize];
        let count = times.len() as f64;
        let (rate, cpu) = (count / phase.seconds, phase.cpu_ms / count);
        println!(
            "{name:<10}{:>10}{rate:>10.0}{:>10.1}{:>10.1}{cpu:>14.2}",
            times.len(),
            at(0.5),
            at(0.99)
        );
        let figures = json!({
            "verifications": times.len(), "seconds": round(phase.seconds), "per_second": round(rate),
            "p50_ms": round(at(0.5)), "p99_ms": round(at(0.99)), "server_cpu_ms_each": round(cpu),
        });
        (name.to_owned(), figures)
    };
    phases.iter().map(one).collect()
}

fn print(outcome: &Outcome) {
    println!("\n{:<12}{:>8}  what became of it", "bad client", "tries");
    for (kind, ends) in &outcome.bad {
        let tries = ends.values().sum::<usize>();
        let ends: Vec<_> = ends.iter().map(|(e, n)| format!("{e}: {n}")).collect();
        println!("{kind:<12}{tries:>8}  {}", ends.join(", "));
    }
    println!(
        "\nreplays: {} tried, {} accepted; audit records: {} of {}, {}; \
         memory: {} MiB idle, {} at its peak, {} allowed",
        outcome.replays,
        outcome.replays_accepted,
        outcome.records.iter().sum::<usize>(),
        outcome.decisions.iter().sum::<usize>(),
        outcome.audit_error.as_deref().unwrap_or("intact"),
        mib(outcome.idle_kib),
        mib(outcome.peak_kib),
        mib(MOST_MEMORY)
    );
}

fn mib(kib: u64) -> f64 {
    round(kib as f64 / 1024.0)
}

fn round(x: f64) -> f64 {
    (x * 100.0).round() / 100.0
}
