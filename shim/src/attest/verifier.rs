//! Who appraises: the shim itself, over files of this node, or a verifier elsewhere. Both are one trait;
//! which keys the host gate believes is decided here.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use sealpod_attestation::{
    Collateral, TrustAnchors,
    appraise::{Appraisal, Embedded, Inputs, Request, Verifier, VerifierError},
    audit::{AuditLog, Record},
    binding::{Nonce, PublicKey},
    evidence::Bundle,
    policy::{Policy, PolicyError},
    reference::ReferenceValues,
    remote::{Remote, read_pin},
    signer::{Signer, SignerError},
};

use super::launch::{LaunchError, Predicted};
use crate::{
    clock,
    config::{self, Attestation},
};

/// Name of the signing key in [`Attestation::state_dir`].
const KEY_FILE: &str = "verifier.key";
/// Its public half, for init-data and for who reads the audit logs.
const PUBLIC_FILE: &str = "verifier.jwk";
/// Folder of the audit logs there.
const AUDIT_DIR: &str = "audit";
/// Largest file that is read, bytes.
const SIZE_MAX: u64 = 8 << 20;
/// Who signs the tokens of this node.
const ISSUER: &str = "sealpod";

/// A verifier that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A file.
    #[error("Attestation: {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file that holds something else.
    #[error("Attestation: {path} cannot be used")]
    Content {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What the guest starts with.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The signing key.
    #[error("Attestation: signing key")]
    Key(#[from] SignerError),
    /// The built-in policy.
    #[error("Attestation: policy")]
    Policy(#[from] PolicyError),
    /// The pod's policy.
    #[error("Attestation policy {name:?} is not one of [attestation.policies], which has: {known}")]
    UnknownPolicy {
        /// As the pod names it.
        name: String,
        /// All others.
        known: String,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SetupError {
    let path = path.to_owned();
    move |source| SetupError::File {
        action,
        path,
        source,
    }
}

fn wrong<E>(path: &Path) -> impl FnOnce(E) -> SetupError
where
    E: std::error::Error + Send + Sync + 'static,
{
    let path = path.to_owned();
    move |source| SetupError::Content {
        path,
        source: Box::new(source),
    }
}

/// The policy of this name.
///
/// # Errors
/// [`SetupError::UnknownPolicy`]. The default needs no entry.
pub(super) fn policy(config: &Attestation, name: &str) -> Result<config::Policy, SetupError> {
    match config.policies.get(name) {
        Some(policy) => Ok(policy.clone()),
        None if name == config::DEFAULT_POLICY => Ok(config::Policy::default()),
        None => {
            let mut known: Vec<_> = config.policies.keys().map(String::as_str).collect();
            if !known.contains(&config::DEFAULT_POLICY) {
                known.push(config::DEFAULT_POLICY);
            }
            Err(SetupError::UnknownPolicy {
                name: name.into(),
                known: known.join(", "),
            })
        }
    }
}

/// The verifier of one pod.
pub(super) enum Appraiser {
    /// The shim itself.
    Embedded {
        verifier: Box<Embedded>,
        config: Box<Attestation>,
        policy: config::Policy,
        predicted: Option<Predicted>,
    },
    /// Elsewhere. What this shim decides stands in its own log all the same.
    Remote {
        verifier: Box<Remote>,
        audit: AuditLog,
    },
}

impl Appraiser {
    /// Opens the pod's audit log, and reads everything else anew.
    pub(super) fn new(
        config: &Attestation,
        policy: &config::Policy,
        predicted: Option<Predicted>,
        log_name: &str,
    ) -> Result<Self, SetupError> {
        let signer = Arc::new(signer(&config.state_dir)?);
        let folder = config.state_dir.join(AUDIT_DIR);
        make_private(&folder)?;
        let path = folder.join(format!("{log_name}.jsonl"));
        let audit = AuditLog::open(&path, Arc::clone(&signer)).map_err(wrong(&path))?;
        if config.verifier.is_empty() {
            let inputs = inputs(config, policy, predicted.as_ref())?;
            let verifier = Embedded::new(inputs, signer, Some(audit), ISSUER);
            return Ok(Self::Embedded {
                verifier: Box::new(verifier),
                config: Box::new(config.clone()),
                policy: policy.clone(),
                predicted,
            });
        }
        let path = &config.verifier_trust;
        let text = String::from_utf8_lossy(&read(path)?).into_owned();
        let pin = read_pin(&text).map_err(wrong(path))?;
        let remote = Remote::new(&config.verifier, pin, Vec::new()).map_err(wrong(path))?;
        Ok(Self::Remote {
            verifier: Box::new(remote),
            audit,
        })
    }

    /// A nonce for the pod. What is decided by is read again: a changed policy or reference value counts
    /// from the next question on.
    pub(super) fn challenge(&mut self, pod_uid: &str) -> Result<Nonce, VerifierError> {
        match self {
            Self::Embedded {
                verifier,
                config,
                policy,
                predicted,
            } => {
                let inputs = inputs(config, policy, predicted.as_ref());
                let inputs = inputs.map_err(|e| VerifierError::Remote(crate::error::chain(&e)))?;
                verifier.replace(inputs);
                Ok(verifier.challenge(pod_uid, unix_now())?.nonce)
            }
            Self::Remote { verifier, .. } => {
                if verifier.keys().is_empty() {
                    let keys = verifier.fetch_keys();
                    keys.map_err(|e| VerifierError::Remote(crate::error::chain(&e)))?;
                }
                Ok(verifier.challenge(pod_uid, unix_now())?.nonce)
            }
        }
    }

    /// The verifier's word on evidence.
    pub(super) fn appraise(
        &self,
        nonce: Nonce,
        pod_uid: &str,
        audience: &str,
        bundle: &Bundle,
    ) -> Result<Appraisal, VerifierError> {
        let request = Request {
            nonce,
            pod_uid,
            audience,
            bundle,
        };
        self.verifier().appraise(&request, unix_now())
    }

    /// Whose tokens the host gate believes.
    pub(super) fn keys(&self) -> Vec<PublicKey> {
        self.verifier().keys()
    }

    fn verifier(&self) -> &dyn Verifier {
        match self {
            Self::Embedded { verifier, .. } => verifier.as_ref(),
            Self::Remote { verifier, .. } => verifier.as_ref(),
        }
    }

    /// Writes to the pod's audit log.
    pub(super) fn record(&self, record: Record) -> Result<(), VerifierError> {
        match self {
            Self::Embedded { verifier, .. } => Ok(verifier.record(record)?),
            Self::Remote { audit, .. } => Ok(audit.append(record)?),
        }
    }
}

/// Seconds since 1970.
pub(super) fn unix_now() -> u64 {
    u64::try_from(clock::unix_ns() / 1_000_000_000).unwrap_or(0)
}

/// The policy's reference values, narrowed to what the guest will say of itself.
fn references(
    policy: &config::Policy,
    predicted: Option<&Predicted>,
) -> Result<ReferenceValues, SetupError> {
    let path = &policy.reference_values;
    let mut references = match path.as_os_str().is_empty() {
        true => ReferenceValues::default(),
        false => {
            let text = String::from_utf8_lossy(&read(path)?).into_owned();
            ReferenceValues::parse(&text).map_err(wrong(path))?
        }
    };
    if let Some(predicted) = predicted {
        predicted.narrow(&mut references)?;
    }
    Ok(references)
}

/// Whether a guest that will say this of itself can be affirmed at all.
///
/// # Errors
/// [`SetupError::Launch`].
pub(super) fn check_launch(
    policy: &config::Policy,
    predicted: Option<&Predicted>,
) -> Result<(), SetupError> {
    predicted.map_or(Ok(()), |p| references(policy, Some(p)).map(drop))
}

/// What the embedded verifier decides by.
fn inputs(
    config: &Attestation,
    policy: &config::Policy,
    predicted: Option<&Predicted>,
) -> Result<Inputs, SetupError> {
    let text = |path: &Path| read(path).map(|b| String::from_utf8_lossy(&b).into_owned());
    let named = |path: &Path| !path.as_os_str().is_empty();
    let anchors = if named(&config.anchors) {
        let path = &config.anchors;
        TrustAnchors::from_file_text(&text(path)?).map_err(wrong(path))?
    } else {
        TrustAnchors::production()
    };
    let mut collateral = Collateral::default();
    if named(&config.collateral) {
        for path in files(&config.collateral)? {
            collateral.add(&read(&path)?).map_err(wrong(&path))?;
        }
    }
    let references = references(policy, predicted)?;
    let rules = if named(&policy.rego) {
        let path = &policy.rego;
        Policy::from_rego(&text(path)?).map_err(wrong(path))?
    } else {
        Policy::built_in()?
    };
    Ok(Inputs {
        // Somebody has named them.
        allow_simulated: anchors.simulated,
        anchors,
        collateral,
        references,
        policy: rules,
    })
}

/// The files of a folder, sorted.
fn files(folder: &Path) -> Result<Vec<PathBuf>, SetupError> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed("read", folder))? {
        let path = entry.map_err(failed("read", folder))?.path();
        if path.is_file() {
            all.push(path);
        }
    }
    all.sort();
    Ok(all)
}

fn read(path: &Path) -> Result<Vec<u8>, SetupError> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|f| f.take(SIZE_MAX + 1).read_to_end(&mut bytes));
    read.map_err(failed("read", path))?;
    if bytes.len() as u64 > SIZE_MAX {
        let long = io::Error::other(format!("larger than {SIZE_MAX} bytes"));
        return Err(failed("read", path)(long));
    }
    Ok(bytes)
}

fn make_private(folder: &Path) -> Result<(), SetupError> {
    let mut builder = fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(folder);
    made.map_err(failed("make", folder))
}

/// The signing key of this node, made at first use. Several shims may come here at once: one's key wins.
pub(super) fn signer(state_dir: &Path) -> Result<Signer, SetupError> {
    let path = state_dir.join(KEY_FILE);
    if !path.exists() {
        make_private(state_dir)?;
        let part = state_dir.join(format!("{KEY_FILE}.{}", std::process::id()));
        let key = Signer::generate()?.to_pkcs8()?;
        let written = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&part)
            .and_then(|mut f| f.write_all(&key).and_then(|()| f.sync_all()));
        written.map_err(failed("write", &part))?;
        let linked = fs::hard_link(&part, &path);
        let _ = fs::remove_file(&part);
        match linked {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed("write", &path)(e));
            }
            _ => {}
        }
    }
    let signer = Signer::from_pkcs8(&read(&path)?).map_err(wrong(&path))?;
    let public = state_dir.join(PUBLIC_FILE);
    if !public.exists() {
        let jwk = serde_json::to_vec(signer.public()).map_err(wrong(&public))?;
        fs::write(&public, jwk).map_err(failed("write", &public))?;
    }
    Ok(signer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_signing_key_is_made_once_and_is_the_owners_alone() {
        let dir = tempfile::tempdir().expect("folder");
        let first = signer(dir.path()).expect("key");
        let again = signer(dir.path()).expect("key");
        assert_eq!(first.public(), again.public());
        let meta = fs::metadata(dir.path().join(KEY_FILE)).expect("file");
        assert_eq!(meta.permissions().mode() & 0o777, 0o600);
        let left = fs::read_dir(dir.path()).expect("folder").count();
        // The key, and its public half.
        assert_eq!(left, 2);
    }

    #[test]
    fn a_policy_that_is_not_there_is_named_with_those_that_are() {
        let mut config = Attestation::default();
        config
            .policies
            .insert("gpu".into(), config::Policy::default());
        assert!(policy(&config, "default").is_ok());
        let e = policy(&config, "gpus").expect_err("unknown").to_string();
        assert!(e.contains("\"gpus\"") && e.contains("gpu, default"), "{e}");
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("anchors.json");
        fs::write(&path, "{}x").expect("file");
        let config = Attestation {
            anchors: path,
            ..Attestation::default()
        };
        let e = inputs(&config, &config::Policy::default(), None).expect_err("broken");
        assert!(crate::error::chain(&e).contains("anchors.json"));
    }
}
