//! Shim entry.
fn main() {}
