//! 64 clients at once, good ones and bad ones: every good one is served, no nonce is answered twice, no
//! decision is missing in the audit log, and the memory stays within its bounds.

use sealpod_attestation::appraise::Verifier;

use crate::bad::Kind;
use crate::drive::{self, Ends, Family, LIMITS, MOST_MEMORY, Outcome, Plan};
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

#[test]
fn an_outcome_that_breaks_a_promise_is_named() {
    let good = || Outcome {
        phases: Vec::new(),
        bad: Ends::new(),
        replays: 2,
        replays_accepted: 0,
        decisions: [1, 2],
        records: [1, 2],
        audit_error: None,
        idle_kib: 1,
        peak_kib: MOST_MEMORY,
    };
    good().check().unwrap();
    type Break = fn(&mut Outcome);
    let broken: [(Break, &str); 4] = [
        (|o| o.replays_accepted = 1, "replays accepted"),
        (|o| o.records = [2, 1], "audit records"),
        (|o| o.audit_error = Some("line 1".into()), "line 1"),
        (|o| o.peak_kib += 1, "KiB"),
    ];
    for (change, said) in broken {
        let mut outcome = good();
        change(&mut outcome);
        let error = outcome.check().unwrap_err();
        assert!(error.contains(said), "{error}");
    }
}
