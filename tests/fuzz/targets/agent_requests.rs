//! What the agent decodes before it looks at anything: each request message, the JSON documents
//! inside, and the header line of a stream. Nothing may panic, and what was read reads the same
//! after it was written again.
//!
//! The first byte of the input chooses the decoder.
#![no_main]

use libfuzzer_sys::fuzz_target;
use oci_spec::runtime::{LinuxResources, Process, Spec};
use protobuf::Message;
use sealpod_protocol::agent as messages;
use sealpod_protocol::streams::Header;

/// Decodes a message; one that can be decoded can be encoded.
fn message<M: Message + PartialEq>(bytes: &[u8]) -> Option<M> {
    let message = M::parse_from_bytes(bytes).ok()?;
    let again = message.write_to_bytes().expect("a decoded message encodes");
    let again = M::parse_from_bytes(&again).expect("and decodes");
    // Unknown fields may come out in another order.
    let known = message.unknown_fields().iter().next().is_none();
    assert!(message == again || !known, "a message changed");
    Some(message)
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, bytes)) = data.split_first() else {
        return;
    };
    match choice % 16 {
        0 => drop(message::<messages::HelloRequest>(bytes)),
        1 => drop(message::<messages::SetupSandboxRequest>(bytes)),
        2 => drop(message::<messages::Network>(bytes)),
        3 => {
            if let Some(request) = message::<messages::CreateContainerRequest>(bytes) {
                let _ = serde_json::from_slice::<Spec>(&request.spec);
                let _ = sealpod_protocol::valid_id(&request.container_id);
            }
        }
        4 => drop(message::<messages::ContainerRequest>(bytes)),
        5 => {
            if let Some(request) = message::<messages::ExecRequest>(bytes) {
                let _ = serde_json::from_slice::<Process>(&request.process);
            }
        }
        6 => drop(message::<messages::ProcessRequest>(bytes)),
        7 => drop(message::<messages::SignalRequest>(bytes)),
        8 => drop(message::<messages::ResizePtyRequest>(bytes)),
        9 => {
            if let Some(request) = message::<messages::UpdateRequest>(bytes) {
                let _ = serde_json::from_slice::<LinuxResources>(&request.resources);
            }
        }
        10 => drop(serde_json::from_slice::<Spec>(bytes)),
        11 => drop(serde_json::from_slice::<Process>(bytes)),
        12 => drop(serde_json::from_slice::<LinuxResources>(bytes)),
        13 => drop(message::<messages::Empty>(bytes)),
        _ => {
            if let Ok(header) = Header::decode(bytes) {
                assert_eq!(Header::decode(header.encode().as_bytes()), Ok(header));
            }
        }
    }
});
