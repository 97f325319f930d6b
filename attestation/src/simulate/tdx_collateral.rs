//! Intel's collateral as text: TCB info (version 3) and QE identity (version 2) for the simulated
//! platform.

use serde_json::json;

use super::Defect;
use super::tdx::{FMSPC, PCE_SVN, QE_SIGNER};
use crate::encoding::hex;
use crate::time::Timestamp;

pub(super) fn tcb_info(
    window: (Timestamp, Timestamp),
    defect: Option<Defect>,
) -> serde_json::Value {
    let is = |d| defect == Some(d);
    let components = |svns: [u8; 16]| svns.map(|svn| json!({ "svn": svn }));
    let level = |cpu: u8, module_update: u8, status: &str| {
        let mut tdx = [0; 16];
        tdx[2] = module_update;
        json!({
            "tcb": {
                "sgxtcbcomponents": components([cpu; 16]),
                "pcesvn": PCE_SVN,
                "tdxtcbcomponents": components(tdx),
            },
            "tcbDate": window.0.to_string(),
            "tcbStatus": status,
        })
    };
    let module = json!({
        "mrsigner": "0".repeat(96),
        "attributes": "0".repeat(16),
        "attributesMask": "F".repeat(16),
    });
    let mut identity = module.clone();
    identity["id"] = "TDX_01".into();
    identity["tcbLevels"] = json!([
        { "tcb": { "isvsvn": 6 }, "tcbDate": window.0.to_string(), "tcbStatus": "UpToDate" },
        { "tcb": { "isvsvn": 2 }, "tcbDate": window.0.to_string(), "tcbStatus": "OutOfDate",
          "advisoryIDs": ["SIMULATED-SA-00001"] },
    ]);
    let mut fmspc = FMSPC;
    fmspc[0] ^= if is(Defect::OtherPlatform) { 0xff } else { 0 };
    let best = if is(Defect::TcbRevoked) {
        "Revoked"
    } else {
        "UpToDate"
    };
    json!({
        "id": "TDX",
        "version": 3,
        "issueDate": window.0.to_string(),
        "nextUpdate": window.1.to_string(),
        "fmspc": hex(&fmspc),
        "pceId": if is(Defect::OtherPce) { "0100" } else { "0000" },
        "tcbType": 0,
        "tcbEvaluationDataNumber": if is(Defect::OldEvaluation) { 1 } else { 18 },
        "tdxModule": module,
        "tdxModuleIdentities": [identity],
        "tcbLevels": [level(3, 5, best), level(2, 3, "OutOfDate")],
    })
}

pub(super) fn qe_identity(window: (Timestamp, Timestamp)) -> serde_json::Value {
    json!({
        "id": "TD_QE",
        "version": 2,
        "issueDate": window.0.to_string(),
        "nextUpdate": window.1.to_string(),
        "tcbEvaluationDataNumber": 18,
        "miscselect": "00000000",
        "miscselectMask": "FFFFFFFF",
        "attributes": "11000000000000000000000000000000",
        "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
        "mrsigner": hex(&QE_SIGNER),
        "isvprodid": 2,
        "tcbLevels": [
            { "tcb": { "isvsvn": 4 }, "tcbDate": window.0.to_string(), "tcbStatus": "UpToDate" },
        ],
    })
}
