//! The CNI network of an environment: one bridge inside its network namespace. Writes the
//! configuration; containerd and the plugins do the rest.

use std::path::Path;

use anyhow::{Context, Result};

/// Address of the bridge, which is the "host" to pods.
pub const HOST: &str = "10.88.0.1";
/// Its name; it stays when the last pod has gone.
pub const BRIDGE: &str = "sptest0";

/// Writes the configuration folder that containerd's CRI plugin and `ctr --cni` read.
///
/// # Errors
/// Where it cannot be written.
pub fn write_config(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir)?;
    let conf = serde_json::json!({
        "cniVersion": "0.4.0",
        "name": "sealpod-test",
        "plugins": [{
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": true,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "ranges": [[{ "subnet": "10.88.0.0/16", "gateway": HOST }]],
                "routes": [{ "dst": "0.0.0.0/0" }],
            },
        }],
    });
    let path = dir.join("10-sealpod-test.conflist");
    std::fs::write(&path, conf.to_string()).with_context(|| path.display().to_string())
}
