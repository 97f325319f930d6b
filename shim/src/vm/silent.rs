//! What the log has of a guest that does not answer.

use super::Vm;
use crate::child::Tail;

/// Lines, and bytes of each, that are logged of what a VMM says of itself.
const LINES: usize = 64;
const LINE_BYTES: usize = 600;

/// Logs where the VM stands. What its VMM says may be the guest's word.
pub(crate) async fn log_where_it_stands(vm: &dyn Vm) {
    let lines = match vm.describe().await {
        Ok(lines) => lines,
        // It has ended, which is told by itself, or does not answer either.
        Err(e) => return tracing::info!("{}", crate::error::chain(&e)),
    };
    let mut printable = Tail::new(LINES, LINE_BYTES);
    for line in &lines {
        printable.push(line.as_bytes());
        printable.push(b"\n");
    }
    for line in printable.lines() {
        tracing::warn!("The guest does not answer. {line}");
    }
}
