//! What `start` answers depends on who asks: containerd 2.3 and later send bootstrap parameters on
//! standard input and read a message back; 1.7 and 2.x say the highest version they know in the
//! environment and read JSON; 1.6 reads a bare address. Source: containerd's core/runtime/v2/binary.go,
//! api/runtime/bootstrap/v1.

use std::io::Read;

use containerd_shim_protos::{
    bootstrap_api::{BootstrapParams, BootstrapResult},
    protobuf::{Message, well_known_types::any::Any},
};

/// containerd's environment variable with the highest shim version it can talk to.
const MAX_VERSION: &str = "MAX_SHIM_VERSION";
/// The Task service that this shim prefers.
const PREFERRED: i32 = 3;
/// Most that is read of standard input.
const STDIN_MAX: u64 = 4 << 20;

/// How to answer, and the runtime options that came along.
#[derive(Debug)]
pub(super) struct Caller {
    form: Form,
    pub(super) options: Option<Any>,
}

#[derive(Debug, PartialEq, Eq)]
enum Form {
    Address,
    Json { version: i32 },
    Message,
}

impl Caller {
    /// Reads standard input (to its end) and the environment.
    pub(super) fn ask(id: &str) -> std::io::Result<Self> {
        let mut input = Vec::new();
        std::io::stdin()
            .lock()
            .take(STDIN_MAX)
            .read_to_end(&mut input)?;
        Ok(Self::of(
            &input,
            id,
            std::env::var(MAX_VERSION).ok().as_deref(),
        ))
    }

    fn of(input: &[u8], id: &str, max_version: Option<&str>) -> Self {
        // An `Any` has a type name where bootstrap parameters have the task's id.
        if let Ok(p) = BootstrapParams::parse_from_bytes(input)
            && p.instance_id == id
        {
            let options = p
                .extensions
                .into_iter()
                .filter_map(|e| e.value.into_option());
            return Self {
                form: Form::Message,
                options: options
                    .into_iter()
                    .find(|o| o.type_url.contains("runtimeoptions")),
            };
        }
        let options = Any::parse_from_bytes(input)
            .ok()
            .filter(|o| !o.type_url.is_empty());
        let version = max_version.and_then(|v| v.parse::<i32>().ok());
        let form = match version {
            Some(v) if v >= 2 => Form::Json {
                version: v.min(PREFERRED),
            },
            _ => Form::Address,
        };
        Self { form, options }
    }

    /// The reply for a shim that listens on `address`.
    pub(super) fn reply(&self, address: &str) -> Result<Vec<u8>, protobuf::Error> {
        match &self.form {
            Form::Address => Ok(address.as_bytes().to_vec()),
            Form::Json { version } => Ok(serde_json::json!({
                "version": version, "address": address, "protocol": "ttrpc"
            })
            .to_string()
            .into_bytes()),
            Form::Message => BootstrapResult {
                version: PREFERRED,
                address: address.into(),
                protocol: "ttrpc".into(),
                ..Default::default()
            }
            .write_to_bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(caller: &Caller) -> String {
        String::from_utf8(caller.reply("unix:///s").expect("reply")).expect("utf-8")
    }

    #[test]
    fn each_containerd_gets_its_form() {
        assert_eq!(text(&Caller::of(b"", "i", None)), "unix:///s");
        let json = text(&Caller::of(b"", "i", Some("3")));
        assert!(
            json.contains("\"version\":3") && json.contains("unix:///s"),
            "{json}"
        );
        assert!(text(&Caller::of(b"", "i", Some("2"))).contains("\"version\":2"));
        let params = BootstrapParams {
            instance_id: "i".into(),
            ..Default::default()
        };
        let bytes = params.write_to_bytes().expect("encode");
        let caller = Caller::of(&bytes, "i", None);
        let reply = caller.reply("unix:///s").expect("reply");
        let result = BootstrapResult::parse_from_bytes(&reply).expect("decode");
        assert_eq!((result.version, result.address.as_str()), (3, "unix:///s"));
    }

    #[test]
    fn options_of_older_callers_are_kept() {
        let any = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: vec![1],
            ..Default::default()
        };
        let caller = Caller::of(&any.write_to_bytes().expect("encode"), "i", None);
        assert_eq!(caller.options, Some(any));
        assert_eq!(caller.form, Form::Address);
    }
}
