//! 64 clients at once, good ones and bad ones: every good one is served, no nonce is answered twice, no
//! decision is missing in the audit log, and the memory stays within its bounds.

use sealpod_attestation::appraise::Verifier;

use crate::bad::Kind;
use crate::drive::{self, Family, LIMITS, Plan};
use crate::lab::Server;

#[test]
fn many_clients_at_once_with_bad_ones_among_them_lose_nothing() {
    let server = Server::with(LIMITS);
    let plan = Plan {
        good: 32,
        bad: 32,
        rounds: 4,
        race: 1,
    };
    let outcome = drive::run(&server, plan, &Family::ALL);
    outcome.check().unwrap();
    for phase in &outcome.phases {
        let (family, tokens) = (phase.family.name(), phase.latencies_ms.len());
        assert_eq!(tokens, 32 * 4, "{family}");
    }
    assert!(outcome.replays >= 3 * 32 * 4 * 2);
    for kind in Kind::ALL {
        let ends = &outcome.bad[kind.name()];
        assert!(ends.keys().all(|end| !end.starts_with("200")), "{ends:?}");
    }
    for phase in &outcome.phases {
        let (family, rate) = (phase.family.name(), 128.0 / phase.seconds);
        println!(
            "{family}: {rate:.0} a second, {:.0} ms of CPU",
            phase.cpu_ms
        );
    }
    println!(
        "{:?} records, {} replays refused; {} KiB idle, {} KiB at its peak; bad clients: {:?}",
        outcome.records, outcome.replays, outcome.idle_kib, outcome.peak_kib, outcome.bad
    );
    // It still serves.
    let remote = server.remote();
    remote.challenge("pod", 0).unwrap();
}
