//! AMD product lines: which processor belongs to which root key and TCB layout.

use std::fmt;

use serde::Serialize;

/// A product line with its own root key. Genoa's serves Bergamo and Siena too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Product {
    /// EPYC 7003.
    Milan,
    /// EPYC 9004, 97x4 (Bergamo) and 8004 (Siena).
    Genoa,
    /// EPYC 9005.
    Turin,
}

impl Product {
    /// From CPUID family and model as a report of version 3 or later carries them.
    pub fn from_cpuid(family: u8, model: u8) -> Option<Self> {
        match (family, model) {
            (0x19, 0x00..=0x0f) => Some(Self::Milan),
            (0x19, 0x10..=0x1f | 0xa0..=0xaf) => Some(Self::Genoa),
            (0x1a, 0x00..=0x11) => Some(Self::Turin),
            _ => None,
        }
    }

    /// From the product name in a VCEK (`Milan-B0`) or VLEK (`Milan`).
    pub fn from_name(name: &str) -> Option<Self> {
        match name.split('-').next()? {
            "Milan" => Some(Self::Milan),
            "Genoa" | "Bergamo" | "Siena" => Some(Self::Genoa),
            "Turin" => Some(Self::Turin),
            _ => None,
        }
    }

    /// From the name of the product line in AMD's key service.
    pub fn from_line(name: &str) -> Option<Self> {
        [Self::Milan, Self::Genoa, Self::Turin]
            .into_iter()
            .find(|p| p.to_string() == name)
    }
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Milan => "Milan",
            Self::Genoa => "Genoa",
            Self::Turin => "Turin",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_belong_to_their_product_line_and_unknown_ones_to_none() {
        assert_eq!(Product::from_cpuid(0x19, 0x01), Some(Product::Milan));
        assert_eq!(Product::from_cpuid(0x19, 0x11), Some(Product::Genoa));
        assert_eq!(Product::from_cpuid(0x19, 0xa0), Some(Product::Genoa));
        assert_eq!(Product::from_cpuid(0x1a, 0x02), Some(Product::Turin));
        assert_eq!(Product::from_cpuid(0x19, 0x20), None);
        assert_eq!(Product::from_cpuid(0x1a, 0x12), None);
        assert_eq!(Product::from_cpuid(0x17, 0x31), None);
        assert_eq!(Product::from_name("Siena-B1"), Some(Product::Genoa));
        assert_eq!(Product::from_name("Venice"), None);
    }
}
