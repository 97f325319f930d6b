//! The simulator: evidence in the manufacturers' formats, made by a software of ours under a local
//! CA. Verifiers have no code for it: it is another set of trust anchors, in a file that somebody
//! has to name, and production anchors refuse everything that is minted here.
//!
//! [`Ca`] holds the keys; `mint_snp`, `mint_tdx` and `mint_gpu` make evidence, good or with a named
//! [`Defect`], together with the collateral that goes with it.

mod defect;
mod encode;
mod issue;
mod keys;
mod nvidia;
mod rim;
mod snp;
mod tdx;
mod tdx_collateral;

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

pub use defect::Defect;
pub use nvidia::GpuClaims;
pub use snp::SnpClaims;
pub use tdx::{TdxClaims, TdxForm};

use crate::anchors::AnchorFile;
use crate::crypto::sha384;
use crate::encoding::hex;
use crate::snp::Product;
use crate::time::Timestamp;
use issue::Window;
use keys::{Key, Kind};

const DAY: i64 = 86_400;
/// Name of the anchor file in a CA's folder.
pub const ANCHORS_FILE: &str = "anchors.json";

/// Why nothing was minted.
#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    /// The library could not make a key or a signature.
    #[error("Cryptographic library failed")]
    Library,
    /// A key file that holds something else.
    #[error("Not a private key of the expected kind")]
    Key,
    /// A file of the CA.
    #[error("Simulator CA file {0:?}")]
    File(std::path::PathBuf, #[source] std::io::Error),
    /// A CA is there already.
    #[error("Folder {0:?} holds a simulator CA already")]
    Exists(std::path::PathBuf),
    /// A defect of another kind of evidence.
    #[error("Defect {0} cannot be minted here; known are {1}")]
    Defect(String, String),
    /// A defect in what this evidence does not carry.
    #[error("This layout of evidence does not carry what the defect spoils")]
    NoEffect,
    /// A setting that no hardware has.
    #[error("{0}")]
    Setting(&'static str),
}

/// The keys that a CA keeps: file name and kind.
const KEYS: [(&str, Kind); 14] = [
    ("amd-root", Kind::Rsa),
    ("amd-signing", Kind::Rsa),
    ("amd-chip", Kind::P384),
    ("intel-root", Kind::P256),
    ("intel-platform", Kind::P256),
    ("intel-tcb-signing", Kind::P256),
    ("intel-pck", Kind::P256),
    ("nvidia-root", Kind::P384),
    ("nvidia-identity", Kind::P384),
    ("nvidia-provisioner", Kind::P384),
    ("nvidia-device", Kind::P384),
    ("nvidia-firmware", Kind::P384),
    ("rim-root", Kind::P384),
    ("rim-signer", Kind::P384),
];

/// A file that goes with evidence: its name and content, as `Collateral::add` reads it.
pub type File = (String, Vec<u8>);

/// What was minted.
#[derive(Clone, Debug)]
pub struct Minted {
    /// Report, or quote.
    pub report: Vec<u8>,
    /// What a host passes along: AMD's certificate table, a GPU's chain in PEM; empty for TDX.
    pub endorsements: Vec<u8>,
    /// What a verifier has to have: CRL, TDX collateral, RIMs, OCSP responses, event log.
    pub collateral: Vec<File>,
}

/// A local CA in the place of the manufacturers.
pub struct Ca {
    keys: BTreeMap<&'static str, Key>,
    now: Timestamp,
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ca(…)")
    }
}

impl Ca {
    /// A CA in memory only. `now` is the time around which everything is issued.
    ///
    /// # Errors
    /// When the library fails.
    pub fn in_memory(now: Timestamp) -> Result<Self, SimulateError> {
        let mut keys = BTreeMap::new();
        for (name, kind) in KEYS {
            keys.insert(name, Key::generate(kind)?);
        }
        Ok(Self { keys, now })
    }

    /// A new CA in a folder, which is made: key files that only the owner reads, and the anchor file.
    ///
    /// # Errors
    /// When there is one already, or a file cannot be written.
    pub fn create(dir: &Path, now: Timestamp) -> Result<Self, SimulateError> {
        if dir.join(ANCHORS_FILE).exists() {
            return Err(SimulateError::Exists(dir.into()));
        }
        let ca = Self::in_memory(now)?;
        std::fs::create_dir_all(dir).map_err(|e| SimulateError::File(dir.into(), e))?;
        for (name, key) in &ca.keys {
            write(&dir.join(format!("{name}.p8")), 0o600, &key.pkcs8)?;
        }
        // Last: a folder without it is no CA.
        write(&dir.join(ANCHORS_FILE), 0o644, ca.anchors_file().as_bytes())?;
        Ok(ca)
    }

    /// The CA of a folder.
    ///
    /// # Errors
    /// When a file is missing or broken.
    pub fn open(dir: &Path, now: Timestamp) -> Result<Self, SimulateError> {
        let mut keys = BTreeMap::new();
        for (name, kind) in KEYS {
            let path = dir.join(format!("{name}.p8"));
            let bytes = std::fs::read(&path).map_err(|e| SimulateError::File(path, e))?;
            keys.insert(name, Key::from_pkcs8(kind, bytes)?);
        }
        Ok(Self { keys, now })
    }

    /// The same CA at another time.
    #[must_use]
    pub fn at(mut self, now: Timestamp) -> Self {
        self.now = now;
        self
    }

    /// The anchor file under which what is minted here is accepted.
    pub fn anchors_file(&self) -> String {
        let pin = |name| hex(&sha384(&self.key(name).spki()));
        let amd = [Product::Milan, Product::Genoa, Product::Turin]
            .map(|p| (p.to_string(), vec![pin("amd-root")]));
        let file = AnchorFile {
            amd: amd.into(),
            intel: vec![pin("intel-root")],
            nvidia_device: vec![pin("nvidia-root")],
            nvidia_rim: vec![pin("rim-root")],
        };
        serde_json::to_string_pretty(&file).unwrap_or_default() + "\n"
    }

    fn key(&self, name: &'static str) -> &Key {
        &self.keys[name]
    }

    /// Long-lived: ten years around now.
    fn years(&self) -> Window {
        let at = |days: i64| Timestamp(self.now.0 + days * DAY);
        (at(-365), at(9 * 365))
    }

    /// What has to be renewed: a month.
    fn month(&self) -> Window {
        (
            Timestamp(self.now.0 - DAY),
            Timestamp(self.now.0 + 29 * DAY),
        )
    }

    /// Over since yesterday.
    fn over(&self) -> Window {
        (
            Timestamp(self.now.0 - 30 * DAY),
            Timestamp(self.now.0 - DAY),
        )
    }
}

fn write(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), SimulateError> {
    let open = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path);
    open.and_then(|mut file| file.write_all(bytes))
        .map_err(|e| SimulateError::File(path.into(), e))
}
