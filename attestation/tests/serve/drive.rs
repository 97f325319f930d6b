//! Load on a running server, and what came of it: pods that attest, family by family, and bad clients
//! all the while. The test asserts on the outcome, the bench writes it down.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Barrier, Mutex};
use std::time::Instant;

use sealpod_attestation::evidence::Tee;
use serde_json::{Value, json};

use crate::bad::Kind;
use crate::client::{connect_from, receive, request};
use crate::lab::{Guest, Server};

/// Limits for a load: slow clients hold their places for their time.
pub(crate) const LIMITS: &str = "[limits]\nheader_seconds = 2\nbody_seconds = 2\nmemory_mib = 32\n";
/// Most that a server may take under [`LIMITS`], KiB: twice the budget of bodies (as they came, and
/// read), and twice what it has when idle.
pub(crate) const MOST_MEMORY: u64 = 96 << 10;
/// Used evidence that is kept for replays.
const USED_MAX: usize = 64;

/// Whose evidence a pod sends.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Family {
    Snp,
    Tdx,
    /// An SNP guest with one GPU.
    Nvidia,
}

impl Family {
    pub(crate) const ALL: [Self; 3] = [Self::Snp, Self::Tdx, Self::Nvidia];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Snp => "snp",
            Self::Tdx => "tdx",
            Self::Nvidia => "nvidia",
        }
    }

    fn guest(self, pod: &str) -> Guest {
        let tee = match self {
            Self::Tdx => Tee::Tdx,
            Self::Snp | Self::Nvidia => Tee::Snp,
        };
        Guest {
            gpus: usize::from(matches!(self, Self::Nvidia)),
            ..Guest::new(tee, pod)
        }
    }
}

/// How much load.
#[derive(Clone, Copy)]
pub(crate) struct Plan {
    /// Pods at once, each with an address of its own.
    pub(crate) good: u8,
    /// Bad clients at once.
    pub(crate) bad: u8,
    /// Verifications of each pod in each family.
    pub(crate) rounds: usize,
    /// In each so many rounds the evidence is sent three times at once; 0: never.
    pub(crate) race: usize,
}

/// One family's part.
pub(crate) struct Phase {
    pub(crate) family: Family,
    pub(crate) seconds: f64,
    /// Of the server's process, the bad clients' part included.
    pub(crate) cpu_ms: f64,
    /// From the connection to the token, sorted.
    pub(crate) latencies_ms: Vec<f64>,
}

/// Kind of client → how it ended → how often.
pub(crate) type Ends = BTreeMap<&'static str, BTreeMap<String, usize>>;

/// What came of it.
pub(crate) struct Outcome {
    pub(crate) phases: Vec<Phase>,
    pub(crate) bad: Ends,
    pub(crate) replays: usize,
    pub(crate) replays_accepted: usize,
    /// Decisions that clients were told, affirming and refused.
    pub(crate) decisions: [usize; 2],
    /// Audit records, affirming and refused.
    pub(crate) records: [usize; 2],
    /// What `audit verify` said, where it failed.
    pub(crate) audit_error: Option<String>,
    pub(crate) idle_kib: u64,
    pub(crate) peak_kib: u64,
}

impl Outcome {
    /// What must never be, in words.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.replays_accepted > 0 {
            return Err(format!("{} replays accepted", self.replays_accepted));
        }
        let (told, found) = (self.decisions, self.records);
        if told != found {
            return Err(format!("{found:?} audit records; {told:?} decisions"));
        }
        if let Some(error) = &self.audit_error {
            return Err(format!("audit verify: {error}"));
        }
        if self.peak_kib > MOST_MEMORY {
            return Err(format!("{} KiB, at most {MOST_MEMORY}", self.peak_kib));
        }
        Ok(())
    }
}

/// What all clients share.
#[derive(Default)]
pub(crate) struct Load {
    over: AtomicBool,
    decisions: [AtomicUsize; 2],
    replays: AtomicUsize,
    replays_accepted: AtomicUsize,
    tokens: Mutex<BTreeSet<String>>,
    used: Mutex<Vec<String>>,
    bad: Mutex<Ends>,
}

/// Ends the bad clients also when a good one panics.
struct Over<'a>(&'a Load);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, SeqCst);
    }
}

impl Load {
    pub(crate) fn over(&self) -> bool {
        self.over.load(SeqCst)
    }

    pub(crate) fn bad(&self, kind: Kind, end: String) {
        let mut ends = self.bad.lock().unwrap();
        *ends.entry(kind.name()).or_default().entry(end).or_default() += 1;
    }

    /// Evidence that was accepted before.
    pub(crate) fn used(&self) -> Option<String> {
        let used = self.used.lock().unwrap();
        let at = self.replays.load(SeqCst) % used.len().max(1);
        used.get(at).cloned()
    }

    /// Sends evidence that was sent before, which is a replay: whether it got a token, and its end.
    pub(crate) fn judge(&self, server: &Server, from: IpAddr, body: &str) -> (bool, String) {
        self.replays.fetch_add(1, SeqCst);
        let (accepted, end) = self.send(server, from, body);
        self.replays_accepted
            .fetch_add(usize::from(accepted), SeqCst);
        (accepted, end)
    }

    fn send(&self, server: &Server, from: IpAddr, body: &str) -> (bool, String) {
        let (status, answer) = ask(server, from, "/v1/appraise", body);
        if let 200 | 403 = status {
            self.decisions[usize::from(status != 200)].fetch_add(1, SeqCst);
        }
        if let Some(token) = answer["token"].as_str() {
            let new = self.tokens.lock().unwrap().insert(token.into());
            assert!(new, "a token was given out twice");
        }
        let check = answer["refused"]["check"].as_str().unwrap_or_default();
        (status == 200, format!("{status} {check}"))
    }

    /// Sends fresh evidence, `tries` times at once: how long the one that was accepted took.
    fn attest(&self, server: &Server, from: IpAddr, body: String, tries: usize) -> f64 {
        let start = Instant::now();
        let answers: Vec<_> = std::thread::scope(|scope| {
            let timed = || {
                let (accepted, end) = self.send(server, from, &body);
                (accepted, end, start.elapsed().as_secs_f64() * 1e3)
            };
            let others: Vec<_> = (1..tries).map(|_| scope.spawn(timed)).collect();
            let first = timed();
            let others = others.into_iter().map(|o| o.join().unwrap());
            others.chain([first]).collect()
        });
        let accepted = answers.iter().filter(|a| a.0).count();
        self.replays.fetch_add(tries - 1, SeqCst);
        self.replays_accepted
            .fetch_add(accepted.saturating_sub(1), SeqCst);
        let mut used = self.used.lock().unwrap();
        match used.len() {
            USED_MAX.. => used[self.decisions[0].load(SeqCst) % USED_MAX] = body,
            _ => used.push(body),
        }
        let served = answers.iter().find(|a| a.0);
        served
            .unwrap_or_else(|| panic!("a good client was not served: {answers:?}"))
            .2
    }
}

/// One POST on a connection of its own, as the shim's client makes it: status and body.
fn ask(server: &Server, from: IpAddr, path: &str, body: &str) -> (u16, Value) {
    let mut stream = connect_from(server, from);
    let text = request("POST", path, "", body);
    stream.write_all(text.as_bytes()).unwrap();
    let answer = receive(&mut stream).unwrap();
    (answer.status, answer.json())
}

/// Runs `plan` for each of `families`, one after another.
pub(crate) fn run(server: &Server, plan: Plan, families: &[Family]) -> Outcome {
    let idle_kib = server.memory_kib("VmRSS");
    let load = Load::default();
    let before = records(server);
    let phases = std::thread::scope(|scope| {
        let _over = Over(&load);
        for n in 0..plan.bad {
            let kind = Kind::ALL[usize::from(n) % Kind::ALL.len()];
            let (from, load) = (IpAddr::from([127, 0, 2, n + 1]), &load);
            scope.spawn(move || kind.run(server, from, load));
        }
        let phases = families.iter().map(|f| phase(server, plan, *f, &load));
        phases.collect()
    });
    let verified = server.audit_verify();
    let found = verified.as_ref().map_or(before, |()| records(server));
    Outcome {
        phases,
        bad: load.bad.into_inner().unwrap(),
        replays: load.replays.into_inner(),
        replays_accepted: load.replays_accepted.into_inner(),
        decisions: load.decisions.map(AtomicUsize::into_inner),
        records: [0, 1].map(|n| found[n] - before[n]),
        audit_error: verified.err(),
        idle_kib,
        peak_kib: server.memory_kib("VmHWM"),
    }
}

/// How many audit records are there, affirming and refused.
fn records(server: &Server) -> [usize; 2] {
    let records = server.records();
    ["affirming", "refused"].map(|v| records.iter().filter(|r| r.verdict == v).count())
}

/// All pods make their evidence; then all send it.
fn phase(server: &Server, plan: Plan, family: Family, load: &Load) -> Phase {
    let pods = |n: u8| IpAddr::from([127, 0, 1, n + 1]);
    let ready: Vec<Vec<String>> = std::thread::scope(|scope| {
        let of = |n| scope.spawn(move || prepare(server, pods(n), family, plan.rounds));
        let made: Vec<_> = (0..plan.good).map(of).collect();
        made.into_iter().map(|m| m.join().unwrap()).collect()
    });
    let begin = Barrier::new(usize::from(plan.good) + 1);
    let (start, cpu, mut latencies_ms) = std::thread::scope(|scope| {
        let pods: Vec<_> = (0..plan.good)
            .zip(ready)
            .map(|(n, bodies)| {
                let begin = &begin;
                scope.spawn(move || {
                    begin.wait();
                    let rounds = bodies.into_iter().enumerate();
                    let took = rounds.map(|(round, body)| {
                        let race = plan.race > 0 && round % plan.race == 0;
                        load.attest(server, pods(n), body, if race { 3 } else { 1 })
                    });
                    took.collect::<Vec<_>>()
                })
            })
            .collect();
        let cpu = server.cpu_ms();
        begin.wait();
        let start = Instant::now();
        let took = pods.into_iter().flat_map(|p| p.join().unwrap());
        (start, cpu, took.collect::<Vec<_>>())
    });
    latencies_ms.sort_by(f64::total_cmp);
    Phase {
        family,
        seconds: start.elapsed().as_secs_f64(),
        cpu_ms: server.cpu_ms() - cpu,
        latencies_ms,
    }
}

/// A pod's requests: a challenge for each, and the evidence that answers it.
fn prepare(server: &Server, from: IpAddr, family: Family, rounds: usize) -> Vec<String> {
    let pod = format!("pod-{from}");
    let guest = family.guest(&pod);
    let one = |_| {
        let asked = json!({ "pod_uid": pod }).to_string();
        let (status, challenge) = ask(server, from, "/v1/challenge", &asked);
        assert_eq!(status, 200, "{challenge}");
        let nonce = challenge["nonce"].clone();
        let bundle = guest.bundle(&serde_json::from_value(nonce.clone()).unwrap());
        json!({ "nonce": nonce, "pod_uid": pod, "audience": "gate", "bundle": bundle }).to_string()
    };
    (0..rounds).map(one).collect()
}
