//! The host gate alone: the real gate, verifier and simulator, with an agent that skips its own gate and
//! lies as each case says. Whatever it says, no device may reach its VM.

use std::{
    fs,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

mod leases;
mod lying;

use sealpod_attestation::{
    Timestamp,
    binding::EphemeralKey,
    encoding::hex,
    evidence::{Bundle, Tee},
    simulate::{ANCHORS_FILE, Ca, GpuClaims},
};
use sealpod_protocol::{SIMULATOR_PORT, agent_ttrpc};
use tokio::net::{UnixListener, UnixStream};
use ttrpc::r#async::{Server, transport::Listener};

use super::{
    Gate, Settings,
    fake::Fake,
    launch::Launch,
    verifier::{Appraiser, unix_now},
    wanted::{Given, Wanted},
    withhold::Withheld,
};
use crate::{config, guest::Guest, pod::Pod, vm::VSOCK_FILE};
use lying::{Lie, LyingAgent};

/// A node with a simulator, one stand-in, and a pod on it.
struct Bench {
    dir: tempfile::TempDir,
    config: config::Config,
    launch: Launch,
    lie: Arc<Mutex<(Lie, bool)>>,
    admissions: Arc<AtomicUsize>,
}

fn now() -> Timestamp {
    Timestamp(i64::try_from(unix_now()).expect("time"))
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("folder");
        let at = |name: &str| dir.path().join(name);
        let ca = Ca::create(&at("ca"), now()).expect("authority");
        let minted = ca
            .mint_gpu(&GpuClaims::default(), None)
            .expect("collateral");
        fs::create_dir(at("collateral")).expect("folder");
        for (name, content) in minted.collateral {
            fs::write(at("collateral").join(name), content).expect("file");
        }
        for name in ["kernel", "initramfs", "content"] {
            fs::write(at(name), name).expect("file");
        }
        let launch = Launch {
            kernel: at("kernel"),
            initramfs: at("initramfs"),
            cmdline: "quiet".into(),
            vcpus: 1,
            confidential: None,
        };
        let mut bench = Self {
            config: config::Config::default(),
            lie: Arc::new(Mutex::new((Lie::None, false))),
            admissions: Arc::default(),
            launch,
            dir,
        };
        bench.expect_measurement(&hex(&bench.launch.measurement().expect("measurement")));
        let a = &mut bench.config.attestation;
        a.state_dir = bench.dir.path().join("state");
        a.simulator = bench.dir.path().join("ca");
        a.anchors = bench.dir.path().join("ca").join(ANCHORS_FILE);
        a.collateral = bench.dir.path().join("collateral");
        let policy = config::Policy {
            reference_values: bench.dir.path().join("refs.json"),
            ..config::Policy::default()
        };
        a.policies.insert("default".into(), policy);
        bench
    }

    fn expect_measurement(&self, measurement: &str) {
        let limits = r#"{"minimum_tcb":{"snp":8}}"#;
        let text = format!(r#"{{"snp":{{"measurement":["{measurement}"],"limits":{limits}}}}}"#);
        fs::write(self.dir.path().join("refs.json"), text).expect("file");
    }

    fn wanted(&self) -> Vec<Wanted> {
        let path = self.dir.path().join("content");
        vec![Wanted {
            id: "gpu0".into(),
            path: "/dev/gpu0".into(),
            device: Given::Disk { path },
            cold: false,
        }]
    }

    /// A pod with its gate, its VM, and an agent that lies.
    async fn pod(&self) -> (Arc<Pod>, Gate, Arc<Fake>) {
        let pod = Pod::for_test();
        let folder = tempfile::tempdir_in(self.dir.path())
            .expect("folder")
            .keep();
        let settings = Settings::new(
            &self.config,
            Some("default"),
            None,
            (
                "test",
                &folder.file_name().unwrap_or_default().to_string_lossy(),
                Some("uid-1"),
            ),
            &folder,
            self.launch.clone(),
        );
        let settings = Arc::new(settings.expect("settings"));
        let agent = LyingAgent {
            socket: folder.join(format!("{VSOCK_FILE}_{SIMULATOR_PORT}")),
            key: EphemeralKey::from_random(&[3; 48]).expect("key"),
            uid: settings.pod_uid.clone(),
            init_data: settings.init_data.clone(),
            lie: Arc::clone(&self.lie),
            before: Mutex::default(),
            admissions: Arc::clone(&self.admissions),
        };
        let guest = connect(&folder, agent).await;
        let vm = Arc::new(Fake::default());
        pod.pretend(guest, Arc::clone(&vm) as _).await;
        let gate = Gate::closed(settings, &pod, Withheld::default());
        (pod, gate, vm)
    }

    /// What the gate says to a pod whose agent lies at once, or after it told the truth once.
    async fn refusal(&self, lie: Lie, later: bool) -> String {
        *self.lie.lock().expect("lock") = (lie, later);
        let (_pod, mut gate, vm) = self.pod().await;
        let e = gate.admit(self.wanted()).await.expect_err("withheld");
        assert!(vm.passed().is_empty(), "{lie:?}");
        assert_eq!(vm.ever().is_empty(), !later, "{lie:?}");
        crate::error::chain(&e)
    }

    /// How often agents were asked to open their gate since the last call.
    fn admissions(&self) -> usize {
        self.admissions.swap(0, Ordering::SeqCst)
    }

    /// Lines of all audit logs.
    fn audit(&self) -> String {
        let logs = fs::read_dir(self.config.attestation.state_dir.join("audit")).expect("folder");
        let logs = logs.flatten().map(|e| e.path());
        logs.filter(|p| p.extension().is_some_and(|e| e == "jsonl"))
            .map(|p| fs::read_to_string(p).expect("log"))
            .collect()
    }
}

async fn connect(folder: &Path, agent: LyingAgent) -> Guest {
    let path = folder.join("agent");
    let listener = UnixListener::bind(&path).expect("listener");
    let dialled = UnixStream::connect(&path).await.expect("dialled");
    tokio::spawn(async move {
        let once = futures_util::stream::iter([Ok::<_, std::io::Error>(dialled)]);
        let mut server = Server::new()
            .register_service(agent_ttrpc::create_agent(Arc::new(agent)))
            .add_listener(Listener::new(once));
        server.start().await.expect("server");
        std::future::pending::<()>().await;
    });
    let accepted = Guest::accept(&listener, &folder.join("v")).await;
    accepted.expect("guest").0
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_skips_its_gate_gets_no_device_by_any_lie() {
    let bench = Bench::new();
    for (lie, later, check) in [
        (Lie::StaleNonce, true, "report-data"),
        (Lie::Replay, true, "report-data"),
        (Lie::OtherPod, false, "report-data"),
        (Lie::OtherPod, true, "report-data"),
        (Lie::OtherKey, false, "report-data"),
        (Lie::OtherInitData, false, "report-data"),
        (Lie::Garbage, false, "no evidence"),
        (Lie::NoDevice, true, "does not affirm gpu0"),
    ] {
        let said = bench.refusal(lie, later).await;
        assert!(said.contains(check), "{lie:?}: {said}");
    }
    let audit = bench.audit();
    assert_eq!(audit.matches("\"event\":\"gate\"").count(), 8, "{audit}");
    assert_eq!(audit.matches("\"verdict\":\"withheld\"").count(), 8);
    assert!(!audit.contains("released"), "{audit}");
}

#[tokio::test(flavor = "multi_thread")]
async fn evidence_with_a_defect_opens_nothing_and_names_the_check() {
    let mut bench = Bench::new();
    for (defect, check) in [
        ("debug", "policy-debug"),
        ("tampered", "report-signature"),
        ("wrong-key", "report-signature"),
        ("unknown-root", "vek-chain"),
        ("expired-certificate", "vek-chain"),
        ("other-chip", "chip-id"),
    ] {
        bench.config.attestation.simulator_defect = defect.into();
        let said = bench.refusal(Lie::None, false).await;
        assert!(said.contains(check), "{defect}: {said}");
    }
    bench.config.attestation.simulator_defect.clear();
    bench.expect_measurement(&"ab".repeat(48));
    let said = bench.refusal(Lie::None, false).await;
    assert!(said.contains("check measurement"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn production_anchors_expired_collateral_and_a_verifier_that_is_down_open_nothing() {
    let mut bench = Bench::new();
    let collateral = bench.dir.path().join("collateral");
    let a = &mut bench.config.attestation;
    let (anchors, verifier) = (std::mem::take(&mut a.anchors), a.verifier.clone());
    let said = bench.refusal(Lie::None, false).await;
    assert!(said.contains("check "), "{said}");

    bench.config.attestation.anchors = anchors;
    let ca = Ca::open(&bench.dir.path().join("ca"), now()).expect("authority");
    let defect = sealpod_attestation::simulate::Defect::from_name(
        "expired-crl",
        sealpod_attestation::verdict::Tee::Nvidia,
    );
    let minted = ca.mint_gpu(&GpuClaims::default(), Some(defect.expect("defect")));
    for (name, content) in minted.expect("collateral").collateral {
        fs::write(collateral.join(name), content).expect("file");
    }
    let said = bench.refusal(Lie::None, true).await;
    assert!(said.contains("chain-revocation"), "{said}");

    let a = &mut bench.config.attestation;
    a.verifier = "https://127.0.0.1:1".into();
    a.verifier_trust = bench.dir.path().join("pin");
    fs::write(&a.verifier_trust, "00".repeat(48)).expect("file");
    let said = bench.refusal(Lie::None, false).await;
    assert!(said.contains("Cannot connect"), "{said}");
    bench.config.attestation.verifier = verifier;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_another_pod_has_stays_with_it() {
    let bench = Bench::new();
    let (_first, mut gate, vm) = bench.pod().await;
    gate.admit(bench.wanted()).await.expect("admitted");
    let (_second, mut other, none) = bench.pod().await;
    let e = other.admit(bench.wanted()).await.expect_err("busy");
    assert!(e.to_string().contains("in use by another pod"), "{e}");
    assert!(none.ever().is_empty());
    assert_eq!(vm.passed(), ["gpu0"]);
    gate.ended().await;
    other.admit(bench.wanted()).await.expect("free again");
}

#[test]
fn a_verifier_that_was_restarted_knows_no_nonce_of_before() {
    let bench = Bench::new();
    let config = &bench.config.attestation;
    let policy = config.policies["default"].clone();
    let key = EphemeralKey::from_random(&[3; 48]).expect("key").public();
    let bundle = Bundle {
        tee: Tee::Snp,
        report: Vec::new(),
        endorsements: Vec::new(),
        event_log: Vec::new(),
        gpus: Vec::new(),
        key,
        init_data: Vec::new(),
    };
    let start = || Appraiser::new(config, &policy, None, "log").expect("verifier");
    let check = |verifier: &Appraiser, nonce| {
        let word = verifier.appraise(nonce, "uid-1", "sealpod", &bundle);
        word.expect_err("refused").to_string()
    };
    let mut before = start();
    let nonce = before.challenge("uid-1").expect("nonce");
    drop(before);
    let mut after = start();
    let said = check(&after, nonce);
    assert!(said.contains("check nonce"), "{said}");
    // Its own it knows, once.
    let nonce = after.challenge("uid-1").expect("nonce");
    assert!(!check(&after, nonce).contains("check nonce"));
    assert!(check(&after, nonce).contains("check nonce"));
}
