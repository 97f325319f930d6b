//! The guest gate alone: the real agent in a real VM, and a shim that skips its own gate. The device is in
//! the guest already; only a token that the verifier of init-data signed for this guest, this pod and the
//! last nonce opens it.

use std::{collections::BTreeMap, sync::Arc};

use sealpod_attestation::{
    Timestamp,
    binding::Nonce,
    encoding::hex,
    evidence::{Bundle, Tee},
    init_data::{self, InitData},
    signer::Signer,
    simulate::Ca,
    token::{CPU, Claims, Confirmation, PROFILE, Submodule, Tier, TrustVector, VerifierId},
};
use sealpod_protocol::{AGENT_PORT, agent};
use sealpod_shim::{
    attest::{launch::Launch, simulator::Simulator},
    guest::Guest,
    vm::{Driver, Passed, Qemu, VSOCK_FILE, Vm},
};
use tokio::net::UnixListener;

use crate::bench::{Bench, guest_file, skip};

const POD: &str = "pod-1";
const AUDIENCE: &str = "sealpod";
const DEVICE: &str = "gpu0";

fn now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.unwrap().as_secs()
}

/// A guest with the device in it, as a shim that skips its gate makes it.
struct Skipped {
    guest: Guest,
    vm: Arc<dyn Vm>,
    simulator: Simulator,
    signer: Signer,
    init_data: Vec<u8>,
    nonces: u8,
}

impl Skipped {
    async fn start(bench: &Bench) -> Self {
        Self::start_with(bench, false).await
    }

    /// `cold`: the device is there before the guest runs.
    async fn start_with(bench: &Bench, cold: bool) -> Self {
        let signer = Signer::generate().unwrap();
        let mut init = InitData::default();
        let key = serde_json::to_string(signer.public()).unwrap();
        for (name, value) in [
            (init_data::VERIFIER, key.as_str()),
            (init_data::AUDIENCE, AUDIENCE),
            (init_data::ANCHORS, "simulated"),
        ] {
            init.data.insert(name.into(), value.into());
        }
        let init_data = init.to_text().into_bytes();
        let mut config = bench.config("");
        config.kernel_params.clear();
        config.program = "qemu-system-x86_64".into();
        config.initramfs = guest_file("initramfs.cpio");
        config.memory_mib = 160;
        let device = Passed::StandIn {
            id: DEVICE.into(),
            path: bench.file("content", &[7; 1 << 20]),
        };
        if cold {
            config.passed.push(device.clone());
        }
        let launch = Launch {
            kernel: config.kernel.clone(),
            initramfs: config.initramfs.clone(),
            cmdline: Qemu.cmdline(&config).await,
            vcpus: 1,
            confidential: None,
        };
        let ca = bench.file("marker", b"").with_file_name("ca");
        Ca::create(&ca, Timestamp(i64::try_from(now()).unwrap())).unwrap();
        let dir = config.dir.clone();
        let simulator = Simulator::start(&dir, (&ca, Tee::Snp), "", launch, &init_data).unwrap();
        let listener = UnixListener::bind(dir.join(format!("{VSOCK_FILE}_{AGENT_PORT}"))).unwrap();
        let vm = Qemu.start(config, &bench.ledger).await.unwrap();
        let vsock = dir.join(VSOCK_FILE);
        let accepted = Guest::accept(&listener, &vsock);
        let accepted = tokio::time::timeout(std::time::Duration::from_secs(60), accepted).await;
        let guest = accepted
            .unwrap_or_else(|_| panic!("no agent: {:?}", vm.console_tail()))
            .unwrap()
            .0;
        let request = agent::SetupSandboxRequest {
            time_unix_ns: i64::try_from(now()).unwrap() * 1_000_000_000,
            init_data: init_data.clone(),
            pod_uid: POD.into(),
            ..Default::default()
        };
        let agent = guest.agent();
        agent.setup_sandbox(Guest::soon(), &request).await.unwrap();
        if !cold {
            vm.pass(device).await.unwrap();
        }
        Self {
            guest,
            vm,
            simulator,
            signer,
            init_data,
            nonces: 0,
        }
    }

    /// Asks for evidence; returns what a verifier would say of it.
    async fn claims(&mut self) -> Claims {
        self.claims_of(vec![DEVICE.into()]).await
    }

    async fn claims_of(&mut self, devices: Vec<String>) -> Claims {
        self.nonces += 1;
        let nonce = Nonce([self.nonces; 32]);
        let request = agent::AttestRequest {
            nonce: nonce.0.to_vec(),
            devices: devices.clone(),
            simulator_key: self.simulator.key().to_vec(),
            ..Default::default()
        };
        let answer = self.guest.agent().attest(Guest::soon(), &request).await;
        let bundle = Bundle::from_json(&answer.unwrap().bundle).unwrap();
        let affirmed = |device: Option<&str>| Submodule {
            status: Tier::Affirming,
            trust: TrustVector::default(),
            policy: String::new(),
            tee: if device.is_some() { "nvidia" } else { "snp" }.into(),
            sim: true,
            measurement: None,
            device_id: device.map(str::to_owned),
        };
        Claims {
            eat_profile: PROFILE.into(),
            iss: "test".into(),
            aud: AUDIENCE.into(),
            jti: self.nonces.to_string(),
            iat: now(),
            nbf: now(),
            exp: now() + 60,
            eat_nonce: nonce,
            verifier: VerifierId {
                build: "test".into(),
                developer: "test".into(),
            },
            submods: BTreeMap::from([
                (CPU.to_owned(), affirmed(None)),
                ("gpu0".to_owned(), affirmed(Some(DEVICE))),
            ]),
            cnf: Confirmation { jwk: bundle.key },
            pod_uid: POD.into(),
            policy_digest: String::new(),
            evidence_digest: hex(&bundle.digest()),
            init_data_digest: hex(&init_data::digest(&self.init_data)),
            devices,
            sim: true,
        }
    }

    async fn admit(&self, token: String) -> Result<(), String> {
        self.admit_all(token, vec![DEVICE.into()]).await
    }

    async fn admit_all(&self, token: String, devices: Vec<String>) -> Result<(), String> {
        let request = agent::AdmitDevicesRequest {
            token,
            devices,
            ..Default::default()
        };
        let done = self
            .guest
            .agent()
            .admit_devices(Guest::soon(), &request)
            .await;
        done.map(drop).map_err(|e| e.to_string())
    }

    /// What the agent says to a container that gets the device: it has no root, so it fails in any case.
    async fn container(&self) -> String {
        let spec = r#"{"ociVersion":"1.0.2","root":{"path":"rootfs"},"process":{"cwd":"/","args":["x"],
            "user":{"uid":0,"gid":0}},"linux":{"namespaces":[{"type":"mount"}]}}"#;
        let device = agent::AdmittedDevice {
            id: DEVICE.into(),
            path: "/dev/gpu0".into(),
            ..Default::default()
        };
        let request = agent::CreateContainerRequest {
            container_id: "c".into(),
            spec: spec.into(),
            rootfs: "c/rootfs".into(),
            admitted_devices: vec![device],
            ..Default::default()
        };
        let made = self
            .guest
            .agent()
            .create_container(Guest::while_building(), &request)
            .await;
        made.expect_err("no root").to_string()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_that_skips_its_gate_opens_nothing_in_the_guest() {
    let Some(bench) = Bench::new() else { return };
    if !guest_file("initramfs.cpio").exists() {
        skip("the initramfs with the agent is not built");
        return;
    }
    let mut skipped = Skipped::start(&bench).await;
    const NOT: &str = "is not admitted";
    assert!(skipped.container().await.contains(NOT));
    let stranger = Signer::generate().unwrap();
    let none = skipped.admit("x.y.z".into()).await.unwrap_err();
    assert!(none.contains("no evidence was asked for"), "{none}");

    type Change = fn(&mut Claims);
    let lies: [(&str, Change); 9] = [
        ("audience", |c| c.aud = "another".into()),
        ("of pod", |c| c.pod_uid = "pod-2".into()),
        ("another nonce", |c| c.eat_nonce = Nonce([99; 32])),
        ("expired", |c| {
            (c.iat, c.nbf, c.exp) = (now() - 200, now() - 200, now() - 100)
        }),
        ("lives for", |c| c.exp = c.iat + 3600),
        ("other init-data", |c| c.init_data_digest = "00".repeat(48)),
        ("does not affirm", |c| {
            c.submods.get_mut(CPU).unwrap().status = Tier::Contraindicated;
        }),
        ("does not affirm gpu0", |c| {
            c.devices.clear();
            c.submods.remove("gpu0");
        }),
        ("another key", |c| {
            c.cnf.jwk = *Signer::generate().unwrap().public();
        }),
    ];
    for (said, lie) in lies {
        let mut claims = skipped.claims().await;
        lie(&mut claims);
        let token = skipped.signer.token(&claims).unwrap();
        let error = skipped.admit(token).await.unwrap_err();
        assert!(error.contains(said), "{said}: {error}");
        assert!(skipped.container().await.contains(NOT), "{said}");
    }
    // Signed by someone else, tampered with, and good but of before.
    let claims = skipped.claims().await;
    let error = skipped
        .admit(stranger.token(&claims).unwrap())
        .await
        .unwrap_err();
    assert!(error.contains("not a trusted verifier's"), "{error}");
    let claims = skipped.claims().await;
    let mut tampered = skipped.signer.token(&claims).unwrap();
    tampered.truncate(tampered.len() - 4);
    tampered.push_str("AAAA");
    let error = skipped.admit(tampered).await.unwrap_err();
    assert!(error.contains("signature"), "{error}");
    let claims = skipped.claims().await;
    let good = skipped.signer.token(&claims).unwrap();
    skipped.claims().await;
    let error = skipped.admit(good).await.unwrap_err();
    assert!(error.contains("another nonce"), "{error}");
    assert!(skipped.container().await.contains(NOT));

    // Only the real one opens it, once, and until it is revoked.
    let began = std::time::Instant::now();
    let claims = skipped.claims().await;
    let evidence = began.elapsed();
    let good = skipped.signer.token(&claims).unwrap();
    let began = std::time::Instant::now();
    skipped.admit(good.clone()).await.unwrap();
    eprintln!(
        "evidence in the guest: {evidence:?}; guest gate: {:?}",
        began.elapsed()
    );
    let said = skipped.container().await;
    assert!(!said.contains(NOT), "{said}");
    let again = skipped.admit(good).await.unwrap_err();
    assert!(again.contains("no evidence was asked for"), "{again}");
    let agent = skipped.guest.agent();
    let all = agent::RevokeDevicesRequest::default();
    agent.revoke_devices(Guest::soon(), &all).await.unwrap();
    assert!(skipped.container().await.contains(NOT));
    skipped.vm.stop().await;
    drop(skipped);
    bench.finish();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_is_not_renewed_ends_in_the_guest_by_itself() {
    let Some(bench) = Bench::new() else { return };
    if !guest_file("initramfs.cpio").exists() {
        skip("the initramfs with the agent is not built");
        return;
    }
    let mut skipped = Skipped::start(&bench).await;
    let mut claims = skipped.claims().await;
    claims.exp = claims.iat + 4;
    let token = skipped.signer.token(&claims).unwrap();
    skipped.admit(token).await.unwrap();
    let until = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !skipped.container().await.contains("lease has ended") {
        assert!(std::time::Instant::now() < until, "the lease does not end");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    // A lease of the pod alone lets it run again, without the device.
    let claims = skipped.claims_of(Vec::new()).await;
    let token = skipped.signer.token(&claims).unwrap();
    skipped.admit_all(token, Vec::new()).await.unwrap();
    assert!(skipped.container().await.contains("is not admitted"));
    skipped.vm.stop().await;
    drop(skipped);
    bench.finish();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_without_a_device_ends_in_the_guest_and_nothing_is_run_then() {
    let Some(bench) = Bench::new() else { return };
    if !guest_file("initramfs.cpio").exists() {
        skip("the initramfs with the agent is not built");
        return;
    }
    let mut skipped = Skipped::start(&bench).await;
    let mut claims = skipped.claims_of(Vec::new()).await;
    claims.exp = claims.iat + 4;
    let token = skipped.signer.token(&claims).unwrap();
    skipped.admit_all(token, Vec::new()).await.unwrap();
    const OVER: &str = "lease has ended";
    assert!(!skipped.container().await.contains(OVER));
    let until = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !skipped.container().await.contains(OVER) {
        assert!(std::time::Instant::now() < until, "the lease does not end");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    // Another one lets things run again.
    let claims = skipped.claims_of(Vec::new()).await;
    let token = skipped.signer.token(&claims).unwrap();
    skipped.admit_all(token, Vec::new()).await.unwrap();
    assert!(!skipped.container().await.contains(OVER));
    skipped.vm.stop().await;
    drop(skipped);
    bench.finish();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_there_from_the_start_is_closed_until_the_token_and_can_leave() {
    let Some(bench) = Bench::new() else { return };
    if !guest_file("initramfs.cpio").exists() {
        skip("the initramfs with the agent is not built");
        return;
    }
    let mut skipped = Skipped::start_with(&bench, true).await;
    const NOT: &str = "is not admitted";
    assert!(skipped.container().await.contains(NOT));
    // It is live: the agent gives evidence of it, and the token opens it.
    let claims = skipped.claims().await;
    assert!(skipped.container().await.contains(NOT));
    let token = skipped.signer.token(&claims).unwrap();
    skipped.admit(token).await.unwrap();
    assert!(!skipped.container().await.contains(NOT));
    let agent = skipped.guest.agent();
    let all = agent::RevokeDevicesRequest::default();
    agent.revoke_devices(Guest::soon(), &all).await.unwrap();
    assert!(skipped.container().await.contains(NOT));
    skipped.vm.take_back(DEVICE).await.unwrap();
    skipped.vm.stop().await;
    drop(skipped);
    bench.finish();
}
