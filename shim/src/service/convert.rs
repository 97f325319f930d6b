//! Between containerd's messages and the shim's types.

use containerd_shim_protos::{
    protobuf::{CodedInputStream, well_known_types::any::Any},
    types::task::Status as TaskStatus,
};

use protobuf::Message;
use sealpod_protocol::cri::PodSandboxConfig;

use crate::{container::Status, error::Error};

/// Types of runtime options that carry a configuration path (fields: type_url = 1, config_path = 2).
const OPTIONS_TYPE: &str = "runtimeoptions.v1.Options";
/// Type of a sandbox's options when the CRI leaves pods to their shim.
const POD_CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";
/// Field number of `config_path`, as a length-delimited tag.
const CONFIG_PATH_TAG: u32 = (2 << 3) | 2;

/// The configuration file that a client's runtime options name. Options of another type are another
/// runtime's and say nothing here.
///
/// # Errors
/// Options that are not what their type says.
pub(crate) fn config_path(options: Option<&Any>) -> Result<Option<String>, Error> {
    let Some(options) = options.filter(|o| o.type_url.ends_with(OPTIONS_TYPE)) else {
        return Ok(None);
    };
    let parse = || -> protobuf::Result<Option<String>> {
        let mut input = CodedInputStream::from_bytes(&options.value);
        let mut path = None;
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            if tag == CONFIG_PATH_TAG {
                path = Some(input.read_string()?);
            } else {
                protobuf::rt::skip_field_for_tag(tag, &mut input)?;
            }
        }
        Ok(path.filter(|p| !p.is_empty()))
    };
    parse().map_err(|e| Error::invalid(format!("Runtime options are not {OPTIONS_TYPE}: {e}")))
}

/// What the CRI says of a pod, where the options are its pod configuration.
///
/// # Errors
/// Options that are not what their type says.
pub(super) fn pod_config(options: Option<&Any>) -> Result<Option<PodSandboxConfig>, Error> {
    let Some(options) = options.filter(|o| o.type_url.ends_with(POD_CONFIG_TYPE)) else {
        return Ok(None);
    };
    let parsed = PodSandboxConfig::parse_from_bytes(&options.value);
    let parsed = parsed
        .map_err(|e| Error::invalid(format!("Sandbox options are not {POD_CONFIG_TYPE}: {e}")))?;
    Ok(Some(parsed))
}

pub(super) fn status(status: Status) -> TaskStatus {
    match status {
        Status::Created => TaskStatus::CREATED,
        Status::Running => TaskStatus::RUNNING,
        Status::Paused => TaskStatus::PAUSED,
        Status::Stopped => TaskStatus::STOPPED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: &[u8]) -> Any {
        Any {
            type_url: type_url.into(),
            value: value.into(),
            ..Default::default()
        }
    }

    #[test]
    fn the_configuration_path_is_found_and_foreign_options_are_left_alone() -> Result<(), Error> {
        let own = any("runtimeoptions.v1.Options", b"\x0a\x01t\x12\x06/etc/x");
        assert_eq!(config_path(Some(&own))?.as_deref(), Some("/etc/x"));
        let foreign = any("containerd.runc.v1.Options", b"\x12\x06/etc/x");
        assert_eq!(config_path(Some(&foreign))?, None);
        assert_eq!(config_path(None)?, None);
        let torn = any("runtimeoptions.v1.Options", b"\x12\x7f/etc");
        assert!(config_path(Some(&torn)).is_err());
        Ok(())
    }
}
