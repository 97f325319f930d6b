//! Real evidence: every file of the evidence folder gets the verdict that its manifest states, for
//! the stated reason. The folder is not part of the project: `SEALPOD_EVIDENCE_DIR` names it, by
//! default `../shared/evidence` beside the workspace. Without it the tests say loudly that they
//! skipped; with it, a file that no case covers is a failure.

#![expect(clippy::unwrap_used, reason = "tests panic to fail")]

mod folder;
mod manifests;
mod mutation;
mod nvidia;
mod snp;
mod speed;
mod tdx;

use folder::{Case, Folder};

#[test]
fn every_file_gets_its_verdict() {
    let Some(folder) = Folder::open() else { return };
    let mut cases: Vec<Case> = Vec::new();
    cases.extend(snp::cases());
    cases.extend(tdx::cases());
    cases.extend(nvidia::cases());
    folder.run(&cases);
}
