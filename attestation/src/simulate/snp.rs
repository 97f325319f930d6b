//! SEV-SNP reports: the fields of the firmware's ABI, signed by a VCEK or VLEK of the CA, with AMD's
//! certificate table and the ARK's CRL.

use super::encode::{element, octets, small};
use super::issue::{self, Certificate, Entity};
use super::keys::{Key, Kind};
use super::{Ca, Defect, Minted, SimulateError};
use crate::der::tag;
use crate::snp::{GuestPolicy, PlatformInfo, Product, REPORT_LENGTH, SIGNED_LENGTH, Tcb};

/// 1.3.6.1.4.1.3704.1, AMD's arc.
const ARC: [u8; 8] = [0x2b, 6, 1, 4, 1, 0x9c, 0x78, 1];
/// r and s, little endian, stand in fields of 72 bytes.
const SIGNATURE_FIELD: usize = 72;
/// Entries of the certificate table: VCEK, VLEK, ASK, ARK.
const TABLE_VCEK: u128 = 0x63da758d_e664_4564_adc5_f4b93be8accd;
const TABLE_VLEK: u128 = 0xa8074bc2_a25a_483e_aae6_39c045a0b8a1;
const TABLE_ASK: u128 = 0x4ab7b379_bbac_4fe4_a02f_05aef327c782;
const TABLE_ARK: u128 = 0xc0b406a4_a803_4952_9743_3fb6014cd0ae;

/// What a simulated report says. The defaults are those of a healthy machine.
#[derive(Clone, Debug)]
pub struct SnpClaims {
    /// Product line.
    pub product: Product,
    /// Report version, 2 to 5.
    pub version: u32,
    /// Signed by a loaded key (VLEK) in place of the chip's.
    pub vlek: bool,
    /// REPORT_DATA.
    pub report_data: [u8; 64],
    /// MEASUREMENT.
    pub measurement: [u8; 48],
    /// HOST_DATA.
    pub host_data: [u8; 32],
    /// POLICY.
    pub policy: u64,
    /// VMPL.
    pub vmpl: u32,
    /// CHIP_ID; of Turin only the first eight bytes count.
    pub chip_id: [u8; 64],
    /// All four TCB versions.
    pub tcb: Tcb,
}

impl Default for SnpClaims {
    fn default() -> Self {
        Self {
            product: Product::Milan,
            version: 3,
            vlek: false,
            report_data: [0; 64],
            measurement: [0; 48],
            host_data: [0; 32],
            policy: GuestPolicy::RESERVED_ONE | GuestPolicy::SMT,
            vmpl: 0,
            chip_id: [0x5a; 64],
            tcb: Tcb {
                fmc: 0,
                bootloader: 4,
                tee: 0,
                snp: 24,
                microcode: 219,
            },
        }
    }
}

/// The report before it is signed.
struct Fields([u8; REPORT_LENGTH]);

impl Fields {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn new(claims: &SnpClaims) -> Self {
        let mut f = Self([0; REPORT_LENGTH]);
        let (family, model) = match claims.product {
            Product::Milan => (0x19, 0x01),
            Product::Genoa => (0x19, 0x11),
            Product::Turin => (0x1a, 0x02),
        };
        let tcb = claims.tcb.to_bytes(claims.product);
        f.put(0x00, &claims.version.to_le_bytes());
        f.put(0x08, &claims.policy.to_le_bytes());
        f.put(0x30, &claims.vmpl.to_le_bytes());
        f.put(0x34, &1u32.to_le_bytes());
        f.put(
            0x40,
            &(PlatformInfo::SMT | PlatformInfo::ALIAS_CHECK).to_le_bytes(),
        );
        f.put(0x48, &(u32::from(claims.vlek) << 2).to_le_bytes());
        f.put(0x50, &claims.report_data);
        f.put(0x90, &claims.measurement);
        f.put(0xc0, &claims.host_data);
        f.put(0x160, &[0xff; 32]);
        if claims.version >= 3 {
            f.put(0x188, &[family, model, 1]);
        }
        let chip = if claims.product == Product::Turin {
            8
        } else {
            64
        };
        f.put(0x1a0, &claims.chip_id[..chip]);
        for at in [0x38, 0x180, 0x1e0, 0x1f0] {
            f.put(at, &tcb);
        }
        // Firmware 1.55.30, current and committed: build, minor, major.
        f.put(0x1e8, &[30, 55, 1]);
        f.put(0x1ec, &[30, 55, 1]);
        if claims.version >= 5 {
            f.put(0x1f8, &[0xff; 16]);
        }
        f
    }

    /// What a defect changes in what the firmware says.
    fn spoil(&mut self, defect: Defect) {
        let flip = |byte: &mut u8| *byte ^= 0xff;
        match defect {
            Defect::UnknownVersion => self.put(0, &[9]),
            Defect::UnknownSigningKey => self.0[0x48] |= 3 << 2,
            Defect::MaskedChipKey => self.0[0x48] |= 2,
            Defect::OtherProduct => self.0[0x188] ^= 0x03,
            Defect::TcbAboveCurrent => self.put(0x38, &[0; 8]),
            Defect::TcbReserved => self.0[0x3c] = 1,
            Defect::Provisional => self.put(0x1e0, &[0; 8]),
            Defect::FirmwareUncommitted => flip(&mut self.0[0x1ec]),
            Defect::OldLaunchTcb => self.put(0x1f0, &[0; 8]),
            Defect::OtherChip => flip(&mut self.0[0x1a0]),
            Defect::PolicyReserved => self.0[0x0a] &= !0x02,
            Defect::PolicyUnknownBit => self.0[0x0f] |= 0x80,
            Defect::Debug => self.0[0x0a] |= 0x08,
            Defect::MigrationAllowed => self.0[0x0a] |= 0x04,
            Defect::MigrationAgent => self.put(0x160, &[7; 32]),
            Defect::SmtForbidden => self.0[0x0a] &= !0x01,
            Defect::NoAliasCheck => self.0[0x40] &= !0x20,
            Defect::HostReport => self.put(0x30, &[0xff; 4]),
            Defect::ReportData => flip(&mut self.0[0x50]),
            Defect::Measurement => flip(&mut self.0[0x90]),
            Defect::HostData => flip(&mut self.0[0xc0]),
            _ => {}
        }
    }

    fn sign(&mut self, key: &Key) -> Result<(), SimulateError> {
        let signature = key.sign_fixed(&self.0[..SIGNED_LENGTH])?;
        for (half, at) in signature.chunks(48).zip([0, SIGNATURE_FIELD]) {
            let little: Vec<u8> = half.iter().rev().copied().collect();
            self.put(SIGNED_LENGTH + at, &little);
        }
        Ok(())
    }
}

impl Ca {
    /// A report with its certificate table and CRL.
    ///
    /// # Errors
    /// When the library fails, or the defect is one of other evidence.
    pub fn mint_snp(
        &self,
        claims: &SnpClaims,
        defect: Option<Defect>,
    ) -> Result<Minted, SimulateError> {
        Defect::demand(defect, crate::verdict::Tee::Snp)?;
        if !(2..=5).contains(&claims.version) {
            return Err(SimulateError::Setting("SNP report versions are 2 to 5"));
        }
        let nothing = match defect {
            Some(Defect::OtherProduct) => claims.version < 3,
            Some(Defect::OtherChip) => claims.vlek,
            _ => false,
        };
        if nothing {
            return Err(SimulateError::NoEffect);
        }
        let mut report = Fields::new(claims);
        if let Some(defect) = defect {
            report.spoil(defect);
        }
        report.sign(self.key("amd-chip"))?;
        if defect == Some(Defect::Tampered) {
            report.0[0x90] ^= 1;
        }
        let (endorsements, crl) = self.amd_endorsements(claims, defect)?;
        Ok(Minted {
            report: report.0.to_vec(),
            endorsements,
            collateral: vec![("amd-crl.der".into(), crl)],
        })
    }

    /// Certificate table and CRL.
    fn amd_endorsements(
        &self,
        claims: &SnpClaims,
        defect: Option<Defect>,
    ) -> Result<(Vec<u8>, Vec<u8>), SimulateError> {
        let product = claims.product;
        let other = Key::generate(Kind::P384)?;
        // Any key but the pinned one; new RSA keys take long.
        let root_key = if defect == Some(Defect::UnknownRoot) {
            self.key("amd-signing")
        } else {
            self.key("amd-root")
        };
        let root = Entity::new(root_key, &format!("ARK-{product}"));
        let (middle_name, vek_name, table) = if claims.vlek {
            (format!("SEV-VLEK-{product}"), "SEV-VLEK", TABLE_VLEK)
        } else {
            (format!("SEV-{product}"), "SEV-VCEK", TABLE_VCEK)
        };
        let middle = Entity::new(self.key("amd-signing"), &middle_name);
        let wrong_key = defect == Some(Defect::WrongKey);
        let vek_key = if wrong_key {
            &other
        } else {
            self.key("amd-chip")
        };
        let vek = Entity::new(vek_key, vek_name);
        let issue = |subject: &Entity<'_>, issuer: &Entity<'_>, ca, window, extensions| {
            Certificate {
                subject,
                issuer,
                ca,
                window,
                extensions,
                zero_serial: !ca,
            }
            .issue()
        };
        let expired = defect == Some(Defect::ExpiredCertificate);
        let window = if expired { self.over() } else { self.years() };
        let ark = issue(&root, &root, true, self.years(), Vec::new())?;
        let ask = issue(&middle, &root, true, self.years(), Vec::new())?;
        let leaf = issue(&vek, &middle, false, window, vek_extensions(claims, defect))?;

        let revoked = [&middle];
        let listed: &[&Entity<'_>] = if defect == Some(Defect::Revoked) {
            &revoked
        } else {
            &[]
        };
        let stale = defect == Some(Defect::ExpiredCrl);
        let window = if stale { self.over() } else { self.month() };
        let crl = issue::crl(&root, listed, window)?;
        let table = cert_table(&[(table, leaf), (TABLE_ASK, ask), (TABLE_ARK, ark)]);
        Ok((table, crl))
    }
}

/// The extensions of a VCEK or VLEK: product, TCB, chip or provider.
fn vek_extensions(claims: &SnpClaims, defect: Option<Defect>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let id = |arcs: &[u8]| [&ARC[..], arcs].concat();
    let mut tcb = claims.tcb;
    if defect == Some(Defect::TcbMismatch) {
        tcb.microcode = tcb.microcode.wrapping_sub(1);
    }
    let text = |t: &str| element(tag::IA5_STRING, t.as_bytes());
    let mut list = vec![
        (id(&[1]), small(0)),
        (id(&[2]), text(&claims.product.to_string())),
        (id(&[3, 1]), small(tcb.bootloader.into())),
        (id(&[3, 2]), small(tcb.tee.into())),
        (id(&[3, 3]), small(tcb.snp.into())),
        (id(&[3, 8]), small(tcb.microcode.into())),
    ];
    if claims.product == Product::Turin {
        list.push((id(&[3, 9]), small(tcb.fmc.into())));
    }
    if claims.vlek {
        list.push((id(&[5]), text("simulator")));
    } else if claims.product == Product::Turin {
        list.push((id(&[4]), octets(&claims.chip_id[..8])));
    } else {
        list.push((id(&[4]), claims.chip_id.to_vec()));
    }
    list
}

/// The table of GHCB section 4.1.8.1: entries, an empty one, the certificates.
fn cert_table(certificates: &[(u128, Vec<u8>)]) -> Vec<u8> {
    let mut offset = (certificates.len() + 1) * 24;
    let mut entries: Vec<u8> = Vec::new();
    let mut content: Vec<u8> = Vec::new();
    for (guid, der) in certificates {
        entries.extend(guid.to_be_bytes());
        entries.extend((offset as u32).to_le_bytes());
        entries.extend((der.len() as u32).to_le_bytes());
        offset += der.len();
        content.extend(der);
    }
    entries.extend([0; 24]);
    entries.extend(content);
    entries
}
