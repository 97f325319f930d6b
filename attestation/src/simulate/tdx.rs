//! TDX quotes: TD bodies of every kind, a quoting enclave's report, a PCK chain, and Intel's whole
//! collateral, signed by the CA. RTMRs are what the events make of them.

use serde_json::json;

use super::encode::{octets, oid, sequence, small};
use super::issue::{self, Certificate, Entity};
use super::keys::{Key, Kind};
use super::tdx_collateral::{qe_identity, tcb_info};
use super::{Ca, Defect, Minted, SimulateError};
use crate::crypto::{sha256, sha384};
use crate::encoding::{hex, pem};
use crate::tdx::{Event, replay};

/// 1.2.840.113741.1.13.1, the SGX extensions of a PCK certificate.
const SGX_EXTENSIONS: [u8; 9] = [0x2a, 0x86, 0x48, 0x86, 0xf8, 0x4d, 1, 13, 1];
/// Intel's quoting enclave vendor id.
const QE_VENDOR: [u8; 16] = [
    0x93, 0x9a, 0x72, 0x33, 0xf7, 0x9c, 0x4c, 0xa9, 0x94, 0x0a, 0x0d, 0xb3, 0x95, 0x7f, 0x06, 0x07,
];
pub(super) const FMSPC: [u8; 6] = [0x50, 0x80, 0x6f, 0, 0, 0];
pub(super) const QE_SIGNER: [u8; 32] = [0x51; 32];
/// TDX module 1.5, security version 6.
const TEE_TCB_SVN: [u8; 16] = [6, 1, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const CPU_SVN: [u8; 16] = [3; 16];
pub(super) const PCE_SVN: u32 = 13;
const ALG_SHA384: u16 = 0x000c;
/// EV_EVENT_TAG of the TCG platform firmware profile.
const EVENT_TAG: u32 = 6;

/// Which layout a quote has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TdxForm {
    /// Version 4, TD 1.0.
    V4,
    /// Version 5, TD 1.0.
    V5Td10,
    /// Version 5, TD 1.5.
    V5Td15,
    /// Version 5, TD 1.5ex.
    V5Td15Ex,
}

/// What a simulated quote says. The defaults are those of a healthy machine.
#[derive(Clone, Debug)]
pub struct TdxClaims {
    /// Layout.
    pub form: TdxForm,
    /// REPORTDATA.
    pub report_data: [u8; 64],
    /// MRTD.
    pub mr_td: [u8; 48],
    /// MRCONFIGID.
    pub mr_config_id: [u8; 48],
    /// TDATTRIBUTES.
    pub attributes: u64,
    /// XFAM.
    pub xfam: u64,
    /// What was measured: register (1 to 4 for RTMR0 to RTMR3) and data, in order.
    pub events: Vec<(u32, Vec<u8>)>,
}

impl Default for TdxClaims {
    fn default() -> Self {
        Self {
            form: TdxForm::V4,
            report_data: [0; 64],
            mr_td: [0; 48],
            mr_config_id: [0; 48],
            attributes: 1 << 28,
            xfam: 0xe7,
            events: vec![
                (1, b"firmware configuration".to_vec()),
                (2, b"kernel".to_vec()),
                (3, b"command line".to_vec()),
            ],
        }
    }
}

impl TdxClaims {
    /// RTMR0 to RTMR3.
    pub fn registers(&self) -> [[u8; 48]; 4] {
        let events: Vec<Event<'_>> = self
            .events
            .iter()
            .map(|(register, data)| Event {
                register: *register,
                kind: EVENT_TAG,
                digest: sha384(data),
                data,
            })
            .collect();
        replay(&events)
    }

    /// The event log (CCEL).
    pub fn event_log(&self) -> Vec<u8> {
        let mut log = vec![0; 28];
        log[4] = 3;
        log.extend(16u32.to_le_bytes());
        log.extend(b"Spec ID Event03\0");
        for (register, data) in &self.events {
            log.extend(register.to_le_bytes());
            log.extend(EVENT_TAG.to_le_bytes());
            log.extend(1u32.to_le_bytes());
            log.extend(ALG_SHA384.to_le_bytes());
            log.extend(sha384(data));
            log.extend((data.len() as u32).to_le_bytes());
            log.extend(data);
        }
        log
    }
}

/// Header and body, as the attestation key signs them.
fn signed_part(claims: &TdxClaims, defect: Option<Defect>) -> Vec<u8> {
    let is = |d| defect == Some(d);
    let flip = |mut bytes: [u8; 48], on: bool| {
        bytes[0] ^= if on { 0xff } else { 0 };
        bytes
    };
    let mut version: u16 = if claims.form == TdxForm::V4 { 4 } else { 5 };
    if is(Defect::UnknownVersion) {
        version = 9;
    }
    let mut attributes = claims.attributes;
    for (d, bits) in [
        (Defect::Debug, 1),
        (Defect::SeptVe, 1 << 28),
        (Defect::MigrationAllowed, 1 << 29),
        (Defect::PolicyUnknownBit, 1 << 40),
    ] {
        attributes ^= if is(d) { bits } else { 0 };
    }
    let mut q = Vec::new();
    q.extend(version.to_le_bytes());
    q.extend(2u16.to_le_bytes());
    q.extend(0x81u32.to_le_bytes());
    q.extend([0; 4]);
    q.extend(QE_VENDOR);
    q.extend([0; 20]);
    let body_type: (u16, u32) = match claims.form {
        TdxForm::V4 | TdxForm::V5Td10 => (2, 584),
        TdxForm::V5Td15 => (3, 648),
        TdxForm::V5Td15Ex => (4, 885),
    };
    if claims.form != TdxForm::V4 {
        q.extend(body_type.0.to_le_bytes());
        q.extend(body_type.1.to_le_bytes());
    }
    let mut svn = TEE_TCB_SVN;
    if is(Defect::OutOfDate) {
        svn[0] = 2;
    }
    if is(Defect::TcbMismatch) {
        svn[2] = 0;
    }
    q.extend(svn);
    q.extend([0x11; 48]);
    q.extend(flip([0; 48], is(Defect::OtherModule)));
    q.extend([0; 8]);
    q.extend(attributes.to_le_bytes());
    q.extend((claims.xfam | if is(Defect::Xfam) { 1 << 60 } else { 0 }).to_le_bytes());
    q.extend(flip(claims.mr_td, is(Defect::Measurement)));
    q.extend(flip(claims.mr_config_id, is(Defect::HostData)));
    q.extend([0; 96]);
    let mut registers = claims.registers();
    registers[1] = flip(registers[1], is(Defect::EventLog));
    q.extend(registers.as_flattened());
    let mut data = claims.report_data;
    data[0] ^= if is(Defect::ReportData) { 0xff } else { 0 };
    q.extend(data);
    if body_type.0 >= 3 {
        q.extend(svn);
        q.extend(flip([0; 48], is(Defect::MigrationAgent)));
    }
    if body_type.0 >= 4 {
        q.extend([0; 237]);
    }
    q
}

/// The quoting enclave's report that vouches for the attestation key.
fn enclave_report(key: &[u8], auth: &[u8], defect: Option<Defect>) -> Vec<u8> {
    let mut r = vec![0; 384];
    r[48..64].copy_from_slice(&[0x11, 0, 0, 0, 0, 0, 0, 0, 0xe7, 0, 0, 0, 0, 0, 0, 0]);
    r[64..96].copy_from_slice(&[0x52; 32]);
    r[128..160].copy_from_slice(&QE_SIGNER);
    if defect == Some(Defect::OtherQe) {
        r[128] ^= 0xff;
    }
    r[256] = 2;
    r[258] = 4;
    r[320..352].copy_from_slice(&sha256(&[key, auth].concat()));
    if defect == Some(Defect::AttestationKey) {
        r[320] ^= 0xff;
    }
    r
}

impl Ca {
    /// A quote with its collateral and event log.
    ///
    /// # Errors
    /// When the library fails, or the defect is one of other evidence.
    pub fn mint_tdx(
        &self,
        claims: &TdxClaims,
        defect: Option<Defect>,
    ) -> Result<Minted, SimulateError> {
        Defect::demand(defect, crate::verdict::Tee::Tdx)?;
        let is = |d| defect == Some(d);
        if is(Defect::MigrationAgent) && matches!(claims.form, TdxForm::V4 | TdxForm::V5Td10) {
            return Err(SimulateError::NoEffect);
        }
        let mut quote = signed_part(claims, defect);
        // A quoting enclave makes its attestation key itself.
        let key = Key::generate(Kind::P256)?;
        let other = Key::generate(Kind::P256)?;
        let signer = if is(Defect::WrongKey) { &other } else { &key };
        let signature = signer.sign_fixed(&quote)?;
        let auth: [u8; 32] = std::array::from_fn(|n| n as u8);
        let report = enclave_report(&key.public[1..], &auth, defect);
        let pck = if is(Defect::QeReport) {
            &other
        } else {
            self.key("intel-pck")
        };
        let report_signature = pck.sign_fixed(&report)?;
        let chain = self.pck_chain(defect)?;

        let mut inner = report;
        inner.extend(report_signature);
        inner.extend((auth.len() as u16).to_le_bytes());
        inner.extend(auth);
        inner.extend(5u16.to_le_bytes());
        inner.extend((chain.len() as u32).to_le_bytes());
        inner.extend(chain.as_bytes());
        let mut outer = signature;
        outer.extend(&key.public[1..]);
        outer.extend(6u16.to_le_bytes());
        outer.extend((inner.len() as u32).to_le_bytes());
        outer.extend(inner);
        quote.extend((outer.len() as u32).to_le_bytes());
        quote.extend(outer);
        if is(Defect::Tampered) {
            // In MRTD of any body.
            quote[48 + 6 + 136 + 48] ^= 1;
        }
        if is(Defect::Padding) {
            quote.extend([0, 0, 1]);
        }
        Ok(Minted {
            report: quote,
            endorsements: Vec::new(),
            collateral: vec![
                ("tdx-collateral.json".into(), self.tdx_collateral(defect)?),
                ("event-log.bin".into(), claims.event_log()),
            ],
        })
    }

    fn intel<'a>(&'a self, key: &'static str, name: &str) -> Entity<'a> {
        Entity::new(self.key(key), name)
    }

    fn intel_root(&self, defect: Option<Defect>) -> Entity<'_> {
        let unknown = defect == Some(Defect::UnknownRoot);
        // Any key but the pinned one.
        let key = if unknown {
            "intel-tcb-signing"
        } else {
            "intel-root"
        };
        self.intel(key, "Simulated SGX Root CA")
    }

    fn intel_platform(&self) -> Entity<'_> {
        self.intel("intel-platform", "Simulated SGX PCK Platform CA")
    }

    /// PCK certificate, platform CA, root; PEM.
    fn pck_chain(&self, defect: Option<Defect>) -> Result<String, SimulateError> {
        let root = self.intel_root(defect);
        let platform = self.intel_platform();
        let pck = self.intel("intel-pck", "Simulated SGX PCK Certificate");
        let expired = defect == Some(Defect::ExpiredCertificate);
        let mut text = String::new();
        for (subject, issuer, extensions) in [
            (&pck, &platform, vec![sgx_extensions()]),
            (&platform, &root, Vec::new()),
            (&root, &root, Vec::new()),
        ] {
            let leaf = std::ptr::eq(subject, &raw const pck);
            let certificate = Certificate {
                subject,
                issuer,
                ca: !leaf,
                window: if expired && leaf {
                    self.over()
                } else {
                    self.years()
                },
                extensions,
                zero_serial: false,
            };
            text += &pem("CERTIFICATE", &certificate.issue()?);
        }
        Ok(text)
    }

    /// TCB info, QE identity and CRLs, in the JSON form of Intel's quote provider library.
    fn tdx_collateral(&self, defect: Option<Defect>) -> Result<Vec<u8>, SimulateError> {
        let is = |d| defect == Some(d);
        let root = self.intel_root(None);
        let platform = self.intel_platform();
        let signer = self.intel("intel-tcb-signing", "Simulated SGX TCB Signing");
        let pck = self.intel("intel-pck", "Simulated SGX PCK Certificate");
        let issue = |subject, issuer, ca| {
            Certificate {
                subject,
                issuer,
                ca,
                window: self.years(),
                extensions: Vec::new(),
                zero_serial: false,
            }
            .issue()
        };
        let root_pem = pem("CERTIFICATE", &issue(&root, &root, true)?);
        let signing = pem("CERTIFICATE", &issue(&signer, &root, false)?) + &root_pem;
        let crl_chain = pem("CERTIFICATE", &issue(&platform, &root, true)?) + &root_pem;
        let window = if is(Defect::ExpiredCrl) {
            self.over()
        } else {
            self.month()
        };
        let revoked = [&pck];
        let listed: &[&Entity<'_>] = if is(Defect::Revoked) { &revoked } else { &[] };
        let dates = |stale| if stale { self.over() } else { self.month() };
        let info = tcb_info(dates(is(Defect::ExpiredCollateral)), defect).to_string();
        let identity = qe_identity(dates(is(Defect::ExpiredQeIdentity))).to_string();
        let sign = |text: &str, spoil: bool| {
            let mut signature = signer.key.sign_fixed(text.as_bytes())?;
            signature[40] ^= u8::from(spoil);
            Ok::<_, SimulateError>(hex(&signature))
        };
        let bundle = json!({
            "pck_crl_issuer_chain": crl_chain,
            "root_ca_crl": hex(&issue::crl(&root, &[], self.month())?),
            "pck_crl": hex(&issue::crl(&platform, listed, window)?),
            "tcb_info_issuer_chain": signing,
            "tcb_info_signature": sign(&info, is(Defect::TamperedCollateral))?,
            "tcb_info": info,
            "qe_identity_issuer_chain": signing,
            "qe_identity_signature": sign(&identity, is(Defect::TamperedQeIdentity))?,
            "qe_identity": identity,
        });
        Ok(bundle.to_string().into_bytes())
    }
}

fn sgx_extensions() -> (Vec<u8>, Vec<u8>) {
    let id = |arcs: &[u8]| oid(&[&SGX_EXTENSIONS[..], arcs].concat());
    let pair = |arcs: &[u8], value: &[u8]| sequence(&[&id(arcs), value]);
    let mut levels = Vec::new();
    for (arc, svn) in (1u8..).zip(CPU_SVN) {
        levels.extend(pair(&[2, arc], &small(svn.into())));
    }
    levels.extend(pair(&[2, 17], &small(PCE_SVN)));
    levels.extend(pair(&[2, 18], &octets(&CPU_SVN)));
    let value = sequence(&[
        &pair(&[1], &octets(&[0x70; 16])),
        &pair(&[2], &sequence(&[&levels])),
        &pair(&[3], &octets(&[0; 2])),
        &pair(&[4], &octets(&FMSPC)),
    ]);
    (SGX_EXTENSIONS.to_vec(), value)
}
