//! NVIDIA devices: measurement reports of GPUs and switches (Hopper, Blackwell, LS10), chains of
//! five certificates, OCSP responses, and signed driver and VBIOS manifests that fit.

use super::encode::{element, octets, oid, sequence, small};
use super::issue::{self, Answer, Certificate, Entity};
use super::keys::{Key, Kind};
use super::{Ca, Defect, File, Minted, SimulateError, rim};
use crate::crypto::sha384;
use crate::der::tag;
use crate::encoding::pem;
use crate::nvidia::Mode;

/// 2.23.133.5.4.1 (Hopper) and 2.23.133.5.4.1.1 (Blackwell): DICE firmware ids.
const DICE_FWID: &[u8] = &[0x67, 0x81, 5, 5, 4, 1];
const DICE_TCB_INFO: &[u8] = &[0x67, 0x81, 5, 5, 4, 1, 1];
const OID_SHA384: &[u8] = &[0x60, 0x86, 0x48, 1, 101, 3, 4, 2, 2];
/// Measurement blocks in a report; indices are one less.
const BLOCKS: u8 = 40;
/// Which indices the driver's manifest covers, the VBIOS' and the switch BIOS'.
const DRIVER_INDICES: &[u8] = &[1, 2, 3, 4, 5, 10, 20, 35];
const VBIOS_INDICES: &[u8] = &[6, 7, 8, 9, 11];

/// What a simulated device says. The defaults are those of a healthy GPU.
#[derive(Clone, Debug)]
pub struct GpuClaims {
    /// The nonce it was asked with.
    pub nonce: [u8; 32],
    /// `GH100` (Hopper), `GB100` (Blackwell), `LS10` (switch), ….
    pub chip: String,
    /// Serial number, hexadecimal digits; the last 16 are the platform device id.
    pub serial: String,
    /// Driver version; not of a switch.
    pub driver: String,
    /// VBIOS or switch BIOS version, five groups of two digits.
    pub vbios: String,
    /// Feature mode.
    pub mode: Mode,
    /// A switch's own id, or those at a GPU's links with their byte order reversed.
    pub switch_pdis: Vec<[u8; 8]>,
    /// Ids of the GPUs that a switch connects.
    pub gpu_pdis: Vec<[u8; 8]>,
}

impl Default for GpuClaims {
    fn default() -> Self {
        Self {
            nonce: [0; 32],
            chip: "GH100".into(),
            serial: "53494D0000000001".into(),
            driver: "550.90.07".into(),
            vbios: "96.00.9F.00.01".into(),
            mode: Mode::Spt,
            switch_pdis: Vec::new(),
            gpu_pdis: Vec::new(),
        }
    }
}

impl GpuClaims {
    fn is_switch(&self) -> bool {
        self.chip.starts_with("LS")
    }

    fn is_blackwell(&self) -> bool {
        self.chip.starts_with("GB")
    }

    fn firmware_id(&self) -> [u8; 48] {
        sha384(format!("firmware of {} {}", self.chip, self.vbios).as_bytes())
    }

    fn indices(&self) -> Vec<u8> {
        if self.is_switch() {
            VBIOS_INDICES.to_vec()
        } else {
            [DRIVER_INDICES, VBIOS_INDICES].concat()
        }
    }

    /// The value at an index: depends on the version of what is measured there.
    fn measurement(&self, index: u8) -> [u8; 48] {
        let version = if DRIVER_INDICES.contains(&index) {
            &self.driver
        } else {
            &self.vbios
        };
        sha384(format!("measurement {index} of {} {version}", self.chip).as_bytes())
    }

    fn opaque(&self, defect: Option<Defect>) -> Result<Vec<u8>, SimulateError> {
        let is = |d| defect == Some(d);
        let mut out = Vec::new();
        let mut field = |kind: u16, value: &[u8]| {
            out.extend(kind.to_le_bytes());
            out.extend((value.len() as u16).to_le_bytes());
            out.extend(value);
        };
        if self.is_switch() {
            field(6, self.vbios.as_bytes());
        } else {
            field(3, self.driver.as_bytes());
            field(6, &vbios_words(&self.vbios)?);
            field(
                11,
                &[if is(Defect::UnknownDecoder) {
                    0x33
                } else {
                    0xaa
                }],
            );
            field(15, b"895");
            field(17, b"G520");
            field(18, b"0200");
            let mut id = self.firmware_id();
            id[0] ^= if is(Defect::OtherFirmware) { 0xff } else { 0 };
            field(20, &id);
        }
        let unknown = is(Defect::UnknownMode);
        if self.is_blackwell() {
            let other = is(Defect::OtherChip);
            let chip = if other { "GB102" } else { self.chip.as_str() };
            field(35, chip.as_bytes());
            let mode = match self.mode {
                Mode::Spt => 0,
                Mode::Mpt => 1,
                Mode::Ppcie => 2,
            };
            field(36, &[if unknown { 9 } else { mode }, 0]);
        } else if !self.is_switch() {
            let ppcie = self.mode == Mode::Ppcie;
            let status = if ppcie { 0xaa } else { 0x55 };
            field(21, &[if unknown { 0x33 } else { status }]);
        }
        if !self.switch_pdis.is_empty() {
            field(22, self.switch_pdis.as_flattened());
        }
        if !self.gpu_pdis.is_empty() {
            field(26, self.gpu_pdis.as_flattened());
        }
        Ok(out)
    }

    /// Request and response up to the signature.
    fn signed_part(&self, defect: Option<Defect>) -> Result<Vec<u8>, SimulateError> {
        let is = |d| defect == Some(d);
        let mut nonce = self.nonce;
        nonce[0] ^= if is(Defect::ReportData) { 0xff } else { 0 };
        let version = if is(Defect::UnknownVersion) {
            0x12
        } else {
            0x11
        };
        let mut r = vec![version, 0xe0, 0xff, 0xff];
        r.extend(nonce);
        r.push(0);
        let length = u32::from(BLOCKS) * 55;
        r.extend([0x11, 0x60, 0, 0, BLOCKS]);
        r.extend(&length.to_le_bytes()[..3]);
        let measured = self.indices();
        for index in 0..BLOCKS {
            let mut value = [0; 48];
            if measured.contains(&index) {
                value = self.measurement(index);
            }
            value[0] ^= u8::from(is(Defect::Measurement) && index == VBIOS_INDICES[0]);
            r.extend([index + 1, 1, 51, 0, 1, 48, 0]);
            r.extend(value);
        }
        r.extend(sha384(&nonce)[..32].iter());
        let opaque = self.opaque(defect)?;
        r.extend((opaque.len() as u16).to_le_bytes());
        r.extend(opaque);
        Ok(r)
    }
}

/// `96.00.9F.00.01` as a GPU reports it: a little-endian word, and the last group.
fn vbios_words(version: &str) -> Result<[u8; 8], SimulateError> {
    let groups: Vec<u8> = version
        .split('.')
        .filter_map(|g| u8::from_str_radix(g, 16).ok())
        .collect();
    match groups[..] {
        [a, b, c, d, e] => Ok([d, c, b, a, e, 0, 0, 0]),
        _ => Err(SimulateError::Setting(
            "VBIOS versions are five groups of two hexadecimal digits",
        )),
    }
}

impl Ca {
    /// A device's report with its chain, OCSP responses and manifests.
    ///
    /// # Errors
    /// When the library fails, or the defect is one of other evidence.
    pub fn mint_gpu(
        &self,
        claims: &GpuClaims,
        defect: Option<Defect>,
    ) -> Result<Minted, SimulateError> {
        Defect::demand(defect, crate::verdict::Tee::Nvidia)?;
        let is = |d| defect == Some(d);
        let nothing = match defect {
            Some(Defect::OtherChip) => !claims.is_blackwell(),
            Some(
                Defect::UnknownDecoder
                | Defect::OtherFirmware
                | Defect::UnknownMode
                | Defect::RimVersion
                | Defect::RimOverlap,
            ) => claims.is_switch(),
            _ => false,
        };
        if nothing {
            return Err(SimulateError::NoEffect);
        }
        let mut report = claims.signed_part(defect)?;
        let other = Key::generate(Kind::P384)?;
        let key = if is(Defect::WrongKey) {
            &other
        } else {
            self.key("nvidia-firmware")
        };
        report.extend(key.sign_fixed(&report)?);
        if is(Defect::Tampered) {
            // In a measurement.
            report[37 + 8 + 20] ^= 1;
        }
        if is(Defect::Padding) {
            report.push(0);
        }
        let (endorsements, mut collateral) = self.device_chain(claims, defect)?;
        collateral.extend(self.manifests(claims, defect)?);
        Ok(Minted {
            report,
            endorsements,
            collateral,
        })
    }

    /// Chain in PEM, and OCSP responses for what is between leaf and root.
    fn device_chain(
        &self,
        claims: &GpuClaims,
        defect: Option<Defect>,
    ) -> Result<(Vec<u8>, Vec<File>), SimulateError> {
        let is = |d| defect == Some(d);
        // Any key but the pinned one.
        let unknown = is(Defect::UnknownRoot);
        let root_key = if unknown { "rim-root" } else { "nvidia-root" };
        let chip = match claims.chip.split_at_checked(2) {
            Some(("LS", rest)) => format!("LS_{rest}"),
            _ => claims.chip.clone(),
        };
        let entities = [
            Entity::new(
                self.key("nvidia-firmware"),
                &format!("{chip} A01 GSP FMC LF"),
            ),
            Entity::with_serial(
                self.key("nvidia-device"),
                &format!("{chip} A01 GSP BROM"),
                &claims.serial,
            ),
            Entity::new(
                self.key("nvidia-provisioner"),
                &format!("Simulated {chip} Provisioner ICA 1"),
            ),
            Entity::new(
                self.key("nvidia-identity"),
                &format!("Simulated {chip} Identity"),
            ),
            Entity::new(self.key(root_key), "Simulated Device Identity CA"),
        ];
        let mut text = String::new();
        let mut responses = Vec::new();
        for (n, subject) in entities.iter().enumerate() {
            let issuer = entities.get(n + 1).unwrap_or(subject);
            let expired = is(Defect::ExpiredCertificate) && n == 2;
            let certificate = Certificate {
                subject,
                issuer,
                ca: n > 0,
                window: if expired { self.over() } else { self.years() },
                extensions: if n == 0 {
                    vec![dice(claims)]
                } else {
                    Vec::new()
                },
                zero_serial: false,
            };
            if !(is(Defect::ShortChain) && n == 3) {
                text += &pem("CERTIFICATE", &certificate.issue()?);
            }
            if (1..4).contains(&n) {
                let spoiled = n == 2;
                let answer = match defect {
                    Some(Defect::Revoked) if spoiled => Answer::Revoked,
                    Some(Defect::UnknownToResponder) if spoiled => Answer::Unknown,
                    _ => Answer::Good,
                };
                let stale = is(Defect::ExpiredCrl) && spoiled;
                let window = if stale { self.over() } else { self.month() };
                let response = issue::ocsp(subject, issuer, answer, window, None)?;
                responses.push((format!("ocsp-{}-{n}.der", claims.serial), response));
            }
        }
        Ok((text.into_bytes(), responses))
    }

    /// The manifests that fit the device, and the OCSP response for their signer.
    fn manifests(
        &self,
        claims: &GpuClaims,
        defect: Option<Defect>,
    ) -> Result<Vec<File>, SimulateError> {
        let is = |d| defect == Some(d);
        let root = Entity::new(self.key("rim-root"), "Simulated CoRIM signing Root CA");
        let signer = Entity::new(self.key("rim-signer"), "Simulated CoRIM signer");
        let unpinned = Entity::new(self.key("nvidia-root"), "Simulated CoRIM signing Root CA");
        let answer = if is(Defect::RimRevoked) {
            Answer::Revoked
        } else {
            Answer::Good
        };
        let ocsp = issue::ocsp(&signer, &root, answer, self.month(), None)?;
        let mut files = vec![("ocsp-rim.der".to_owned(), ocsp)];
        let mut make = |name: &str, version: &str, indices: &[u8], first: bool| {
            let root = if first && is(Defect::RimRoot) {
                &unpinned
            } else {
                &root
            };
            let golden: Vec<(u8, [u8; 48])> = indices
                .iter()
                .map(|i| (*i, claims.measurement(*i)))
                .collect();
            let manifest = rim::Manifest {
                product: &claims.chip,
                version,
                switch: claims.is_switch(),
                golden: &golden,
            };
            let mut text = manifest.sign(&signer, root, self.years())?;
            if first && is(Defect::TamperedCollateral) {
                text = text.replacen("tagCreator", "tagCreatoR", 1);
            }
            files.push((format!("{name}-{version}.xml"), text.into_bytes()));
            Ok::<_, SimulateError>(())
        };
        if claims.is_switch() {
            make("switch-rim", &claims.vbios, VBIOS_INDICES, true)?;
            return Ok(files);
        }
        let driver = if is(Defect::RimVersion) {
            "535.00.01"
        } else {
            &claims.driver
        };
        make("driver-rim", driver, DRIVER_INDICES, true)?;
        let mut indices = VBIOS_INDICES.to_vec();
        if is(Defect::RimOverlap) {
            indices.push(DRIVER_INDICES[0]);
        }
        make("vbios-rim", &claims.vbios, &indices, false)?;
        Ok(files)
    }
}

/// The leaf's extension with the firmware id.
fn dice(claims: &GpuClaims) -> (Vec<u8>, Vec<u8>) {
    let id = sequence(&[&oid(OID_SHA384), &octets(&claims.firmware_id())]);
    if claims.is_blackwell() {
        let list = element(tag::context(6), &id);
        (DICE_TCB_INFO.to_vec(), element(tag::SEQUENCE, &list))
    } else {
        // CompositeDeviceID: version, device key, firmware id.
        let value = sequence(&[&small(1), &sequence(&[]), &id]);
        (DICE_FWID.to_vec(), value)
    }
}
