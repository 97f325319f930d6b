//! What a guest sends to a verifier: one bundle of the CPU's evidence, the GPUs', the guest's key and
//! its init-data. JSON; bytes are base64url without padding. The guest is not trusted: every field
//! has a cap, and an unknown field is an error.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::Sha384;

use crate::binding::{self, PublicKey};
use crate::encoding::{base64url, unbase64url};

/// Longest bundle that is read, as JSON text.
pub const MAX_BUNDLE: usize = 4 << 20;
/// Longest report or quote; some clouds pad quotes to 8000 bytes.
pub const MAX_REPORT: usize = 64 << 10;
/// Longest certificate table or chain.
pub const MAX_CERTIFICATES: usize = 128 << 10;
/// Longest event log: twice the area that firmware reserves for it.
pub const MAX_EVENT_LOG: usize = 128 << 10;
/// Most devices: eight GPUs and four switches make the largest board.
pub const MAX_GPUS: usize = 16;
/// Longest name of a device.
pub const MAX_DEVICE_ID: usize = 64;

/// Why a bundle is refused.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// Longer than any bundle.
    #[error("Evidence bundle has {0} bytes; at most {MAX_BUNDLE} are read")]
    Size(usize),
    /// Not JSON of the documented form.
    #[error("Evidence bundle is not of the documented form")]
    Form(#[from] serde_json::Error),
    /// A field beyond its cap.
    #[error("Field {field} of the evidence bundle has {found}; at most {most} are allowed")]
    Field {
        /// Its name.
        field: &'static str,
        /// Bytes, or entries.
        found: usize,
        /// The cap.
        most: usize,
    },
    /// A device name that could be mistaken for something else.
    #[error("Device {0:?} of the evidence bundle is not named by letters, digits and .:_-")]
    DeviceId(String),
    /// One device twice.
    #[error("Device {0} is in the evidence bundle twice")]
    Twice(String),
}

/// The kind of confidential guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tee {
    /// AMD SEV-SNP.
    Snp,
    /// Intel TDX.
    Tdx,
}

/// A guest's evidence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bundle {
    /// What the guest runs on.
    pub tee: Tee,
    /// Attestation report or quote.
    #[serde(with = "Base64Url")]
    pub report: Vec<u8>,
    /// What the host passed along with it: AMD's certificate table, or nothing.
    #[serde(default, with = "Base64Url")]
    pub endorsements: Vec<u8>,
    /// Confidential-computing event log, or nothing.
    #[serde(default, with = "Base64Url")]
    pub event_log: Vec<u8>,
    /// The devices in the guest.
    #[serde(default)]
    pub gpus: Vec<GpuEvidence>,
    /// K.
    pub key: PublicKey,
    /// The init-data that the guest started with, or nothing.
    #[serde(default, with = "Base64Url")]
    pub init_data: Vec<u8>,
}

/// One device's evidence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuEvidence {
    /// What the device is called in the guest, its PCI address as a rule.
    pub device_id: String,
    /// Request and response of its measurement report.
    #[serde(with = "Base64Url")]
    pub report: Vec<u8>,
    /// Its certificate chain, PEM.
    #[serde(with = "Base64Url")]
    pub certificates: Vec<u8>,
}

impl Bundle {
    /// Reads a bundle.
    ///
    /// # Errors
    /// When it is not of the documented form or a field is beyond its cap.
    pub fn from_json(bytes: &[u8]) -> Result<Self, BundleError> {
        if bytes.len() > MAX_BUNDLE {
            return Err(BundleError::Size(bytes.len()));
        }
        let bundle: Self = serde_json::from_slice(bytes)?;
        bundle.check()?;
        Ok(bundle)
    }

    /// The bundle as JSON.
    ///
    /// # Errors
    /// When a field is beyond its cap: nobody would read it.
    pub fn to_json(&self) -> Result<Vec<u8>, BundleError> {
        self.check()?;
        Ok(serde_json::to_vec(self)?)
    }

    /// SHA-384 over all fields, for the audit log and the token.
    pub fn digest(&self) -> [u8; 48] {
        let tee: &[u8] = match self.tee {
            Tee::Snp => b"snp",
            Tee::Tdx => b"tdx",
        };
        let gpus = gpu_digest(&self.gpus);
        let fields = [
            tee,
            &self.report,
            &self.endorsements,
            &self.event_log,
            &gpus,
            self.key.point(),
            &self.init_data,
        ];
        binding::transcript::<Sha384>("bundle-v1", fields).into()
    }

    fn check(&self) -> Result<(), BundleError> {
        cap("report", self.report.len(), MAX_REPORT)?;
        cap("endorsements", self.endorsements.len(), MAX_CERTIFICATES)?;
        cap("event_log", self.event_log.len(), MAX_EVENT_LOG)?;
        cap(
            "init_data",
            self.init_data.len(),
            crate::init_data::MAX_INIT_DATA,
        )?;
        cap("gpus", self.gpus.len(), MAX_GPUS)?;
        for (at, gpu) in self.gpus.iter().enumerate() {
            cap("gpus.report", gpu.report.len(), MAX_REPORT)?;
            cap(
                "gpus.certificates",
                gpu.certificates.len(),
                MAX_CERTIFICATES,
            )?;
            if !is_device_id(&gpu.device_id) {
                let shown = gpu.device_id.chars().take(MAX_DEVICE_ID).collect();
                return Err(BundleError::DeviceId(shown));
            }
            if self.gpus[..at].iter().any(|g| g.device_id == gpu.device_id) {
                return Err(BundleError::Twice(gpu.device_id.clone()));
            }
        }
        Ok(())
    }
}

fn cap(field: &'static str, found: usize, most: usize) -> Result<(), BundleError> {
    if found > most {
        return Err(BundleError::Field { field, found, most });
    }
    Ok(())
}

/// Whether a text may name a device: letters, digits and `.:_-`, 1 to 64 characters.
pub fn is_device_id(text: &str) -> bool {
    let ok = |b: u8| b.is_ascii_alphanumeric() || b".:_-".contains(&b);
    (1..=MAX_DEVICE_ID).contains(&text.len()) && text.bytes().all(ok)
}

/// H(E): SHA-384 of `gpu-evidence-v1` and each device's name, report and certificates, in their
/// order; of the tag alone where there is no device.
pub fn gpu_digest(gpus: &[GpuEvidence]) -> [u8; 48] {
    let fields = gpus
        .iter()
        .flat_map(|g| [g.device_id.as_bytes(), &g.report, &g.certificates]);
    binding::transcript::<Sha384>("gpu-evidence-v1", fields).into()
}

/// How bytes stand in JSON.
pub(crate) struct Base64Url;

impl Base64Url {
    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&base64url(bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        unbase64url(&String::deserialize(d)?).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::binding::EphemeralKey;

    fn bundle() -> Bundle {
        let gpu = |id: &str| GpuEvidence {
            device_id: id.into(),
            report: vec![1, 2],
            certificates: vec![3],
        };
        Bundle {
            tee: Tee::Snp,
            report: vec![7; 1184],
            endorsements: vec![],
            event_log: vec![],
            gpus: vec![gpu("0000:01:00.0"), gpu("0000:02:00.0")],
            key: EphemeralKey::from_random(&[1; 48]).unwrap().public(),
            init_data: b"x".to_vec(),
        }
    }

    #[test]
    fn a_bundle_survives_the_round_trip() {
        let json = bundle().to_json().unwrap();
        assert_eq!(Bundle::from_json(&json).unwrap(), bundle());
    }

    #[test]
    fn fields_beyond_their_cap_unknown_fields_and_doubtful_names_are_refused() {
        let mut long = bundle();
        long.report = vec![0; MAX_REPORT + 1];
        assert!(matches!(
            Bundle::from_json(&serde_json::to_vec(&long).unwrap()),
            Err(BundleError::Field {
                field: "report",
                ..
            })
        ));
        let mut twice = bundle();
        twice.gpus[1].device_id = twice.gpus[0].device_id.clone();
        assert!(matches!(twice.to_json(), Err(BundleError::Twice(_))));
        let mut odd = bundle();
        odd.gpus[0].device_id = "../x".into();
        assert!(matches!(odd.to_json(), Err(BundleError::DeviceId(_))));
        let mut many = bundle();
        many.gpus = vec![bundle().gpus.remove(0); MAX_GPUS + 1];
        assert!(matches!(
            many.to_json(),
            Err(BundleError::Field { field: "gpus", .. })
        ));
        let text = String::from_utf8(bundle().to_json().unwrap()).unwrap();
        assert!(Bundle::from_json(text.replacen('{', r#"{"more":1,"#, 1).as_bytes()).is_err());
        assert!(matches!(
            Bundle::from_json(&vec![b' '; MAX_BUNDLE + 1]),
            Err(BundleError::Size(_))
        ));
    }

    #[test]
    fn the_digests_depend_on_every_field() {
        let mut digests = vec![bundle().digest()];
        let change = [
            |b: &mut Bundle| b.tee = Tee::Tdx,
            |b: &mut Bundle| b.report[0] = 1,
            |b: &mut Bundle| b.endorsements.push(0),
            |b: &mut Bundle| b.event_log.push(0),
            |b: &mut Bundle| b.gpus.swap(0, 1),
            |b: &mut Bundle| b.gpus[0].report.push(0),
            |b: &mut Bundle| b.gpus[1].certificates.clear(),
            |b: &mut Bundle| b.key = EphemeralKey::from_random(&[2; 48]).unwrap().public(),
            |b: &mut Bundle| b.init_data.clear(),
        ];
        for change in change {
            let mut other = bundle();
            change(&mut other);
            digests.push(other.digest());
        }
        let count = digests.len();
        digests.sort_unstable();
        digests.dedup();
        assert_eq!(digests.len(), count);
    }
}
