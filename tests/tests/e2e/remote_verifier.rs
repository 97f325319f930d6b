//! Gates whose verifier is a service elsewhere: `sealpod-attest serve` in the environment's own network, a
//! pod that says in its init-data whom it believes, and what becomes of both when the service goes away.

use std::{
    io::{BufRead, BufReader},
    process::Child,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sealpod_tests::{
    Env, Version, assets,
    attest::{CONTENT, DEVICE, Node},
    need, wait,
};

const ADDRESS: &str = "127.0.0.1:8443";
const PATIENCE: Duration = Duration::from_secs(30);
/// Its state, below the environment's folder.
const STATE: &str = "verifier";

/// A running service.
struct Service(Child);

impl Service {
    /// Starts it; returns when it listens. What it is known by lies in `pin` then, its key in its state.
    fn start(env: &Env) -> Self {
        let config = format!(
            "listen = \"{ADDRESS}\"\nstate = \"{STATE}\"\n[verifier]\nanchors = \"ca/anchors.json\"\n\
             collateral = \"minted/collateral\"\nreference_values = \"refs.json\"\n"
        );
        std::fs::write(env.folder().join("attest.toml"), config).unwrap();
        let mut child = env.spawn("sealpod-attest", &["serve", "--config", "attest.toml"]);
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let pin = lines
            .map_while(Result::ok)
            .find_map(|line| Some(line.strip_prefix("certificate pin ")?.to_owned()));
        std::fs::write(env.folder().join("pin"), pin.expect("a pin")).unwrap();
        Self(child)
    }

    /// Ends it as an operator does.
    fn stop(mut self) {
        let pid = Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        kill(pid, Signal::SIGTERM).unwrap();
        assert!(self.0.wait().unwrap().success());
    }
}

/// The annotation with init-data of an owner who believes the service, for this audience.
fn init_data(env: &Env, audience: &str) -> String {
    let jwk = std::fs::read_to_string(env.folder().join(STATE).join("verifier.jwk")).unwrap();
    let text = format!(
        "version = \"0.1.0\"\nalgorithm = \"sha384\"\n[data]\n\"verifier.jwk\" = '{jwk}'\n\
         audience = \"{audience}\"\nanchors = \"simulated\"\n"
    );
    std::fs::write(env.folder().join("init.toml"), text).unwrap();
    let done = env
        .run("sh", &["-c", "gzip -c init.toml | base64 -w0"])
        .ok();
    format!("io.sealpod.init_data={}", done.stdout)
}

#[test]
fn a_verifier_elsewhere_releases_and_renews_after_its_restart_and_without_it_the_lease_ends() {
    need!(assets::complete());
    let env = Env::attesting(Version::V1_7).unwrap();
    let service = Service::start(&env);
    let pin = env.folder().join("pin");
    let node = Node {
        lease_seconds: 6,
        more: format!(
            "verifier = \"https://{ADDRESS}\"\nverifier_trust = \"{}\"\n",
            pin.display()
        ),
        ..Node::default()
    };
    env.reconfigure(&node).unwrap();
    let device = format!("io.sealpod.attestation.devices={DEVICE}");
    let script = format!("head -c {} /dev/gpu0", CONTENT.len());
    let read = ["sh", "-c", &script];

    // The token is for the node's audience; its pod believes tokens for another only.
    let other = init_data(&env, "another");
    let options = ["--annotation", &device, "--annotation", &other];
    let done = env.ctr_run(&options, &env.id("audience"), &read);
    assert!(done.text().contains("Guest gate"), "{}", done.text());
    assert!(done.text().contains("audience"), "{}", done.text());
    assert!(!done.stdout.contains(CONTENT));

    let own = init_data(&env, "sealpod");
    let id = env.id("pod");
    let options = ["--annotation", &device, "--annotation", &own];
    env.ctr_start(&options, &id, &["sleep", "600"]);
    let done = env.ctr_exec(&id, "read", &read).ok();
    assert_eq!(done.stdout, CONTENT);

    service.stop();
    let leases = || env.audit().matches("\"event\":\"lease\"").count();
    let before = leases();
    let service = Service::start(&env);
    wait::until("a renewal after the restart", PATIENCE, || {
        (leases() > before).then_some(())
    });
    assert_eq!(env.ctr_status(&id).as_deref(), Some("RUNNING"));

    service.stop();
    wait::until("the end of the lease", PATIENCE, || {
        (env.ctr_status(&id).as_deref() == Some("STOPPED")).then_some(())
    });
    let audit = env.audit();
    let lost = audit.lines().find(|l| l.contains("revocation"));
    assert!(
        lost.is_some_and(|l| l.contains("Cannot connect")),
        "{audit}"
    );
    env.ctr_remove(&id);

    // What the service decided stands in its own log.
    let (key, log) = ("verifier/verifier.jwk", "verifier/audit.log");
    let _ = env
        .run("sealpod-attest", &["audit", "verify", "--key", key, log])
        .ok();
    env.assert_clean();
}
