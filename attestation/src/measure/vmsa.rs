//! The save area of a vCPU as QEMU and KVM set it up at launch (AMD64 Architecture Programmer's
//! Manual, volume 2, table B-4).

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

const PAGE: usize = 4096;
/// Most vCPUs a KVM guest can have.
pub const MAX_VCPUS: u32 = 4096;
/// Where the first vCPU begins.
pub(super) const RESET_VECTOR: u32 = 0xffff_fff0;

/// vCPU models of QEMU, by the processor they present.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum CpuType {
    /// EPYC, all versions.
    Naples,
    /// EPYC-Rome, all versions.
    Rome,
    /// EPYC-Milan, all versions.
    Milan,
    /// EPYC-Genoa, all versions.
    Genoa,
    /// EPYC-Turin, all versions.
    Turin,
}

/// No vCPU model that QEMU has for SEV-SNP.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "Unknown vCPU type {0:?}; known are EPYC, EPYC-Rome, EPYC-Milan, EPYC-Genoa, EPYC-Turin, with or without -vN"
)]
pub struct CpuTypeError(String);

impl CpuType {
    /// CPUID 1 EAX: family, model and stepping, which the reset state carries in RDX.
    pub fn signature(self) -> u32 {
        let (family, model, stepping): (u32, u32, u32) = match self {
            Self::Naples => (23, 1, 2),
            Self::Rome => (23, 49, 0),
            Self::Milan => (25, 1, 1),
            Self::Genoa => (25, 17, 0),
            Self::Turin => (26, 0, 0),
        };
        (family - 15) << 20 | (model >> 4) << 16 | 15 << 8 | (model & 15) << 4 | stepping
    }
}

impl FromStr for CpuType {
    type Err = CpuTypeError;

    fn from_str(text: &str) -> Result<Self, CpuTypeError> {
        let base = match text.rsplit_once("-v") {
            Some((base, version))
                if !version.is_empty() && version.bytes().all(|b| b.is_ascii_digit()) =>
            {
                base
            }
            _ => text,
        };
        match base {
            "EPYC" | "EPYC-IBPB" => Ok(Self::Naples),
            "EPYC-Rome" => Ok(Self::Rome),
            "EPYC-Milan" => Ok(Self::Milan),
            "EPYC-Genoa" => Ok(Self::Genoa),
            "EPYC-Turin" => Ok(Self::Turin),
            _ => Err(CpuTypeError(text.chars().take(40).collect())),
        }
    }
}

impl fmt::Display for CpuType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Naples => "EPYC",
            Self::Rome => "EPYC-Rome",
            Self::Milan => "EPYC-Milan",
            Self::Genoa => "EPYC-Genoa",
            Self::Turin => "EPYC-Turin",
        })
    }
}

/// The page of a vCPU that begins at `eip`.
pub(super) fn page(eip: u32, cpu: CpuType, guest_features: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    // Selector, attributes, limit; the base stays zero but for the code segment.
    let mut segment = |at: usize, selector: u16, attributes: u16, base: u64| {
        put(at, &selector.to_le_bytes());
        put(at + 2, &attributes.to_le_bytes());
        put(at + 4, &0xffffu32.to_le_bytes());
        put(at + 8, &base.to_le_bytes());
    };
    for data_segment in [0x00, 0x20, 0x30, 0x40, 0x50] {
        segment(data_segment, 0, 0x93, 0);
    }
    segment(0x10, 0xf000, 0x9b, u64::from(eip & 0xffff_0000));
    segment(0x60, 0, 0, 0);
    segment(0x70, 0, 0x82, 0);
    segment(0x80, 0, 0, 0);
    segment(0x90, 0, 0x8b, 0);
    let quads: [(usize, u64); 11] = [
        (0x0d0, 0x1000),                     // EFER: SVME
        (0x148, 0x40),                       // CR4: MCE
        (0x158, 0x10),                       // CR0: ET
        (0x160, 0x400),                      // DR7
        (0x168, 0xffff_0ff0),                // DR6
        (0x170, 2),                          // RFLAGS
        (0x178, u64::from(eip & 0xffff)),    // RIP
        (0x268, 0x0007_0406_0007_0406),      // PAT
        (0x310, u64::from(cpu.signature())), // RDX
        (0x3b0, guest_features),             // SEV_FEATURES
        (0x3e8, 1),                          // XCR0: x87
    ];
    for (at, value) in quads {
        put(at, &value.to_le_bytes());
    }
    put(0x408, &0x1f80u32.to_le_bytes()); // MXCSR
    put(0x410, &0x37fu16.to_le_bytes()); // x87 control word
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_known_with_and_without_version() {
        assert_eq!("EPYC-v4".parse(), Ok(CpuType::Naples));
        assert_eq!("EPYC-Milan".parse(), Ok(CpuType::Milan));
        assert_eq!("EPYC-Turin-v2".parse(), Ok(CpuType::Turin));
        assert!("Skylake-Server".parse::<CpuType>().is_err());
        assert_eq!(CpuType::Milan.signature(), 0x00a0_0f11);
        assert_eq!(CpuType::Rome.signature(), 0x0083_0f10);
    }
}
