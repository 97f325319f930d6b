//! The quote, byte by byte (Intel TDX DCAP Quoting Library API, appendix A.3 and A.4): versions 4
//! and 5, and all TD bodies.

use crate::encoding::hex;

/// Quotes are about 5 KB; clouds pad them to 8.
const MAX_QUOTE: usize = 64 << 10;
const HEADER: usize = 48;
const BODY_1_0: usize = 584;
const BODY_1_5: usize = 648;
const BODY_1_5_EX: usize = 885;
const ENCLAVE_REPORT: usize = 384;
const TEE_TDX: u32 = 0x81;
const KEY_ECDSA_P256: u16 = 2;
/// 939A7233-F79C-4CA9-940A-0DB3957F0607, Intel's quoting enclave.
const INTEL_QE_VENDOR: [u8; 16] = [
    0x93, 0x9a, 0x72, 0x33, 0xf7, 0x9c, 0x4c, 0xa9, 0x94, 0x0a, 0x0d, 0xb3, 0x95, 0x7f, 0x06, 0x07,
];
const CERT_DATA_QE_REPORT: u16 = 6;
const CERT_DATA_PCK_CHAIN: u16 = 5;

/// Why bytes are not a TDX quote that can be verified.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum QuoteError {
    /// Longer than any quote.
    #[error("Quote has {0} bytes; at most {MAX_QUOTE} are read")]
    TooLong(usize),
    /// It ends early.
    #[error("Quote ends within {0}")]
    Truncated(&'static str),
    /// A version nobody here knows.
    #[error("Quote version {0} is not supported; known are 4 and 5")]
    Version(u16),
    /// Another kind of enclave or machine.
    #[error("Quote is of TEE type 0x{0:x}, not of a TD (0x81)")]
    TeeType(u32),
    /// Another attestation key.
    #[error("Attestation key type {0} is not supported; known is 2 (ECDSA P-256)")]
    KeyType(u16),
    /// Another quoting enclave.
    #[error("Quoting enclave's vendor {0} is not Intel")]
    Vendor(String),
    /// A body nobody here knows.
    #[error(
        "TD body type {0} of {1} bytes is not supported; known are 2 (584), 3 (648) and 4 (885)"
    )]
    Body(u16, u32),
    /// Another kind of certification data.
    #[error("Certification data type {0} is not supported; known is 6 with 5 (PCK chain) in it")]
    CertData(u16),
    /// A length that does not fit its contents.
    #[error("{0} is longer than what it holds")]
    Slack(&'static str),
    /// The PCK chain is not text.
    #[error("PCK certificate chain is not PEM text")]
    ChainText,
}

/// The measurements and attributes of a TD.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of the specification")]
pub struct TdBody {
    pub tee_tcb_svn: [u8; 16],
    pub mr_seam: [u8; 48],
    pub mr_signer_seam: [u8; 48],
    pub seam_attributes: [u8; 8],
    pub td_attributes: u64,
    pub xfam: u64,
    pub mr_td: [u8; 48],
    pub mr_config_id: [u8; 48],
    pub mr_owner: [u8; 48],
    pub mr_owner_config: [u8; 48],
    pub rtmr: [[u8; 48]; 4],
    pub report_data: [u8; 64],
    /// TD 1.5: the current TCB and the measurement of service TDs.
    pub v1_5: Option<([u8; 16], [u8; 48])>,
    /// TD 1.5ex: what follows the 1.5 body, 237 bytes.
    pub v1_5_ex: Option<Vec<u8>>,
}

/// An SGX enclave report, as the quoting enclave's is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of the specification")]
pub struct EnclaveReport {
    pub misc_select: [u8; 4],
    pub attributes: [u8; 16],
    pub mr_enclave: [u8; 32],
    pub mr_signer: [u8; 32],
    pub isv_prod_id: u16,
    pub isv_svn: u16,
    pub report_data: [u8; 64],
}

/// A quote, decoded.
#[derive(Clone, Debug)]
pub struct Quote<'a> {
    /// 4 or 5.
    pub version: u16,
    /// Type of the body: 2 TD 1.0, 3 TD 1.5, 4 TD 1.5ex.
    pub body_type: u16,
    /// The TD.
    pub body: TdBody,
    /// Header and body: what the attestation key signed.
    pub signed: &'a [u8],
    /// The attestation key's signature, `r ‖ s`.
    pub signature: &'a [u8],
    /// The attestation key as an uncompressed point.
    pub attestation_key: [u8; 65],
    /// The quoting enclave's report, as the PCK signed it.
    pub qe_report_raw: &'a [u8],
    /// The same, decoded.
    pub qe_report: EnclaveReport,
    /// The PCK's signature over it, `r ‖ s`.
    pub qe_report_signature: &'a [u8],
    /// What the quoting enclave hashed along with its key.
    pub qe_auth_data: &'a [u8],
    /// The PCK certificate chain, PEM.
    pub pck_chain: &'a str,
    /// What follows the quote. Some clouds pad with zeros; anything else is to be refused.
    pub trailing: &'a [u8],
}

/// Takes fields off the front.
struct Cursor<'a> {
    all: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize, what: &'static str) -> Result<&'a [u8], QuoteError> {
        let end = self
            .at
            .checked_add(count)
            .ok_or(QuoteError::Truncated(what))?;
        let bytes = self
            .all
            .get(self.at..end)
            .ok_or(QuoteError::Truncated(what))?;
        self.at = end;
        Ok(bytes)
    }
    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], QuoteError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }
    fn u16(&mut self, what: &'static str) -> Result<u16, QuoteError> {
        self.array(what).map(u16::from_le_bytes)
    }
    fn u32(&mut self, what: &'static str) -> Result<u32, QuoteError> {
        self.array(what).map(u32::from_le_bytes)
    }
    fn part(&mut self, count: u32, what: &'static str) -> Result<Cursor<'a>, QuoteError> {
        Ok(Cursor {
            all: self.take(usize::try_from(count).unwrap_or(usize::MAX), what)?,
            at: 0,
        })
    }
    fn end(&self, what: &'static str) -> Result<(), QuoteError> {
        if self.at == self.all.len() {
            Ok(())
        } else {
            Err(QuoteError::Slack(what))
        }
    }
}

impl<'a> Quote<'a> {
    /// Reads a quote.
    ///
    /// # Errors
    /// When it is not a TDX quote of a known version and layout.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, QuoteError> {
        if bytes.len() > MAX_QUOTE {
            return Err(QuoteError::TooLong(bytes.len()));
        }
        let mut c = Cursor { all: bytes, at: 0 };
        let version = header(&mut c)?;
        let (body_type, size) = if version == 4 {
            (2, BODY_1_0 as u32)
        } else {
            (c.u16("the body's type")?, c.u32("the body's size")?)
        };
        let expected = match body_type {
            2 => BODY_1_0,
            3 => BODY_1_5,
            4 => BODY_1_5_EX,
            _ => return Err(QuoteError::Body(body_type, size)),
        };
        if size as usize != expected {
            return Err(QuoteError::Body(body_type, size));
        }
        let body = body(&mut c.part(size, "the TD body")?, body_type)?;
        let signed = &bytes[..c.at];

        let length = c.u32("the signature's length")?;
        let mut auth = c.part(length, "the signature data")?;
        let signature = auth.take(64, "the signature")?;
        let mut attestation_key = [4; 65];
        attestation_key[1..].copy_from_slice(auth.take(64, "the attestation key")?);
        let mut outer = cert_data(&mut auth, CERT_DATA_QE_REPORT)?;
        auth.end("Signature data")?;
        let qe_report_raw = outer.take(ENCLAVE_REPORT, "the QE report")?;
        let qe_report_signature = outer.take(64, "the QE report's signature")?;
        let length = outer.u16("the QE authentication data's length")?;
        let qe_auth_data = outer.take(usize::from(length), "the QE authentication data")?;
        let chain = cert_data(&mut outer, CERT_DATA_PCK_CHAIN)?;
        outer.end("Certification data")?;
        let chain_bytes = chain.all.strip_suffix(&[0]).unwrap_or(chain.all);
        let pck_chain = std::str::from_utf8(chain_bytes).map_err(|_| QuoteError::ChainText)?;
        Ok(Self {
            version,
            body_type,
            body,
            signed,
            signature,
            attestation_key,
            qe_report_raw,
            qe_report: enclave_report(&mut Cursor {
                all: qe_report_raw,
                at: 0,
            })?,
            qe_report_signature,
            qe_auth_data,
            pck_chain,
            trailing: &bytes[c.at..],
        })
    }

    /// Everything the TD says, for policies and for people.
    pub fn claims(&self) -> serde_json::Value {
        let b = &self.body;
        let bit = |n: u32| b.td_attributes >> n & 1 == 1;
        serde_json::json!({
            "version": self.version,
            "body_type": self.body_type,
            "tee_tcb_svn": hex(&b.tee_tcb_svn),
            "tee_tcb_svn_2": b.v1_5.map(|v| hex(&v.0)),
            "mr_seam": hex(&b.mr_seam),
            "mr_signer_seam": hex(&b.mr_signer_seam),
            "seam_attributes": hex(&b.seam_attributes),
            "td_attributes": {
                "raw": format!("0x{:x}", b.td_attributes),
                "debug": bit(0),
                "sept_ve_disable": bit(28),
                "migratable": bit(29),
                "pks": bit(30),
                "kl": bit(31),
                "perfmon": bit(63),
            },
            "xfam": format!("0x{:x}", b.xfam),
            "mr_td": hex(&b.mr_td),
            "mr_config_id": hex(&b.mr_config_id),
            "mr_owner": hex(&b.mr_owner),
            "mr_owner_config": hex(&b.mr_owner_config),
            "rtmr0": hex(&b.rtmr[0]),
            "rtmr1": hex(&b.rtmr[1]),
            "rtmr2": hex(&b.rtmr[2]),
            "rtmr3": hex(&b.rtmr[3]),
            "report_data": hex(&b.report_data),
            "mr_service_td": b.v1_5.map(|v| hex(&v.1)),
            "td_1_5_ex": b.v1_5_ex.as_deref().map(hex),
            "qe": {
                "mr_enclave": hex(&self.qe_report.mr_enclave),
                "mr_signer": hex(&self.qe_report.mr_signer),
                "isv_prod_id": self.qe_report.isv_prod_id,
                "isv_svn": self.qe_report.isv_svn,
            },
            "trailing_bytes": self.trailing.len(),
        })
    }
}

fn header(c: &mut Cursor<'_>) -> Result<u16, QuoteError> {
    let mut h = c.part(HEADER as u32, "the header")?;
    let version = h.u16("the header")?;
    let key_type = h.u16("the header")?;
    let tee_type = h.u32("the header")?;
    // A version 3 quote is an SGX one and has no TEE type: its field is reserved there.
    if version == 3 {
        return Err(QuoteError::TeeType(0));
    }
    if version != 4 && version != 5 {
        return Err(QuoteError::Version(version));
    }
    if tee_type != TEE_TDX {
        return Err(QuoteError::TeeType(tee_type));
    }
    if key_type != KEY_ECDSA_P256 {
        return Err(QuoteError::KeyType(key_type));
    }
    h.take(4, "the header")?;
    let vendor: [u8; 16] = h.array("the header")?;
    if vendor != INTEL_QE_VENDOR {
        return Err(QuoteError::Vendor(hex(&vendor)));
    }
    Ok(version)
}

fn body(c: &mut Cursor<'_>, body_type: u16) -> Result<TdBody, QuoteError> {
    const WHAT: &str = "the TD body";
    let mut body = TdBody {
        tee_tcb_svn: c.array(WHAT)?,
        mr_seam: c.array(WHAT)?,
        mr_signer_seam: c.array(WHAT)?,
        seam_attributes: c.array(WHAT)?,
        td_attributes: u64::from_le_bytes(c.array(WHAT)?),
        xfam: u64::from_le_bytes(c.array(WHAT)?),
        mr_td: c.array(WHAT)?,
        mr_config_id: c.array(WHAT)?,
        mr_owner: c.array(WHAT)?,
        mr_owner_config: c.array(WHAT)?,
        rtmr: [
            c.array(WHAT)?,
            c.array(WHAT)?,
            c.array(WHAT)?,
            c.array(WHAT)?,
        ],
        report_data: c.array(WHAT)?,
        v1_5: None,
        v1_5_ex: None,
    };
    if body_type >= 3 {
        body.v1_5 = Some((c.array(WHAT)?, c.array(WHAT)?));
    }
    if body_type >= 4 {
        body.v1_5_ex = Some(c.take(BODY_1_5_EX - BODY_1_5, WHAT)?.to_vec());
    }
    Ok(body)
}

fn cert_data<'a>(c: &mut Cursor<'a>, expected: u16) -> Result<Cursor<'a>, QuoteError> {
    let kind = c.u16("the certification data")?;
    if kind != expected {
        return Err(QuoteError::CertData(kind));
    }
    let size = c.u32("the certification data")?;
    c.part(size, "the certification data")
}

fn enclave_report(c: &mut Cursor<'_>) -> Result<EnclaveReport, QuoteError> {
    const WHAT: &str = "the QE report";
    c.take(16, WHAT)?;
    let misc_select = c.array(WHAT)?;
    c.take(28, WHAT)?;
    let attributes = c.array(WHAT)?;
    let mr_enclave = c.array(WHAT)?;
    c.take(32, WHAT)?;
    let mr_signer = c.array(WHAT)?;
    c.take(96, WHAT)?;
    let isv_prod_id = c.u16(WHAT)?;
    let isv_svn = c.u16(WHAT)?;
    c.take(60, WHAT)?;
    Ok(EnclaveReport {
        misc_select,
        attributes,
        mr_enclave,
        mr_signer,
        isv_prod_id,
        isv_svn,
        report_data: c.array(WHAT)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_of_other_kinds_are_refused_by_name() {
        let mut bytes = vec![0; 48];
        bytes[0] = 3;
        assert_eq!(Quote::parse(&bytes).unwrap_err(), QuoteError::TeeType(0));
        bytes[0] = 6;
        assert_eq!(Quote::parse(&bytes).unwrap_err(), QuoteError::Version(6));
        bytes[0] = 4;
        assert_eq!(Quote::parse(&bytes).unwrap_err(), QuoteError::TeeType(0));
        bytes[4] = 0x81;
        assert_eq!(Quote::parse(&bytes).unwrap_err(), QuoteError::KeyType(0));
        bytes[2] = 2;
        assert!(matches!(
            Quote::parse(&bytes).unwrap_err(),
            QuoteError::Vendor(_)
        ));
        bytes[12..28].copy_from_slice(&INTEL_QE_VENDOR);
        assert_eq!(
            Quote::parse(&bytes).unwrap_err(),
            QuoteError::Truncated("the TD body")
        );
        bytes[0] = 5;
        bytes.extend([9, 0, 1, 0, 0, 0]);
        assert_eq!(Quote::parse(&bytes).unwrap_err(), QuoteError::Body(9, 1));
    }
}
