//! The host gate of one pod: one task owns what was affirmed, what was released, and until when.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use sealpod_attestation::{
    appraise::Appraisal,
    audit::Record,
    evidence::Bundle,
    init_data,
    token::{self, Expected},
};
use sealpod_protocol::agent;
use tokio::time::Instant;

use super::{
    AttestError, lease,
    release::{self, Release},
    settings::Settings,
    verifier::{Appraiser, unix_now},
    wanted::Wanted,
    withhold::Withheld,
};
use crate::{guest::Guest, pod::Pod};

/// What passing the gate took of a container's start.
#[derive(Debug, Clone, Copy, Default)]
pub struct Took {
    /// All of it.
    pub whole: Duration,
    /// Of that, the guest's answers with evidence.
    pub evidence: Duration,
    /// Of that, giving devices to the VM.
    pub attach: Duration,
}

/// The answer of a round.
pub(super) struct Affirmed {
    token: String,
    pub(super) until: Instant,
    jti: String,
}

/// See the file's head.
pub struct Gate {
    pub(super) settings: Arc<Settings>,
    pub(super) pod: Weak<Pod>,
    /// Made at first use. Taken out while it works: its work blocks, and is done elsewhere.
    appraiser: Option<Box<Appraiser>>,
    /// In the VM from its start, and not released yet.
    pub(super) withheld: Withheld,
    pub(super) released: Vec<Box<dyn Release>>,
    pub(super) affirmed: Option<Affirmed>,
    pub(super) lost: Option<String>,
    renewing: bool,
    took: Took,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate")
            .field("lost", &self.lost)
            .finish_non_exhaustive()
    }
}

impl Gate {
    /// The closed gate of a pod, with what is in its VM already.
    #[must_use]
    pub fn closed(settings: Arc<Settings>, pod: &Arc<Pod>, withheld: Withheld) -> Self {
        Self {
            settings,
            pod: Arc::downgrade(pod),
            appraiser: None,
            withheld,
            released: Vec::new(),
            affirmed: None,
            lost: None,
            renewing: false,
            took: Took::default(),
        }
    }

    /// Has the pod affirmed, if it or a device demands it, and releases the devices. Returns what the
    /// agent is told of them.
    ///
    /// # Errors
    /// [`AttestError`]; every device is with the host then, or its VM is being ended.
    pub async fn admit(
        &mut self,
        wanted: Vec<Wanted>,
    ) -> Result<Vec<agent::AdmittedDevice>, AttestError> {
        if let Some(why) = &self.lost {
            return Err(AttestError::Lost(why.clone()));
        }
        if wanted.is_empty() && !self.settings.required {
            return Ok(Vec::new());
        }
        let before = self.released.len();
        self.took = Took::default();
        let began = Instant::now();
        let opened = self.open(&wanted).await;
        if let Err(e) = self.told(&wanted, opened) {
            let added = self.released.split_off(before);
            self.ask_back(&added).await;
            self.take_back(added).await;
            return Err(e);
        }
        self.took.whole = began.elapsed();
        if let Some(pod) = self.pod.upgrade() {
            pod.passed_gate(&self.took);
        }
        if !std::mem::replace(&mut self.renewing, true) {
            tokio::spawn(lease::renew(self.pod.clone(), self.half_life()));
        }
        let told = |w: Wanted| agent::AdmittedDevice {
            id: w.id,
            path: w.path.to_string_lossy().into_owned(),
            ..Default::default()
        };
        Ok(wanted.into_iter().map(told).collect())
    }

    /// Attaches what is not attached yet, and has both gates open for all of it.
    async fn open(&mut self, wanted: &[Wanted]) -> Result<(), AttestError> {
        let affirmed = self.affirmed.as_ref();
        match affirmed.is_some_and(|a| a.until > Instant::now()) {
            true if wanted.is_empty() => return Ok(()),
            true => {}
            false if wanted.is_empty() => return self.renew_now().await,
            false => self.affirmed = Some(self.round(&[]).await?),
        }
        let pod = self.pod.upgrade().ok_or(AttestError::Ended)?;
        let vm = pod.vm().await.ok_or(AttestError::Ended)?;
        let ledger = pod.ledger().await.ok_or(AttestError::Ended)?;
        for one in wanted {
            if self.released.iter().any(|r| r.id() == one.id) {
                continue;
            }
            let withheld = self.withheld.take(&one.id).filter(|_| one.cold);
            let mut way = withheld.unwrap_or_else(|| release::way(one));
            let began = Instant::now();
            way.attach(vm.as_ref(), &ledger).await?;
            self.took.attach += began.elapsed();
            self.released.push(way);
        }
        self.renew_now().await
    }

    /// A round over all released devices; both gates. A pod without devices has a lease as well, in the
    /// guest where its init-data says whom to believe.
    pub(super) async fn renew_now(&mut self) -> Result<(), AttestError> {
        let ids: Vec<String> = self.released.iter().map(|r| r.id().to_owned()).collect();
        let affirmed = self.round(&ids).await?;
        if ids.is_empty() && !self.settings.names_verifier {
            self.affirmed = Some(affirmed);
            return Ok(());
        }
        let request = agent::AdmitDevicesRequest {
            token: affirmed.token.clone(),
            devices: ids,
            ..Default::default()
        };
        let admitted = self
            .guest()?
            .agent()
            .admit_devices(Guest::soon(), &request)
            .await;
        admitted.map_err(guest_said)?;
        self.affirmed = Some(affirmed);
        Ok(())
    }

    /// One question to the guest, appraised, and its token checked: the host gate's decision.
    async fn round(&mut self, devices: &[String]) -> Result<Affirmed, AttestError> {
        let settings = Arc::clone(&self.settings);
        let guest = self.guest()?;
        let mut appraiser = self.appraiser()?;
        let uid = settings.pod_uid.clone();
        let asked = blocking(move || {
            let nonce = appraiser.challenge(&uid);
            (appraiser, nonce)
        });
        let (appraiser, nonce) = asked.await?;
        self.appraiser = Some(appraiser);
        let nonce = nonce?;
        let began = Instant::now();
        let request = agent::AttestRequest {
            nonce: nonce.0.to_vec(),
            devices: devices.to_vec(),
            simulator_key: settings
                .simulator
                .as_ref()
                .map(|s| s.key().to_vec())
                .unwrap_or_default(),
            ..Default::default()
        };
        let answer = guest.agent().attest(Guest::soon(), &request).await;
        self.took.evidence += began.elapsed();
        let bundle = Bundle::from_json(&answer.map_err(guest_said)?.bundle)?;
        let appraiser = self.appraiser()?;
        let (uid, audience) = (settings.pod_uid.clone(), settings.config.audience.clone());
        let judged = blocking(move || {
            let word = appraiser.appraise(nonce, &uid, &audience, &bundle);
            (appraiser, bundle, word)
        });
        let (appraiser, bundle, word) = judged.await?;
        let appraiser = self.appraiser.insert(appraiser);
        let Appraisal { token, .. } = word?;
        let claims = token::check(
            &token,
            &Expected {
                verifiers: &appraiser.keys(),
                audience: &settings.config.audience,
                pod_uid: &settings.pod_uid,
                confirmation: Some(&bundle.key),
                nonce: Some(&nonce),
                init_data_digest: Some(&init_data::digest(&settings.init_data)),
                now: unix_now(),
                allow_simulated: settings.simulator.is_some(),
                devices,
            },
        )?;
        let life = claims.exp.saturating_sub(claims.iat);
        let lease = life.min(settings.config.lease_seconds.into());
        Ok(Affirmed {
            token,
            until: began + Duration::from_secs(lease),
            jti: claims.jti,
        })
    }

    /// The verifier, made at first use.
    fn appraiser(&mut self) -> Result<Box<Appraiser>, AttestError> {
        match self.appraiser.take() {
            Some(appraiser) => Ok(appraiser),
            None => {
                let s = &self.settings;
                let predicted = s.predicted.clone();
                let made = Appraiser::new(&s.config, &s.policy, predicted, &s.log_name)?;
                Ok(Box::new(made))
            }
        }
    }

    pub(super) fn guest(&self) -> Result<Guest, AttestError> {
        let pod = self.pod.upgrade().ok_or(AttestError::Ended)?;
        pod.guest().map_err(|_| AttestError::Ended)
    }

    /// Puts the gate's outcome into the audit log. A decision that cannot be written is none.
    fn told(&self, wanted: &[Wanted], outcome: Result<(), AttestError>) -> Result<(), AttestError> {
        let devices = wanted.iter().map(|w| w.id.clone()).collect();
        let (verdict, reason) = match &outcome {
            Ok(()) => ("released", String::new()),
            Err(e) => ("withheld", crate::error::chain(e)),
        };
        self.record("gate", verdict, reason, devices)?;
        outcome
    }

    pub(super) fn record(
        &self,
        event: &str,
        verdict: &str,
        reason: String,
        devices: Vec<String>,
    ) -> Result<(), AttestError> {
        let Some(appraiser) = &self.appraiser else {
            return Ok(());
        };
        appraiser.record(Record {
            event: event.into(),
            time: unix_now(),
            pod_uid: self.settings.pod_uid.clone(),
            verdict: verdict.into(),
            reason: reason.chars().take(2000).collect(),
            jti: self
                .affirmed
                .as_ref()
                .map(|a| a.jti.clone())
                .unwrap_or_default(),
            devices,
            ..Record::default()
        })?;
        Ok(())
    }
}

/// What the agent answered, in its own words.
fn guest_said(e: ttrpc::Error) -> AttestError {
    AttestError::Guest(crate::error::Error::from(e).message)
}

/// Runs what computes or waits for the network off the runtime's threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, AttestError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| AttestError::Guest(e.to_string()))
}
