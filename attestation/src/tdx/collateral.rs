//! Intel's collateral for quotes: TCB info, QE identity, CRLs and their issuers, in the JSON form
//! that Intel's quote provider library and most tools exchange. The signed parts stay the exact
//! text that was signed.

use serde::Deserialize;

use super::tcb::TcbStatus;
use crate::encoding::{self, EncodingError};
use crate::time::Timestamp;

/// TCB info lists some tens of levels.
const MAX_LEVELS: usize = 512;

/// Why collateral cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// Not the JSON that was expected.
    #[error("TDX collateral is not of the expected JSON form")]
    Json(#[from] serde_json::Error),
    /// A field that is text of bytes is not.
    #[error("Field {0} cannot be decoded")]
    Field(&'static str, #[source] EncodingError),
    /// More levels than anybody lists.
    #[error("TDX collateral lists more than {MAX_LEVELS} TCB levels")]
    Levels,
}

#[derive(Deserialize)]
struct BundleText {
    pck_crl_issuer_chain: String,
    root_ca_crl: String,
    pck_crl: String,
    tcb_info_issuer_chain: String,
    tcb_info: String,
    tcb_info_signature: String,
    qe_identity_issuer_chain: String,
    qe_identity: String,
    qe_identity_signature: String,
}

/// One bundle of collateral for the platforms of one FMSPC.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// Issuer chain of the PCK CRL, DER.
    pub pck_crl_issuer_chain: Vec<Vec<u8>>,
    /// The root CA's CRL, DER.
    pub root_ca_crl: Vec<u8>,
    /// The PCK CA's CRL, DER.
    pub pck_crl: Vec<u8>,
    /// Issuer chain of the TCB info, DER.
    pub tcb_info_issuer_chain: Vec<Vec<u8>>,
    /// The signed text.
    pub tcb_info_text: String,
    /// `r ‖ s`.
    pub tcb_info_signature: Vec<u8>,
    /// The same, decoded.
    pub tcb_info: TcbInfo,
    /// Issuer chain of the QE identity, DER.
    pub qe_identity_issuer_chain: Vec<Vec<u8>>,
    /// The signed text.
    pub qe_identity_text: String,
    /// `r ‖ s`.
    pub qe_identity_signature: Vec<u8>,
    /// The same, decoded.
    pub qe_identity: QeIdentity,
}

/// TCB info, version 3 (Intel PCS API, Get TDX TCB Info).
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the names are those of the API")]
pub struct TcbInfo {
    pub id: String,
    pub version: u32,
    #[serde(deserialize_with = "time")]
    pub issue_date: Timestamp,
    #[serde(deserialize_with = "time")]
    pub next_update: Timestamp,
    #[serde(deserialize_with = "bytes")]
    pub fmspc: [u8; 6],
    #[serde(deserialize_with = "bytes")]
    pub pce_id: [u8; 2],
    pub tcb_type: u32,
    pub tcb_evaluation_data_number: u32,
    pub tdx_module: Option<TdxModule>,
    #[serde(default)]
    pub tdx_module_identities: Vec<TdxModuleIdentity>,
    pub tcb_levels: Vec<PlatformLevel>,
}

/// Who signed the TDX module, and with which attributes.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TdxModule {
    #[serde(deserialize_with = "bytes")]
    pub mrsigner: [u8; 48],
    #[serde(deserialize_with = "bytes")]
    pub attributes: [u8; 8],
    #[serde(deserialize_with = "bytes")]
    pub attributes_mask: [u8; 8],
}

/// A major version of the TDX module and its levels.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TdxModuleIdentity {
    pub id: String,
    #[serde(flatten)]
    pub module: TdxModule,
    pub tcb_levels: Vec<IsvLevel>,
}

/// A level of one security version number.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IsvLevel {
    pub tcb: IsvSvn,
    #[serde(deserialize_with = "time")]
    pub tcb_date: Timestamp,
    pub tcb_status: TcbStatus,
    #[serde(rename = "advisoryIDs", default)]
    pub advisory_ids: Vec<String>,
}

/// Its number.
#[derive(Clone, Debug, Deserialize)]
pub struct IsvSvn {
    pub isvsvn: u16,
}

/// A level of a whole platform.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlatformLevel {
    pub tcb: PlatformSvns,
    #[serde(deserialize_with = "time")]
    pub tcb_date: Timestamp,
    pub tcb_status: TcbStatus,
    #[serde(rename = "advisoryIDs", default)]
    pub advisory_ids: Vec<String>,
}

/// Its numbers.
#[derive(Clone, Debug, Deserialize)]
pub struct PlatformSvns {
    #[serde(rename = "sgxtcbcomponents", deserialize_with = "components")]
    pub sgx: [u8; 16],
    pub pcesvn: u16,
    #[serde(rename = "tdxtcbcomponents", deserialize_with = "components")]
    pub tdx: [u8; 16],
}

/// Identity of the quoting enclave, version 2 (Intel PCS API, Get TDX QE Identity).
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the names are those of the API")]
pub struct QeIdentity {
    pub id: String,
    pub version: u32,
    #[serde(deserialize_with = "time")]
    pub issue_date: Timestamp,
    #[serde(deserialize_with = "time")]
    pub next_update: Timestamp,
    pub tcb_evaluation_data_number: u32,
    #[serde(deserialize_with = "bytes")]
    pub miscselect: [u8; 4],
    #[serde(deserialize_with = "bytes")]
    pub miscselect_mask: [u8; 4],
    #[serde(deserialize_with = "bytes")]
    pub attributes: [u8; 16],
    #[serde(deserialize_with = "bytes")]
    pub attributes_mask: [u8; 16],
    #[serde(deserialize_with = "bytes")]
    pub mrsigner: [u8; 32],
    pub isvprodid: u16,
    pub tcb_levels: Vec<IsvLevel>,
}

impl Bundle {
    /// Reads a bundle. What it says is not believed before its signatures have been verified.
    ///
    /// # Errors
    /// When it is not of the expected form.
    pub fn parse(text: &str) -> Result<Self, BundleError> {
        let t: BundleText = serde_json::from_str(text)?;
        let chain = |pem: &str, field| {
            let blocks = encoding::pem_blocks(pem).map_err(|e| BundleError::Field(field, e))?;
            Ok::<_, BundleError>(blocks.into_iter().map(|b| b.1).collect::<Vec<_>>())
        };
        let hex = |text: &str, field| {
            encoding::unhex(text.trim()).map_err(|e| BundleError::Field(field, e))
        };
        let tcb_info: TcbInfo = serde_json::from_str(&t.tcb_info)?;
        let qe_identity: QeIdentity = serde_json::from_str(&t.qe_identity)?;
        let modules = tcb_info
            .tdx_module_identities
            .iter()
            .map(|i| i.tcb_levels.len())
            .sum::<usize>();
        if tcb_info.tcb_levels.len() + modules + qe_identity.tcb_levels.len() > MAX_LEVELS {
            return Err(BundleError::Levels);
        }
        Ok(Self {
            pck_crl_issuer_chain: chain(&t.pck_crl_issuer_chain, "pck_crl_issuer_chain")?,
            root_ca_crl: crl(&t.root_ca_crl, "root_ca_crl")?,
            pck_crl: crl(&t.pck_crl, "pck_crl")?,
            tcb_info_issuer_chain: chain(&t.tcb_info_issuer_chain, "tcb_info_issuer_chain")?,
            tcb_info_signature: hex(&t.tcb_info_signature, "tcb_info_signature")?,
            tcb_info_text: t.tcb_info,
            tcb_info,
            qe_identity_issuer_chain: chain(
                &t.qe_identity_issuer_chain,
                "qe_identity_issuer_chain",
            )?,
            qe_identity_signature: hex(&t.qe_identity_signature, "qe_identity_signature")?,
            qe_identity_text: t.qe_identity,
            qe_identity,
        })
    }

    /// Whether both signed parts are current at `now`.
    pub fn is_current(&self, now: Timestamp) -> bool {
        let within = |from: Timestamp, to: Timestamp| from <= now && now <= to;
        within(self.tcb_info.issue_date, self.tcb_info.next_update)
            && within(self.qe_identity.issue_date, self.qe_identity.next_update)
    }
}

/// A CRL as hexadecimal DER, PEM, or base64 DER: tools differ.
fn crl(text: &str, field: &'static str) -> Result<Vec<u8>, BundleError> {
    if text.contains("-----BEGIN ") {
        let blocks = encoding::pem_blocks(text).map_err(|e| BundleError::Field(field, e))?;
        return match <[encoding::PemBlock; 1]>::try_from(blocks) {
            Ok([(_, der)]) => Ok(der),
            Err(_) => Err(BundleError::Field(
                field,
                EncodingError::Pem("not exactly one block"),
            )),
        };
    }
    encoding::unhex(text.trim())
        .or_else(|_| encoding::unbase64(text))
        .map_err(|e| BundleError::Field(field, e))
}

fn bytes<'de, D: serde::Deserializer<'de>, const N: usize>(d: D) -> Result<[u8; N], D::Error> {
    encoding::unhex_array(&String::deserialize(d)?).map_err(serde::de::Error::custom)
}

fn time<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Timestamp, D::Error> {
    String::deserialize(d)?
        .parse()
        .map_err(serde::de::Error::custom)
}

fn components<'de, D: serde::Deserializer<'de>>(d: D) -> Result<[u8; 16], D::Error> {
    #[derive(Deserialize)]
    struct Component {
        svn: u8,
    }
    let list: [Component; 16] = Deserialize::deserialize(d)?;
    Ok(list.map(|c| c.svn))
}
