//! Intel TDX: quotes, collateral, TCB evaluation, event logs, and the verifier.

mod checks;
mod collateral;
mod endorsed;
mod event_log;
mod pck;
mod quote;
mod tcb;
mod td_report;
mod verify;

pub use collateral::{Bundle, BundleError, QeIdentity, TcbInfo};
pub use event_log::{Event, EventLogError, looks_like_event_log, parse_event_log, replay};
pub use pck::{Pck, PckError};
pub use quote::{EnclaveReport, Quote, QuoteError, TdBody};
pub use tcb::{TcbError, TcbLevel, TcbStatus};
pub use td_report::{TD_REPORT_LENGTH, TdReport, TdReportError};
pub use verify::{TdxLimits, TdxPolicy, verify};
