//! The TCB version of the AMD secure processor: security patch levels, in the layout of a product.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Product;

/// Security patch levels (SEV-SNP ABI specification, TCB_VERSION).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tcb {
    /// Firmware management controller; Turin only, zero elsewhere.
    pub fmc: u8,
    /// Boot loader of the secure processor.
    pub bootloader: u8,
    /// Operating system of the secure processor.
    pub tee: u8,
    /// SEV-SNP firmware.
    pub snp: u8,
    /// Lowest microcode patch level of all cores.
    pub microcode: u8,
}

impl Tcb {
    /// From the eight bytes of a report. `None` if a reserved byte is set.
    pub fn from_bytes(bytes: [u8; 8], product: Product) -> Option<Self> {
        let b = bytes;
        let (tcb, reserved) = match product {
            Product::Milan | Product::Genoa => (
                Self {
                    fmc: 0,
                    bootloader: b[0],
                    tee: b[1],
                    snp: b[6],
                    microcode: b[7],
                },
                &b[2..6],
            ),
            Product::Turin => (
                Self {
                    fmc: b[0],
                    bootloader: b[1],
                    tee: b[2],
                    snp: b[3],
                    microcode: b[7],
                },
                &b[4..7],
            ),
        };
        reserved.iter().all(|r| *r == 0).then_some(tcb)
    }

    /// The eight bytes in a report.
    pub fn to_bytes(self, product: Product) -> [u8; 8] {
        match product {
            Product::Milan | Product::Genoa => [
                self.bootloader,
                self.tee,
                0,
                0,
                0,
                0,
                self.snp,
                self.microcode,
            ],
            Product::Turin => [
                self.fmc,
                self.bootloader,
                self.tee,
                self.snp,
                0,
                0,
                0,
                self.microcode,
            ],
        }
    }

    /// Whether every component is at least that of `minimum`.
    pub fn at_least(&self, minimum: &Self) -> bool {
        self.fmc >= minimum.fmc
            && self.bootloader >= minimum.bootloader
            && self.tee >= minimum.tee
            && self.snp >= minimum.snp
            && self.microcode >= minimum.microcode
    }
}

impl fmt::Display for Tcb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.fmc != 0 {
            write!(f, "fmc {} ", self.fmc)?;
        }
        write!(
            f,
            "bootloader {} tee {} snp {} microcode {}",
            self.bootloader, self.tee, self.snp, self.microcode
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_differ_and_reserved_bytes_are_refused() {
        let bytes = [1, 2, 3, 4, 0, 0, 0, 8];
        let turin = Tcb::from_bytes(bytes, Product::Turin).unwrap();
        assert_eq!(
            turin,
            Tcb {
                fmc: 1,
                bootloader: 2,
                tee: 3,
                snp: 4,
                microcode: 8
            }
        );
        assert_eq!(turin.to_bytes(Product::Turin), bytes);
        assert_eq!(Tcb::from_bytes(bytes, Product::Milan), None);
        let milan = Tcb::from_bytes([3, 0, 0, 0, 0, 0, 8, 115], Product::Milan).unwrap();
        assert_eq!(
            milan,
            Tcb {
                fmc: 0,
                bootloader: 3,
                tee: 0,
                snp: 8,
                microcode: 115
            }
        );
    }

    #[test]
    fn one_lower_component_is_below_the_minimum() {
        let tcb = Tcb {
            fmc: 0,
            bootloader: 3,
            tee: 0,
            snp: 8,
            microcode: 115,
        };
        assert!(tcb.at_least(&tcb));
        assert!(!tcb.at_least(&Tcb { snp: 9, ..tcb }));
        assert!(!tcb.at_least(&Tcb { fmc: 1, ..tcb }));
    }
}
