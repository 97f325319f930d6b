//! `-info` and `-v`: what this runtime is. Source: containerd's api/types/introspection.proto.

use containerd_shim_protos::{
    protobuf::Message,
    types::introspection::{RuntimeInfo, RuntimeVersion},
};

use super::Error;

const NAME: &str = "io.containerd.sealpod.v2";

/// One line for people.
pub(super) fn version() -> String {
    format!(
        "containerd-shim-sealpod-v2 {} (protocol {}, tasks v2 and v3)",
        env!("CARGO_PKG_VERSION"),
        sealpod_protocol::PROTOCOL_VERSION
    )
}

/// The encoded `RuntimeInfo`.
pub(super) fn runtime_info() -> Result<Vec<u8>, Error> {
    let info = RuntimeInfo {
        name: NAME.into(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    info.write_to_bytes().map_err(|e| Error::Io {
        doing: "encode the runtime's information".into(),
        source: std::io::Error::other(e),
    })
}
