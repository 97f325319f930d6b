//! The attestation report, byte by byte (SEV-SNP firmware ABI specification, ATTESTATION_REPORT),
//! versions 2 to 5. Reserved bytes must be zero: they would not survive re-encoding unnoticed.

use serde::Serialize;

use super::{Product, Tcb};
use crate::encoding::hex;

/// Length of every report version, bytes.
pub const REPORT_LENGTH: usize = 1184;
/// Length of the part that is signed.
pub const SIGNED_LENGTH: usize = 0x2a0;
/// r and s, little endian, in fields of 72 bytes.
const SIGNATURE_FIELD: usize = 72;
/// ECDSA P-384 with SHA-384.
const ALGORITHM_ECDSA_P384_SHA384: u32 = 1;

/// Why bytes are not a report.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReportError {
    /// Another length.
    #[error("Report has {0} bytes; it must have {REPORT_LENGTH}")]
    Length(usize),
    /// A version nobody here knows.
    #[error("Report version {0} is not supported; known are 2 to 5")]
    Version(u32),
    /// A signature algorithm nobody here knows.
    #[error("Signature algorithm {0} is not supported; known is 1 (ECDSA P-384 with SHA-384)")]
    Algorithm(u32),
    /// A reserved range that is not zero.
    #[error("Reserved bytes at 0x{0:03x} are not zero")]
    Reserved(usize),
    /// A signature larger than the group's order can be.
    #[error("Signature does not fit P-384")]
    Signature,
}

/// Which key signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum SigningKey {
    /// Versioned chip endorsement key.
    Vcek,
    /// Versioned loaded endorsement key.
    Vlek,
}

/// KEY_INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct KeyInfo(pub u32);

impl KeyInfo {
    /// Whether the author key's digest is in the report.
    pub fn author_key(self) -> bool {
        self.0 & 1 != 0
    }
    /// Whether the chip's key is masked, so that nothing was signed.
    pub fn mask_chip_key(self) -> bool {
        self.0 & 2 != 0
    }
    /// The key that signed, if it is one of the known two.
    pub fn signing_key(self) -> Option<SigningKey> {
        match self.0 >> 2 & 7 {
            0 => Some(SigningKey::Vcek),
            1 => Some(SigningKey::Vlek),
            _ => None,
        }
    }
    /// Bits without a meaning.
    pub fn reserved(self) -> u32 {
        self.0 & !0x1f
    }
}

/// POLICY: what the guest's owner allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct GuestPolicy(pub u64);

impl GuestPolicy {
    /// Simultaneous multithreading is allowed.
    pub const SMT: u64 = 1 << 16;
    /// Must be one.
    pub const RESERVED_ONE: u64 = 1 << 17;
    /// A migration agent is allowed.
    pub const MIGRATE_MA: u64 = 1 << 18;
    /// The host may read and change the guest.
    pub const DEBUG: u64 = 1 << 19;
    /// Only one socket is allowed.
    pub const SINGLE_SOCKET: u64 = 1 << 20;
    /// CXL memory and devices are allowed.
    pub const CXL: u64 = 1 << 21;
    /// Memory encryption must be AES-256 XTS.
    pub const MEM_AES_256_XTS: u64 = 1 << 22;
    /// Power reporting (RAPL) must be off.
    pub const RAPL_DISABLED: u64 = 1 << 23;
    /// Ciphertext hiding must be on.
    pub const CIPHERTEXT_HIDING: u64 = 1 << 24;
    /// Pages of the guest may not be swapped.
    pub const PAGE_SWAP_DISABLED: u64 = 1 << 25;
    const KNOWN: u64 = 0x03ff_ffff;

    /// Whether a bit is set.
    pub fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }
    /// Bits without a known meaning.
    pub fn unknown(self) -> u64 {
        self.0 & !Self::KNOWN
    }
    /// Lowest ABI version the guest runs on: major, minor.
    pub fn abi(self) -> (u8, u8) {
        ((self.0 >> 8) as u8, self.0 as u8)
    }
}

/// PLATFORM_INFO: how the machine is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PlatformInfo(pub u64);

impl PlatformInfo {
    /// Simultaneous multithreading is on.
    pub const SMT: u64 = 1;
    /// Transparent memory encryption is on.
    pub const TSME: u64 = 1 << 1;
    /// Error-correcting memory.
    pub const ECC: u64 = 1 << 2;
    /// Power reporting is off.
    pub const RAPL_DISABLED: u64 = 1 << 3;
    /// Ciphertext hiding is on.
    pub const CIPHERTEXT_HIDING: u64 = 1 << 4;
    /// The memory was checked for aliases since the last reset.
    pub const ALIAS_CHECK: u64 = 1 << 5;
    /// SEV-TIO is on.
    pub const TIO: u64 = 1 << 7;

    /// Whether a bit is set.
    pub fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }
}

/// Firmware version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct FirmwareVersion {
    /// ABI major.
    pub major: u8,
    /// ABI minor.
    pub minor: u8,
    /// Build.
    pub build: u8,
}

/// A report, decoded. Fields are as they stand there; TCBs are still bytes, because their layout is
/// the product's.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the names are those of the specification")]
pub struct Report<'a> {
    pub raw: &'a [u8; REPORT_LENGTH],
    pub version: u32,
    pub guest_svn: u32,
    pub policy: GuestPolicy,
    pub family_id: [u8; 16],
    pub image_id: [u8; 16],
    pub vmpl: u32,
    pub current_tcb: [u8; 8],
    pub platform_info: PlatformInfo,
    pub key_info: KeyInfo,
    pub report_data: [u8; 64],
    pub measurement: [u8; 48],
    pub host_data: [u8; 32],
    pub id_key_digest: [u8; 48],
    pub author_key_digest: [u8; 48],
    pub report_id: [u8; 32],
    pub report_id_ma: [u8; 32],
    pub reported_tcb: [u8; 8],
    /// CPUID family, model, stepping; version 3 and later.
    pub cpuid: Option<(u8, u8, u8)>,
    pub chip_id: [u8; 64],
    pub committed_tcb: [u8; 8],
    pub current_version: FirmwareVersion,
    pub committed_version: FirmwareVersion,
    pub launch_tcb: [u8; 8],
    /// Launch and current mitigation vectors; version 5 and later.
    pub mitigations: Option<(u64, u64)>,
    /// `r ‖ s`, big endian, 48 bytes each.
    pub signature: [u8; 96],
}

impl<'a> Report<'a> {
    /// Reads a report.
    ///
    /// # Errors
    /// When it is not a report of a known version.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ReportError> {
        let raw: &[u8; REPORT_LENGTH] = bytes
            .try_into()
            .map_err(|_| ReportError::Length(bytes.len()))?;
        let version = u32_at(raw, 0);
        if !(2..=5).contains(&version) {
            return Err(ReportError::Version(version));
        }
        let algorithm = u32_at(raw, 0x34);
        if algorithm != ALGORITHM_ECDSA_P384_SHA384 {
            return Err(ReportError::Algorithm(algorithm));
        }
        // Later versions took their fields out of what was reserved before.
        let cpuid_end = if version >= 3 { 0x18b } else { 0x188 };
        let mitigation_end = if version >= 5 { 0x208 } else { 0x1f8 };
        let reserved = [
            (0x4c, 0x50),
            (cpuid_end, 0x1a0),
            (0x1eb, 0x1ec),
            (0x1ef, 0x1f0),
            (mitigation_end, 0x2a0),
            (0x330, 0x4a0),
        ];
        for (from, to) in reserved {
            if raw[from..to].iter().any(|b| *b != 0) {
                return Err(ReportError::Reserved(from));
            }
        }
        let firmware = |at: usize| FirmwareVersion {
            build: raw[at],
            minor: raw[at + 1],
            major: raw[at + 2],
        };
        Ok(Self {
            raw,
            version,
            guest_svn: u32_at(raw, 0x04),
            policy: GuestPolicy(u64_at(raw, 0x08)),
            family_id: array_at(raw, 0x10),
            image_id: array_at(raw, 0x20),
            vmpl: u32_at(raw, 0x30),
            current_tcb: array_at(raw, 0x38),
            platform_info: PlatformInfo(u64_at(raw, 0x40)),
            key_info: KeyInfo(u32_at(raw, 0x48)),
            report_data: array_at(raw, 0x50),
            measurement: array_at(raw, 0x90),
            host_data: array_at(raw, 0xc0),
            id_key_digest: array_at(raw, 0xe0),
            author_key_digest: array_at(raw, 0x110),
            report_id: array_at(raw, 0x140),
            report_id_ma: array_at(raw, 0x160),
            reported_tcb: array_at(raw, 0x180),
            cpuid: (version >= 3).then(|| (raw[0x188], raw[0x189], raw[0x18a])),
            chip_id: array_at(raw, 0x1a0),
            committed_tcb: array_at(raw, 0x1e0),
            current_version: firmware(0x1e8),
            committed_version: firmware(0x1ec),
            launch_tcb: array_at(raw, 0x1f0),
            mitigations: (version >= 5).then(|| (u64_at(raw, 0x1f8), u64_at(raw, 0x200))),
            signature: signature(raw)?,
        })
    }

    /// The bytes that are signed.
    pub fn signed(&self) -> &'a [u8] {
        &self.raw[..SIGNED_LENGTH]
    }

    /// The product by CPUID; `None` for version 2 and for unknown models.
    pub fn product(&self) -> Option<Product> {
        self.cpuid
            .and_then(|(family, model, _)| Product::from_cpuid(family, model))
    }

    /// Everything the report says, for policies and for people.
    pub fn claims(&self, product: Option<Product>) -> serde_json::Value {
        let tcb = |bytes: [u8; 8]| match product.and_then(|p| Tcb::from_bytes(bytes, p)) {
            Some(tcb) => serde_json::json!(tcb),
            None => serde_json::json!(hex(&bytes)),
        };
        let policy = self.policy;
        let platform = self.platform_info;
        let version = |v: FirmwareVersion| format!("{}.{}.{}", v.major, v.minor, v.build);
        serde_json::json!({
            "version": self.version,
            "product": product,
            "cpuid": self.cpuid.map(|(f, m, s)| serde_json::json!({"family": f, "model": m, "stepping": s})),
            "guest_svn": self.guest_svn,
            "policy": {
                "raw": format!("0x{:x}", policy.0),
                "abi": format!("{}.{}", policy.abi().0, policy.abi().1),
                "smt": policy.has(GuestPolicy::SMT),
                "migrate_ma": policy.has(GuestPolicy::MIGRATE_MA),
                "debug": policy.has(GuestPolicy::DEBUG),
                "single_socket": policy.has(GuestPolicy::SINGLE_SOCKET),
                "cxl": policy.has(GuestPolicy::CXL),
                "mem_aes_256_xts": policy.has(GuestPolicy::MEM_AES_256_XTS),
                "rapl_disabled": policy.has(GuestPolicy::RAPL_DISABLED),
                "ciphertext_hiding": policy.has(GuestPolicy::CIPHERTEXT_HIDING),
                "page_swap_disabled": policy.has(GuestPolicy::PAGE_SWAP_DISABLED),
            },
            "platform_info": {
                "raw": format!("0x{:x}", platform.0),
                "smt": platform.has(PlatformInfo::SMT),
                "tsme": platform.has(PlatformInfo::TSME),
                "ecc": platform.has(PlatformInfo::ECC),
                "rapl_disabled": platform.has(PlatformInfo::RAPL_DISABLED),
                "ciphertext_hiding": platform.has(PlatformInfo::CIPHERTEXT_HIDING),
                "alias_check": platform.has(PlatformInfo::ALIAS_CHECK),
                "tio": platform.has(PlatformInfo::TIO),
            },
            "signing_key": self.key_info.signing_key(),
            "author_key": self.key_info.author_key(),
            "mask_chip_key": self.key_info.mask_chip_key(),
            "vmpl": self.vmpl,
            "family_id": hex(&self.family_id),
            "image_id": hex(&self.image_id),
            "report_data": hex(&self.report_data),
            "measurement": hex(&self.measurement),
            "host_data": hex(&self.host_data),
            "id_key_digest": hex(&self.id_key_digest),
            "author_key_digest": hex(&self.author_key_digest),
            "report_id": hex(&self.report_id),
            "report_id_ma": hex(&self.report_id_ma),
            "chip_id": hex(&self.chip_id),
            "reported_tcb": tcb(self.reported_tcb),
            "current_tcb": tcb(self.current_tcb),
            "committed_tcb": tcb(self.committed_tcb),
            "launch_tcb": tcb(self.launch_tcb),
            "current_version": version(self.current_version),
            "committed_version": version(self.committed_version),
            "launch_mitigations": self.mitigations.map(|m| format!("0x{:x}", m.0)),
            "current_mitigations": self.mitigations.map(|m| format!("0x{:x}", m.1)),
        })
    }
}

fn signature(raw: &[u8; REPORT_LENGTH]) -> Result<[u8; 96], ReportError> {
    let mut out = [0; 96];
    for (i, half) in out.chunks_exact_mut(48).enumerate() {
        let field = &raw[SIGNED_LENGTH + i * SIGNATURE_FIELD..][..SIGNATURE_FIELD];
        if field[48..].iter().any(|b| *b != 0) {
            return Err(ReportError::Signature);
        }
        half.copy_from_slice(&field[..48]);
        half.reverse();
    }
    Ok(out)
}

fn array_at<const N: usize>(raw: &[u8; REPORT_LENGTH], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&raw[at..at + N]);
    out
}

fn u32_at(raw: &[u8; REPORT_LENGTH], at: usize) -> u32 {
    u32::from_le_bytes(array_at(raw, at))
}

fn u64_at(raw: &[u8; REPORT_LENGTH], at: usize) -> u64 {
    u64::from_le_bytes(array_at(raw, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_lengths_versions_and_algorithms_are_refused() {
        assert_eq!(Report::parse(&[0; 3]).unwrap_err(), ReportError::Length(3));
        let mut raw = [0; REPORT_LENGTH];
        for version in [0u32, 1, 6, u32::MAX] {
            raw[..4].copy_from_slice(&version.to_le_bytes());
            assert_eq!(
                Report::parse(&raw).unwrap_err(),
                ReportError::Version(version)
            );
        }
        raw[..4].copy_from_slice(&2u32.to_le_bytes());
        assert_eq!(Report::parse(&raw).unwrap_err(), ReportError::Algorithm(0));
        raw[0x34] = 1;
        assert!(Report::parse(&raw).is_ok());
        raw[0x188] = 0x19;
        assert_eq!(
            Report::parse(&raw).unwrap_err(),
            ReportError::Reserved(0x188)
        );
        raw[0] = 3;
        assert!(Report::parse(&raw).is_ok());
        raw[0x2a0 + 71] = 1;
        assert_eq!(Report::parse(&raw).unwrap_err(), ReportError::Signature);
    }
}
