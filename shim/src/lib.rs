//! shim
pub mod host_cgroup;
pub mod ledger;
pub mod child;
pub mod vm;
