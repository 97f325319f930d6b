//! Leases: what is renewed, and what becomes of a pod that is no longer affirmed.

use sealpod_attestation::encoding::hex;

use super::Bench;
use crate::config::OnLoss;

impl Bench {
    /// What the bench's pods start with is expected, and what becomes of one that loses its lease.
    fn affirms(&mut self, on_loss: OnLoss) {
        let good = hex(&self.launch.measurement().expect("measurement"));
        self.expect_measurement(&good);
        for policy in self.config.attestation.policies.values_mut() {
            policy.on_loss = on_loss;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_renewed_until_the_reference_values_change_then_the_device_goes_back() {
    let mut bench = Bench::new();
    for on_loss in [OnLoss::Kill, OnLoss::Freeze] {
        bench.affirms(on_loss);
        let (_pod, mut gate, vm) = bench.pod().await;
        let admitted = gate.admit(bench.wanted()).await.expect("admitted");
        assert_eq!(
            (admitted[0].id.as_str(), admitted[0].path.as_str()),
            ("gpu0", "/dev/gpu0")
        );
        assert_eq!(vm.passed(), ["gpu0"]);
        let next = gate.renew().await.expect("renewed");
        assert!((1..=150).contains(&next.as_secs()), "{next:?}");
        assert_eq!(vm.passed(), ["gpu0"]);

        bench.expect_measurement(&"ab".repeat(48));
        assert_eq!(gate.renew().await, None);
        assert!(vm.passed().is_empty());
        assert_eq!(vm.stopped(), on_loss == OnLoss::Kill);
        let e = gate.admit(bench.wanted()).await.expect_err("lost");
        assert!(e.to_string().contains("lost its lease"), "{e}");
    }
    let audit = bench.audit();
    assert_eq!(audit.matches("\"event\":\"lease\"").count(), 2, "{audit}");
    assert_eq!(
        audit.matches("\"event\":\"revocation\"").count(),
        2,
        "{audit}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_without_a_device_has_a_lease_too_and_its_loss_ends_or_stops_the_pod() {
    let mut bench = Bench::new();
    for on_loss in [OnLoss::Kill, OnLoss::Freeze] {
        bench.affirms(on_loss);
        let (_pod, mut gate, vm) = bench.pod().await;
        assert!(gate.admit(Vec::new()).await.expect("affirmed").is_empty());
        // The guest has one of its own, which counts from the same evidence.
        assert_eq!(bench.admissions(), 1);
        assert!(gate.renew().await.is_some());
        assert_eq!(bench.admissions(), 1);
        // A second container asks nobody while the lease lasts.
        gate.admit(Vec::new()).await.expect("affirmed");
        assert_eq!(bench.admissions(), 0);

        bench.expect_measurement(&"ab".repeat(48));
        assert_eq!(gate.renew().await, None);
        assert_eq!(vm.stopped(), on_loss == OnLoss::Kill);
        let e = gate.admit(Vec::new()).await.expect_err("lost");
        assert!(e.to_string().contains("lost its lease"), "{e}");
    }
    let audit = bench.audit();
    for (event, times) in [("lease", 2), ("revocation", 2)] {
        let written = audit.matches(&format!("\"event\":\"{event}\"")).count();
        assert_eq!(written, times, "{audit}");
    }
}
