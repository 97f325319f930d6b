//! What a pod is attested by: decided once, when its VM starts, from the node's configuration and the pod's
//! wishes.

use std::path::Path;

use oci_spec::runtime::Spec;
use sealpod_attestation::init_data::InitData;

use super::{
    AttestError,
    launch::{self, Launch, Predicted},
    simulator::Simulator,
    wanted::{self, Wanted, WantedError},
};
use crate::{
    annotations::Name,
    config::{self, Attestation},
};

/// What a pod is attested by. Fixed when its VM starts.
#[derive(Debug)]
pub struct Settings {
    pub(super) config: Attestation,
    allow: Vec<Name>,
    pub(super) policy: config::Policy,
    /// The pod has to be affirmed even if it wants no device.
    pub(super) required: bool,
    /// Init-data says whom the guest believes.
    pub(super) names_verifier: bool,
    /// By which the verifier knows the pod.
    pub pod_uid: String,
    /// Raw.
    pub init_data: Vec<u8>,
    pub(super) simulator: Option<Simulator>,
    /// What a confidential guest will say of itself.
    pub(super) predicted: Option<Predicted>,
    pub(super) log_name: String,
}

impl Settings {
    /// Decides them, and starts the simulator where the configuration has one, in the pod's folder `dir`.
    ///
    /// # Errors
    /// What is wrong with the configuration or the pod's wishes.
    pub fn new(
        node: &config::Config,
        policy: Option<&str>,
        init_data: Option<Vec<u8>>,
        (namespace, id, uid): (&str, &str, Option<&str>),
        dir: &Path,
        launch: Launch,
    ) -> Result<Self, AttestError> {
        let config = &node.attestation;
        let named = policy.unwrap_or(config::DEFAULT_POLICY);
        let simulated = !config.simulator.as_os_str().is_empty();
        let required = policy.is_some();
        let policy = super::check_policy(config, named)?;
        let init_data = match init_data {
            Some(raw) => {
                InitData::parse(&raw)?;
                raw
            }
            None if !config.is_configured() && !required => Vec::new(),
            None if config.verifier.is_empty() => {
                let key = super::verifier_key(config)?;
                launch::default_init_data(&key, &config.audience, simulated)
            }
            // Whom to believe only the pod's owner can say.
            None => Vec::new(),
        };
        // A guest that would never be affirmed is not started.
        let predicted = match required || config.is_configured() {
            true => launch.predicted()?,
            false => None,
        };
        if config.verifier.is_empty() {
            super::verifier::check_launch(&policy, predicted.as_ref())?;
        }
        let simulator = match simulated {
            true => Some(Simulator::start(
                dir,
                (&config.simulator, config.simulator_tee),
                &config.simulator_defect,
                launch,
                &init_data,
            )?),
            false => None,
        };
        let named = match init_data.as_slice() {
            [] => None,
            raw => InitData::parse(raw)?.verifier()?,
        };
        let pod_uid = uid.map_or_else(|| format!("{namespace}/{id}"), str::to_owned);
        Ok(Self {
            config: config.clone(),
            allow: node.annotations.allow.clone(),
            policy,
            required,
            names_verifier: named.is_some(),
            pod_uid,
            init_data,
            simulator,
            predicted,
            log_name: format!("{namespace}-{id}"),
        })
    }

    /// Takes the devices that a container of the pod asks for out of its specification.
    ///
    /// # Errors
    /// [`WantedError`], naming the device.
    pub fn wanted(&self, spec: &mut Spec) -> Result<Vec<Wanted>, WantedError> {
        wanted::take(spec, &self.allow, &self.config)
    }
}
