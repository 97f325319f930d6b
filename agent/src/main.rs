//! The guest's PID 1. It has no options: what it does it is told over vsock.

use std::sync::Arc;

fn main() {
    sealpod_agent::init::main(|service| Arc::new(service));
}
