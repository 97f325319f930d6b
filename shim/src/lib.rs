//! shim
pub mod host_cgroup;
pub mod ledger;
pub mod child;
pub mod vm;
pub mod annotations;
pub mod check;
pub mod config;
pub mod network;
pub mod podfile;
pub mod sizing;
pub mod virtiofs;
