//! Attestation of a pod, and the host gate: a device of this host reaches a VM only after a verifier has
//! affirmed the pod, and comes back when it no longer does. The guest gate, in the agent, checks the same
//! token again before a container can open the device; it protects the pod from this host, this one
//! protects the device from the pod.
//!
//! ```text
//! create ─▶ round(cpu) ─▶ host gate ─▶ Release::attach ─▶ round(cpu, devices) ─▶ host gate ─▶ guest gate
//!                                                                                                │
//!           lost: frozen or killed, devices back ◀── refused, or no answer in time ◀── renewal ◀─┘
//! ```
//! A round is a nonce of the verifier, evidence of the guest, the verifier's word, the token checked.
//! `gate` opens, `lease` renews and loses, [`launch`] is what evidence is about, [`verifier`] who judges it, [`release`] how a device moves, [`withhold`] how one waits in the VM,
//! [`settings`] what it goes by, [`simulator`] what stands in for a TEE. What is decided is in the pod's audit log.

mod cdi;
pub mod launch;
pub mod release;
pub mod simulator;
mod verifier;
pub mod wanted;
pub mod withhold;

#[cfg(test)]
mod fake;
mod gate;
mod lease;
mod settings;
#[cfg(test)]
mod tests;

pub use gate::{Gate, Took};
pub use settings::Settings;
pub use verifier::SetupError;

use sealpod_attestation::{
    appraise::VerifierError, evidence::BundleError, init_data::InitDataError, token::TokenError,
};

use crate::{
    config::{self, Attestation},
    error::{Error, Kind, chain},
};

/// Why a pod was not affirmed, or a device not released. The first line of what containerd is told.
#[derive(Debug, thiserror::Error)]
pub enum AttestError {
    /// The node is not set up for it.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// What the guest starts with.
    #[error(transparent)]
    Launch(#[from] launch::LaunchError),
    /// The pod's init-data.
    #[error(transparent)]
    InitData(#[from] InitDataError),
    /// The simulator.
    #[error(transparent)]
    Simulator(#[from] simulator::SimulatorError),
    /// The device.
    #[error(transparent)]
    Release(#[from] release::ReleaseError),
    /// The agent.
    #[error("Guest: {0}")]
    Guest(String),
    /// What the agent sent.
    #[error("Guest sent no evidence")]
    Bundle(#[from] BundleError),
    /// The verifier.
    #[error(transparent)]
    Verifier(#[from] VerifierError),
    /// The host gate.
    #[error("Host gate: {0}")]
    Token(#[from] TokenError),
    /// The pod was affirmed once and no longer is.
    #[error("The pod lost its lease: {0}")]
    Lost(String),
    /// The pod ends.
    #[error("The pod's VM is not running")]
    Ended,
}

impl From<AttestError> for Error {
    fn from(e: AttestError) -> Self {
        Self::new(
            Kind::PermissionDenied,
            format!("OCI runtime create failed: attestation: {}", chain(&e)),
        )
    }
}

/// Makes this node's signing key if there is none, and returns its public half: what init-data names.
///
/// # Errors
/// [`SetupError`].
pub fn verifier_key(
    config: &Attestation,
) -> Result<sealpod_attestation::binding::PublicKey, SetupError> {
    Ok(*verifier::signer(&config.state_dir)?.public())
}

/// Whether this is the name of a policy.
///
/// # Errors
/// [`SetupError::UnknownPolicy`].
pub fn check_policy(config: &Attestation, name: &str) -> Result<config::Policy, SetupError> {
    verifier::policy(config, name)
}
