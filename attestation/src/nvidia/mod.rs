//! NVIDIA: attestation reports of GPUs and NVSwitches, reference integrity manifests, and the
//! verifier for one device, several, and a protected-PCIe node.

mod device;
mod evidence;
mod manifests;
mod report;
mod rim;
mod topology;
mod verify;
mod xml;
mod xml_builder;

pub use evidence::{Device, EvidenceError, parse_evidence_json};
pub use report::{Mode, Opaque, Report, ReportError};
pub use rim::{Rim, RimError, RimKind};
pub use verify::{NvidiaLimits, NvidiaPolicy, verify};
pub use xml::{Element, XmlError};
