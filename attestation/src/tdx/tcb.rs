//! TCB evaluation: which level a platform reaches, and how the platform's, the TDX module's and the
//! quoting enclave's levels merge (Intel PCS API, appendix "TCB evaluation"; TD 1.5 is judged at its
//! launch and as it runs now).

use std::fmt;

use serde::{Deserialize, Serialize};

use super::collateral::{QeIdentity, TcbInfo, TdxModule};
use super::pck::Pck;
use super::quote::{EnclaveReport, TdBody};
use crate::encoding::hex;
use crate::time::Timestamp;

/// Status of a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are Intel's")]
pub enum TcbStatus {
    UpToDate,
    SWHardeningNeeded,
    ConfigurationNeeded,
    ConfigurationAndSWHardeningNeeded,
    OutOfDate,
    OutOfDateConfigurationNeeded,
    TDRelaunchAdvised,
    TDRelaunchAdvisedConfigurationNeeded,
    Revoked,
}

use TcbStatus::*;

impl fmt::Display for TcbStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl TcbStatus {
    /// Merges the status of a component (TDX module, quoting enclave) into the platform's: only an
    /// outdated or revoked component counts.
    pub fn merge_component(self, component: Self) -> Self {
        match (component, self) {
            (Revoked, _) => Revoked,
            (OutOfDate, UpToDate | SWHardeningNeeded) => OutOfDate,
            (OutOfDate, ConfigurationNeeded | ConfigurationAndSWHardeningNeeded) => {
                OutOfDateConfigurationNeeded
            }
            (OutOfDateConfigurationNeeded, UpToDate | SWHardeningNeeded | OutOfDate) => {
                OutOfDateConfigurationNeeded
            }
            (ConfigurationNeeded, UpToDate) => ConfigurationNeeded,
            (ConfigurationNeeded, SWHardeningNeeded) => ConfigurationAndSWHardeningNeeded,
            (_, platform) => platform,
        }
    }

    /// Merges the status at launch (self) with the one of the TCB that runs now: a TD that was
    /// launched on an outdated module which has been updated since should be relaunched.
    pub fn merge_current(self, current: Self) -> Self {
        let needs_configuration = |s| {
            matches!(
                s,
                ConfigurationNeeded
                    | ConfigurationAndSWHardeningNeeded
                    | OutOfDateConfigurationNeeded
            )
        };
        match (self, current) {
            (Revoked, _) | (_, Revoked) => Revoked,
            (
                OutOfDate | OutOfDateConfigurationNeeded,
                OutOfDate | OutOfDateConfigurationNeeded,
            ) => self,
            (OutOfDate | OutOfDateConfigurationNeeded, _)
                if needs_configuration(self) || needs_configuration(current) =>
            {
                TDRelaunchAdvisedConfigurationNeeded
            }
            (OutOfDate | OutOfDateConfigurationNeeded, _) => TDRelaunchAdvised,
            // Current below launch happens only with forged or mixed data; the worse one counts.
            (_, OutOfDate | OutOfDateConfigurationNeeded) => current,
            _ => self,
        }
    }
}

/// Why no level could be determined.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TcbError {
    /// The platform is below all levels.
    #[error(
        "No matching TCB level: platform's CPUSVN {0}, PCESVN {1}, TEE_TCB_SVN {2} is below all of them"
    )]
    NoLevel(String, u16, String),
    /// No such module version in the TCB info.
    #[error("TCB info has no TDX module identity {0}")]
    NoModuleIdentity(String),
    /// The module is below all its levels.
    #[error("TDX module's ISVSVN {0} is below all its TCB levels")]
    NoModuleLevel(u8),
    /// The module is not Intel's, or a debug one.
    #[error("TDX module's {0} is {1}; the TCB info has {2}")]
    Module(&'static str, String, String),
    /// The quoting enclave is not Intel's TD quoting enclave.
    #[error("Quoting enclave's {0} is {1}; its identity has {2}")]
    Qe(&'static str, String, String),
    /// The quoting enclave is below all its levels.
    #[error("Quoting enclave's ISVSVN {0} is below all its TCB levels")]
    NoQeLevel(u16),
}

/// The level that was reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TcbLevel {
    /// Its status.
    pub status: TcbStatus,
    /// The oldest date of what was merged.
    pub date: Timestamp,
    /// Security advisories that apply.
    pub advisories: Vec<String>,
}

impl TcbLevel {
    fn add(&mut self, status: TcbStatus, date: Timestamp, advisories: &[String]) {
        self.status = status;
        self.date = self.date.min(date);
        for id in advisories {
            if !self.advisories.contains(id) {
                self.advisories.push(id.clone());
            }
        }
    }
}

/// Level of platform and TDX module for a TD.
///
/// # Errors
/// When no level matches or the TDX module is not the one in the TCB info.
pub(super) fn platform_level(
    info: &TcbInfo,
    pck: &Pck,
    body: &TdBody,
) -> Result<TcbLevel, TcbError> {
    check_module(info, body)?;
    let mut level = level_of(info, pck, &body.tee_tcb_svn)?;
    if let Some((current_svn, _)) = &body.v1_5 {
        let current = level_of(info, pck, current_svn)?;
        level.add(
            level.status.merge_current(current.status),
            current.date,
            &current.advisories,
        );
    }
    Ok(level)
}

fn level_of(info: &TcbInfo, pck: &Pck, tee_tcb_svn: &[u8; 16]) -> Result<TcbLevel, TcbError> {
    let module_version = tee_tcb_svn[1];
    // The TDX module's own numbers (components 0 and 1) are judged by its identity, if it has one.
    let skip = if module_version > 0 { 2 } else { 0 };
    let all = |have: &[u8], need: &[u8]| have.iter().zip(need).all(|(h, n)| h >= n);
    let mut levels: Vec<_> = info.tcb_levels.iter().collect();
    // The order of the list carries no meaning; the highest numbers come first.
    levels.sort_by(|a, b| {
        (b.tcb.sgx, b.tcb.pcesvn, b.tcb.tdx).cmp(&(a.tcb.sgx, a.tcb.pcesvn, a.tcb.tdx))
    });
    let found = levels
        .into_iter()
        .find(|l| {
            all(&pck.cpu_svn, &l.tcb.sgx)
                && pck.pce_svn >= l.tcb.pcesvn
                && all(&tee_tcb_svn[skip..], &l.tcb.tdx[skip..])
        })
        .ok_or_else(|| TcbError::NoLevel(hex(&pck.cpu_svn), pck.pce_svn, hex(tee_tcb_svn)))?;
    let mut level = TcbLevel {
        status: found.tcb_status,
        date: found.tcb_date,
        advisories: found.advisory_ids.clone(),
    };
    if module_version > 0 {
        let id = format!("TDX_{module_version:02X}");
        let identity = info
            .tdx_module_identities
            .iter()
            .find(|i| i.id == id)
            .ok_or(TcbError::NoModuleIdentity(id))?;
        let mut levels: Vec<_> = identity.tcb_levels.iter().collect();
        levels.sort_by_key(|l| std::cmp::Reverse(l.tcb.isvsvn));
        let module = levels
            .into_iter()
            .find(|l| u16::from(tee_tcb_svn[0]) >= l.tcb.isvsvn)
            .ok_or(TcbError::NoModuleLevel(tee_tcb_svn[0]))?;
        level.add(
            level.status.merge_component(module.tcb_status),
            module.tcb_date,
            &module.advisory_ids,
        );
    }
    Ok(level)
}

fn check_module(info: &TcbInfo, body: &TdBody) -> Result<(), TcbError> {
    let version = body.tee_tcb_svn[1];
    let id = format!("TDX_{version:02X}");
    let module: &TdxModule = if version > 0 {
        &info
            .tdx_module_identities
            .iter()
            .find(|i| i.id == id)
            .ok_or(TcbError::NoModuleIdentity(id))?
            .module
    } else {
        info.tdx_module
            .as_ref()
            .ok_or_else(|| TcbError::NoModuleIdentity("tdxModule".into()))?
    };
    if body.mr_signer_seam != module.mrsigner {
        return Err(TcbError::Module(
            "MRSIGNERSEAM",
            hex(&body.mr_signer_seam),
            hex(&module.mrsigner),
        ));
    }
    let masked: Vec<u8> = body
        .seam_attributes
        .iter()
        .zip(module.attributes_mask)
        .map(|(a, m)| a & m)
        .collect();
    if masked != module.attributes {
        return Err(TcbError::Module(
            "SEAMATTRIBUTES",
            hex(&body.seam_attributes),
            hex(&module.attributes),
        ));
    }
    Ok(())
}

/// Level of the quoting enclave, after its identity has been checked.
///
/// # Errors
/// When it is another enclave or below all levels.
pub(super) fn qe_level(
    identity: &QeIdentity,
    report: &EnclaveReport,
) -> Result<TcbLevel, TcbError> {
    let masked = |value: &[u8], mask: &[u8]| {
        value
            .iter()
            .zip(mask)
            .map(|(v, m)| v & m)
            .collect::<Vec<u8>>()
    };
    let differs =
        |what, found: &[u8], expected: &[u8]| TcbError::Qe(what, hex(found), hex(expected));
    if report.mr_signer != identity.mrsigner {
        return Err(differs("MRSIGNER", &report.mr_signer, &identity.mrsigner));
    }
    if report.isv_prod_id != identity.isvprodid {
        return Err(TcbError::Qe(
            "ISVPRODID",
            report.isv_prod_id.to_string(),
            identity.isvprodid.to_string(),
        ));
    }
    if masked(&report.misc_select, &identity.miscselect_mask)
        != masked(&identity.miscselect, &identity.miscselect_mask)
    {
        return Err(differs(
            "MISCSELECT",
            &report.misc_select,
            &identity.miscselect,
        ));
    }
    if masked(&report.attributes, &identity.attributes_mask)
        != masked(&identity.attributes, &identity.attributes_mask)
    {
        return Err(differs(
            "ATTRIBUTES",
            &report.attributes,
            &identity.attributes,
        ));
    }
    let mut levels: Vec<_> = identity.tcb_levels.iter().collect();
    levels.sort_by_key(|l| std::cmp::Reverse(l.tcb.isvsvn));
    let level = levels
        .into_iter()
        .find(|l| report.isv_svn >= l.tcb.isvsvn)
        .ok_or(TcbError::NoQeLevel(report.isv_svn))?;
    Ok(TcbLevel {
        status: level.tcb_status,
        date: level.tcb_date,
        advisories: level.advisory_ids.clone(),
    })
}

/// Merges the quoting enclave's level into the platform's.
pub(super) fn merge(mut platform: TcbLevel, qe: &TcbLevel) -> TcbLevel {
    platform.add(
        platform.status.merge_component(qe.status),
        qe.date,
        &qe.advisories,
    );
    platform
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_merge_to_the_worse() {
        assert_eq!(UpToDate.merge_component(OutOfDate), OutOfDate);
        assert_eq!(
            ConfigurationNeeded.merge_component(OutOfDate),
            OutOfDateConfigurationNeeded
        );
        assert_eq!(UpToDate.merge_component(Revoked), Revoked);
        assert_eq!(OutOfDate.merge_component(UpToDate), OutOfDate);
    }

    #[test]
    fn an_updated_module_under_an_old_td_advises_a_relaunch() {
        assert_eq!(OutOfDate.merge_current(UpToDate), TDRelaunchAdvised);
        assert_eq!(
            OutOfDate.merge_current(ConfigurationNeeded),
            TDRelaunchAdvisedConfigurationNeeded
        );
        assert_eq!(OutOfDate.merge_current(OutOfDate), OutOfDate);
        assert_eq!(UpToDate.merge_current(Revoked), Revoked);
        assert_eq!(UpToDate.merge_current(OutOfDate), OutOfDate);
    }
}
