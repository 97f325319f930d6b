//! Attestation of the guest, and the guest gate. The agent is measured: what it checks here protects
//! the pod's owner from the host. The host, and the shim with it, can only deny.
//!
//! ```text
//! set_up(init-data, pod) ─▶ attest(nonce) ─▶ Bundle … verifier … token ─▶ admit(token) ─▶ Lease
//!                               ▲                                            │ half of its life
//!                               └────────────────────────────────────────────┘
//! ```
//! A token counts if the verifier that init-data names signed it, for this pod, this guest's key, this
//! init-data, and the nonce that was asked with last. The lease counts from when evidence was asked for,
//! by the guest's own clock that nobody sets.

pub mod device;
pub mod driver;
mod gate;
mod source;
pub mod tsm;

pub use gate::Gate;
pub use source::{CpuEvidence, Source, SourceError};

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sealpod_attestation::binding::{self, EphemeralKey, Nonce, PublicKey};
use sealpod_attestation::evidence::{Bundle, BundleError, GpuEvidence, gpu_digest, is_device_id};
use sealpod_attestation::init_data::{self, InitData, InitDataError};
use sealpod_attestation::token::{self, Expected, TokenError};
use sealpod_protocol::agent::{AdmitDevicesRequest, AttestRequest};
use tokio::time::Instant;

use crate::uevent;

/// Most devices of a pod.
const DEVICES_MAX: usize = 16;
/// Longest name of a pod.
const POD_UID_MAX: usize = 256;

/// Evidence that could not be given, or devices that were not admitted.
#[derive(Debug, thiserror::Error)]
pub enum AttestError {
    /// The request itself.
    #[error("{0}")]
    Request(String),
    /// Init-data.
    #[error(transparent)]
    InitData(#[from] InitDataError),
    /// The source.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// No random bytes.
    #[error("Could not make this guest's key: {0}")]
    Key(std::io::Error),
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// A check of the guest gate.
    #[error("Guest gate: {0}")]
    Token(#[from] TokenError),
    /// Closed, for another reason than the token.
    #[error("Guest gate: {0}")]
    Closed(String),
}

/// What the pod's owner said, and which pod it is. Fixed once a boot.
#[derive(Debug, Default)]
struct Pod {
    raw: Vec<u8>,
    init_data: InitData,
    verifier: Option<PublicKey>,
    simulated: bool,
    uid: String,
}

/// A question that was answered by evidence.
#[derive(Debug)]
struct Asked {
    nonce: Nonce,
    devices: Vec<String>,
    at: Instant,
}

#[derive(Debug, Default)]
struct State {
    pod: Option<Pod>,
    key: Option<EphemeralKey>,
    asked: Option<Asked>,
    lease: u64,
    /// The last lease has ended by itself: nothing runs until there is another.
    ended: bool,
}

/// How long devices stay admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Until then.
    pub until: Instant,
    number: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Attestor {
    gate: Gate,
    state: Mutex<State>,
}

impl Attestor {
    /// For a guest that nothing is known of.
    #[must_use]
    pub fn new(gate: Gate) -> Self {
        Self {
            gate,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the pod's init-data and its name, once.
    ///
    /// # Errors
    /// [`AttestError::InitData`], and a name that is too long.
    pub fn set_up(&self, raw: &[u8], uid: &str) -> Result<(), AttestError> {
        if uid.len() > POD_UID_MAX {
            return Err(AttestError::Request(format!(
                "Pod uid has {} bytes; at most {POD_UID_MAX} are allowed",
                uid.len()
            )));
        }
        let init_data = match raw {
            [] => InitData::default(),
            raw => InitData::parse(raw)?,
        };
        let pod = Pod {
            verifier: init_data.verifier()?,
            simulated: init_data.allows_simulated()?,
            init_data,
            raw: raw.to_vec(),
            uid: uid.into(),
        };
        self.state().pod.get_or_insert(pod);
        Ok(())
    }

    /// Evidence of this guest, and of devices in it, over a verifier's nonce; as JSON.
    ///
    /// # Errors
    /// [`AttestError`].
    pub async fn attest(&self, request: &AttestRequest) -> Result<Vec<u8>, AttestError> {
        let at = Instant::now();
        let nonce: [u8; 32] = request.nonce.as_slice().try_into().map_err(|_| {
            let found = request.nonce.len();
            AttestError::Request(format!("Nonce has {found} bytes, not 32"))
        })?;
        let nonce = Nonce(nonce);
        if request.devices.len() > DEVICES_MAX {
            return Err(AttestError::Request(format!(
                "More than {DEVICES_MAX} devices"
            )));
        }
        let key = self.key()?;
        let key_digest = binding::key_digest(&key);
        let (raw, uid) = {
            let state = self.state();
            let Some(pod) = &state.pod else {
                return Err(AttestError::Request("The sandbox is not set up".into()));
            };
            (pod.raw.clone(), pod.uid.clone())
        };
        let source = Source::find(&request.simulator_key)?;
        let mut gpus = Vec::with_capacity(request.devices.len());
        for id in &request.devices {
            live(id).await?;
            let nonce = binding::gpu_nonce(&nonce, &key_digest);
            let (report, certificates) = source.device(nonce, id).await?;
            gpus.push(GpuEvidence {
                device_id: id.clone(),
                report,
                certificates,
            });
        }
        let data = binding::report_data(
            &nonce,
            &key_digest,
            &gpu_digest(&gpus),
            &init_data::digest(&raw),
            &uid,
        );
        let cpu = source.report(&data).await?;
        cpu.check_init_data(&raw)?;
        let bundle = Bundle {
            tee: cpu.tee,
            report: cpu.report,
            endorsements: cpu.endorsements,
            event_log: cpu.event_log,
            gpus,
            key,
            init_data: raw,
        };
        let json = bundle.to_json()?;
        self.state().asked = Some(Asked {
            nonce,
            devices: request.devices.clone(),
            at,
        });
        Ok(json)
    }

    /// The guest gate: opens for the devices of the request if the token is good.
    ///
    /// # Errors
    /// The check that failed; what was admitted before stays until its own lease ends.
    pub async fn admit(&self, request: &AdmitDevicesRequest) -> Result<Lease, AttestError> {
        let closed = |why: String| AttestError::Closed(why);
        // A nonce counts once, whatever becomes of it.
        let asked = self.state().asked.take();
        let asked = asked.ok_or_else(|| {
            closed("no evidence was asked for that this token could answer".into())
        })?;
        if let Some(other) = request.devices.iter().find(|d| !asked.devices.contains(d)) {
            return Err(closed(format!("device {other:?} was not in the evidence")));
        }
        let claims = {
            let state = self.state();
            let pod = state.pod.as_ref();
            let pod = pod.ok_or_else(|| closed("the sandbox is not set up".into()))?;
            let (Some(verifier), Some(audience)) = (&pod.verifier, pod.init_data.audience()) else {
                return Err(closed(format!(
                    "init-data names no verifier ({} and {})",
                    init_data::VERIFIER,
                    init_data::AUDIENCE
                )));
            };
            let key = state.key.as_ref().map(EphemeralKey::public);
            let expected = Expected {
                verifiers: &[*verifier],
                audience,
                pod_uid: &pod.uid,
                confirmation: key.as_ref(),
                nonce: Some(&asked.nonce),
                init_data_digest: Some(&init_data::digest(&pod.raw)),
                now: unix_now(),
                allow_simulated: pod.simulated,
                devices: &request.devices,
            };
            token::check(&request.token, &expected)?
        };
        // The clock that the token was checked by is the host's; this one nobody sets.
        let life = claims.exp.saturating_sub(claims.iat).min(token::MAX_LIFE);
        let until = asked.at + Duration::from_secs(life);
        if until <= Instant::now() {
            return Err(closed(format!(
                "the token came more than {life} s after its evidence"
            )));
        }
        let mut devices = Vec::with_capacity(request.devices.len());
        for id in &request.devices {
            devices.push(live(id).await?);
        }
        let opened = self.gate.admit(devices);
        opened.map_err(|errno| closed(format!("the device filter was not changed: {errno}")))?;
        let mut state = self.state();
        state.lease += 1;
        state.ended = false;
        Ok(Lease {
            until,
            number: state.lease,
        })
    }

    /// Ends this lease, if it is the one that counts. Nothing runs from then on until there is another:
    /// what the host asks for is refused.
    #[must_use]
    pub fn end(&self, lease: &Lease) -> bool {
        let mut state = self.state();
        state.ended |= state.lease == lease.number;
        state.lease == lease.number
    }

    /// Whether anything may run: there was no lease, or it lasts.
    ///
    /// # Errors
    /// [`AttestError::Closed`].
    pub fn may_run(&self) -> Result<(), AttestError> {
        match self.state().ended {
            true => Err(AttestError::Closed("the pod's lease has ended".into())),
            false => Ok(()),
        }
    }

    /// Closes the gate for the devices of these ids, for all where none is named. Returns those of them
    /// that were admitted. No token counts any more that was asked for before. Idempotent.
    ///
    /// # Errors
    /// [`AttestError::Closed`] when the kernel does not take the filter back.
    pub fn close(&self, ids: &[String]) -> Result<Vec<device::Live>, AttestError> {
        let mut state = self.state();
        if ids.is_empty() {
            state.lease += 1;
        }
        state.asked = None;
        self.gate
            .close(ids)
            .map_err(|errno| AttestError::Closed(format!("the device filter stays: {errno}")))
    }

    /// The admitted device of this id.
    #[must_use]
    pub fn admitted(&self, id: &str) -> Option<device::Live> {
        self.gate.admitted(id)
    }

    /// K, made at first use.
    fn key(&self) -> Result<PublicKey, AttestError> {
        let mut state = self.state();
        if let Some(key) = &state.key {
            return Ok(key.public());
        }
        let mut random = File::open("/dev/urandom").map_err(AttestError::Key)?;
        loop {
            let mut bytes = [0; 48];
            random.read_exact(&mut bytes).map_err(AttestError::Key)?;
            // Fails once in 2^194 times.
            if let Ok(key) = EphemeralKey::from_random(&bytes) {
                let public = key.public();
                state.key = Some(key);
                return Ok(public);
            }
        }
    }
}

/// The device of this id; one that is being attached is waited for.
async fn live(id: &str) -> Result<device::Live, AttestError> {
    if !is_device_id(id) {
        let shown: String = id.chars().take(64).collect();
        return Err(AttestError::Request(format!(
            "Device {shown:?} is not named by 1 to 64 letters, digits and .:_-"
        )));
    }
    let found = uevent::until_found(|| device::find(Path::new("/sys"), id)).await;
    let found = found.map_err(|e| AttestError::Closed(format!("kernel events: {e}")))?;
    found.ok_or_else(|| {
        AttestError::Request(format!(
            "Device {id:?} did not appear in the guest within {} s",
            uevent::TIMEOUT.as_secs()
        ))
    })
}

fn unix_now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |d| d.as_secs())
}
