//! Reference values and limits: the file that says what evidence is compared with. Every value is
//! hexadecimal and of exact length; an unknown key is an error.

use serde::{Deserialize, Serialize};

use crate::encoding::{EncodingError, unhex_array};
use crate::nvidia::{NvidiaLimits, NvidiaPolicy};
use crate::snp::{SnpLimits, SnpPolicy};
use crate::tdx::{TdxLimits, TdxPolicy};

/// Why a file of reference values is refused.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// Not JSON of the documented form.
    #[error("Reference values are not of the documented form")]
    Form(#[from] serde_json::Error),
    /// A value of another length or not hexadecimal.
    #[error("Reference value {key} is not {bytes} bytes in hexadecimal")]
    Value {
        /// The key it stands under.
        key: &'static str,
        /// The length it must have.
        bytes: usize,
        /// What is wrong with it.
        source: EncodingError,
    },
}

/// The file.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReferenceValues {
    /// For SEV-SNP reports.
    pub snp: SnpReference,
    /// For TDX quotes.
    pub tdx: TdxReference,
    /// For GPU and NVSwitch reports.
    pub nvidia: NvidiaLimits,
}

/// Reference values for SEV-SNP reports.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SnpReference {
    /// MEASUREMENT: one of these.
    pub measurement: Vec<String>,
    /// HOST_DATA.
    pub host_data: Option<String>,
    /// Digest of the ID block's key.
    pub id_key_digest: Option<String>,
    /// Digest of the author key.
    pub author_key_digest: Option<String>,
    /// Chips that are allowed; all if empty.
    pub chip_ids: Vec<String>,
    /// Limits.
    pub limits: SnpLimits,
}

/// Reference values for TDX quotes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TdxReference {
    /// MRTD: one of these.
    pub mr_td: Vec<String>,
    /// RTMR0: one of these.
    pub rtmr0: Vec<String>,
    /// RTMR1: one of these.
    pub rtmr1: Vec<String>,
    /// RTMR2: one of these.
    pub rtmr2: Vec<String>,
    /// RTMR3: one of these.
    pub rtmr3: Vec<String>,
    /// MRCONFIGID.
    pub mr_config_id: Option<String>,
    /// MROWNER.
    pub mr_owner: Option<String>,
    /// MROWNERCONFIG.
    pub mr_owner_config: Option<String>,
    /// Platforms (PPID) that are allowed; all if empty.
    pub ppids: Vec<String>,
    /// Limits.
    pub limits: TdxLimits,
}

impl ReferenceValues {
    /// Reads a file.
    ///
    /// # Errors
    /// When it is not of the documented form. Values are checked when a policy is made of them.
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        let values: Self = serde_json::from_str(text)?;
        values.snp_policy()?;
        values.tdx_policy()?;
        Ok(values)
    }

    /// The policy for SEV-SNP reports.
    ///
    /// # Errors
    /// When a value is not of its length.
    pub fn snp_policy(&self) -> Result<SnpPolicy, ReferenceError> {
        let r = &self.snp;
        Ok(SnpPolicy {
            report_data: None,
            host_data: maybe("snp.host_data", r.host_data.as_ref())?,
            measurements: list("snp.measurement", &r.measurement)?,
            id_key_digest: maybe("snp.id_key_digest", r.id_key_digest.as_ref())?,
            author_key_digest: maybe("snp.author_key_digest", r.author_key_digest.as_ref())?,
            chip_ids: list("snp.chip_ids", &r.chip_ids)?,
            limits: r.limits.clone(),
        })
    }

    /// The policy for TDX quotes.
    ///
    /// # Errors
    /// When a value is not of its length.
    pub fn tdx_policy(&self) -> Result<TdxPolicy, ReferenceError> {
        let r = &self.tdx;
        Ok(TdxPolicy {
            report_data: None,
            mr_config_id: maybe("tdx.mr_config_id", r.mr_config_id.as_ref())?,
            mr_owner: maybe("tdx.mr_owner", r.mr_owner.as_ref())?,
            mr_owner_config: maybe("tdx.mr_owner_config", r.mr_owner_config.as_ref())?,
            mr_td: list("tdx.mr_td", &r.mr_td)?,
            rtmr: [
                list("tdx.rtmr0", &r.rtmr0)?,
                list("tdx.rtmr1", &r.rtmr1)?,
                list("tdx.rtmr2", &r.rtmr2)?,
                list("tdx.rtmr3", &r.rtmr3)?,
            ],
            ppids: list("tdx.ppids", &r.ppids)?,
            limits: r.limits.clone(),
        })
    }

    /// The policy for GPU and NVSwitch reports.
    pub fn nvidia_policy(&self) -> NvidiaPolicy {
        NvidiaPolicy {
            nonce: None,
            limits: self.nvidia.clone(),
        }
    }
}

fn value<const N: usize>(key: &'static str, text: &str) -> Result<[u8; N], ReferenceError> {
    unhex_array(text).map_err(|source| ReferenceError::Value {
        key,
        bytes: N,
        source,
    })
}

fn maybe<const N: usize>(
    key: &'static str,
    text: Option<&String>,
) -> Result<Option<[u8; N]>, ReferenceError> {
    text.map(|t| value(key, t)).transpose()
}

fn list<const N: usize>(
    key: &'static str,
    texts: &[String],
) -> Result<Vec<[u8; N]>, ReferenceError> {
    texts.iter().map(|t| value(key, t)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_another_length_and_unknown_keys_are_refused() {
        assert!(ReferenceValues::parse(r#"{"snp":{"measurement":["00"]}}"#).is_err());
        assert!(ReferenceValues::parse(r#"{"snp":{"measurment":[]}}"#).is_err());
        assert!(ReferenceValues::parse(r#"{"tdx":{"limits":{"tcb_statuses":["Fine"]}}}"#).is_err());
        let text = format!(
            r#"{{"snp":{{"measurement":["{}"],"limits":{{"minimum_tcb":{{"snp":8}}}}}}}}"#,
            "ab".repeat(48)
        );
        let policy = ReferenceValues::parse(&text).unwrap().snp_policy().unwrap();
        assert_eq!(policy.measurements, [[0xab; 48]]);
        assert_eq!(policy.limits.minimum_tcb.unwrap().snp, 8);
    }

    #[test]
    fn an_empty_file_keeps_the_strict_defaults() {
        let values = ReferenceValues::parse("{}").unwrap();
        assert!(!values.snp_policy().unwrap().limits.allow_debug);
        assert_eq!(
            values.tdx_policy().unwrap().limits.tcb_statuses,
            [crate::tdx::TcbStatus::UpToDate]
        );
    }
}
