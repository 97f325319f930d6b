//! Program `sealpod-attest`.
fn main() {}
