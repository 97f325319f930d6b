//! `delete`: containerd calls it when a shim has died or does not answer. Everything that the pod's
//! ledger names is undone; the task counts as killed.

use containerd_shim_protos::{api::DeleteResponse, protobuf::Message};

use super::{Args, Error, Place};
use crate::{clock, ledger};

/// Exit status of a task whose shim died: SIGKILL's.
const KILLED: u32 = 128 + 9;

/// Cleans up; returns the encoded `DeleteResponse`.
pub(super) fn delete(args: &Args) -> Result<Vec<u8>, Error> {
    let noted = Place::noted_in(&args.bundle)
        .map_err(Error::io("read the pod's folder from the bundle"))?;
    if let Some(place) = noted {
        clean(args, &place)?;
    }
    let response = DeleteResponse {
        exit_status: KILLED,
        exited_at: Some(clock::now_timestamp()).into(),
        ..Default::default()
    };
    response.write_to_bytes().map_err(|e| Error::Io {
        doing: "encode the reply".into(),
        source: std::io::Error::other(e),
    })
}

fn clean(args: &Args, place: &Place) -> Result<(), Error> {
    let owner = place.owner();
    // A pod that lives keeps its VM when one of its containers is given up.
    if owner.as_deref() != Some(&args.id) && place.answers() {
        return Ok(());
    }
    if !place.dir().exists() {
        return Ok(());
    }
    let report = ledger::clean(place.dir());
    if !report.is_clean() {
        return Err(Error::Leftovers {
            dir: place.dir().into(),
            what: format!("{report:?}"),
        });
    }
    ledger::remove_tree(place.dir()).map_err(Error::io("remove the pod's folder"))
}
