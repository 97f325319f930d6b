//! Counters of the service, in the text format of Prometheus (version 0.0.4). Every label has a fixed
//! set of values: no client can make a new series.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// What is counted by what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    Challenge,
    Appraise,
    Jwks,
    Health,
    Metrics,
    KbsAuth,
    KbsAttest,
    KbsResource,
    Unknown,
}

const ROUTES: [(Route, &str); 9] = [
    (Route::Challenge, "challenge"),
    (Route::Appraise, "appraise"),
    (Route::Jwks, "jwks"),
    (Route::Health, "healthz"),
    (Route::Metrics, "metrics"),
    (Route::KbsAuth, "kbs_auth"),
    (Route::KbsAttest, "kbs_attest"),
    (Route::KbsResource, "kbs_resource"),
    (Route::Unknown, "unknown"),
];

/// Why a connection was closed before it was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Too many from one address.
    Address,
    /// No TLS within the time.
    Handshake,
    /// Header or body not within the time, or broken.
    Request,
    /// Beyond the time a connection has.
    Lifetime,
}

const CUTS: [(Cut, &str); 4] = [
    (Cut::Address, "address"),
    (Cut::Handshake, "handshake"),
    (Cut::Request, "request"),
    (Cut::Lifetime, "lifetime"),
];

/// How an appraisal ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Judged {
    Accepted,
    Refused,
    Failed,
}

const JUDGED: [(Judged, &str); 3] = [
    (Judged::Accepted, "accepted"),
    (Judged::Refused, "refused"),
    (Judged::Failed, "failed"),
];

/// Upper bounds of the histogram, seconds.
const BUCKETS: [f64; 8] = [0.001, 0.002, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5];

/// All counters.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    /// By route, then by the first digit of the status.
    requests: [[AtomicU64; 4]; ROUTES.len()],
    cuts: [AtomicU64; CUTS.len()],
    judged: [AtomicU64; JUDGED.len()],
    times: [AtomicU64; BUCKETS.len() + 1],
    time_nanos: AtomicU64,
    /// Connections that are open.
    pub(crate) connections: AtomicU64,
    /// Reloads that worked, and that did not.
    pub(crate) reloads: [AtomicU64; 2],
}

impl Metrics {
    pub(crate) fn request(&self, route: Route, status: u16) {
        let class = usize::from(status / 100).clamp(2, 5) - 2;
        self.requests[route as usize][class].fetch_add(1, Relaxed);
    }

    pub(crate) fn cut(&self, why: Cut) {
        self.cuts[why as usize].fetch_add(1, Relaxed);
    }

    pub(crate) fn judged(&self, how: Judged, took: Duration) {
        self.judged[how as usize].fetch_add(1, Relaxed);
        let seconds = took.as_secs_f64();
        let bucket = BUCKETS.iter().position(|b| seconds <= *b);
        self.times[bucket.unwrap_or(BUCKETS.len())].fetch_add(1, Relaxed);
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.time_nanos.fetch_add(nanos, Relaxed);
    }

    /// Everything as text; `gauges` are values that others keep: name, help, value.
    pub(crate) fn text(&self, gauges: &[(&str, &str, u64)]) -> String {
        let mut out = String::with_capacity(4096);
        head(&mut out, "requests_total", "counter", "Requests answered");
        for (route, name) in ROUTES {
            for (class, count) in self.requests[route as usize].iter().enumerate() {
                let (count, class) = (count.load(Relaxed), class + 2);
                let labels = format!("route=\"{name}\",status=\"{class}xx\"");
                line(&mut out, "requests_total", &labels, count);
            }
        }
        head(
            &mut out,
            "connections_cut_total",
            "counter",
            "Connections closed on a client",
        );
        for (why, name) in CUTS {
            let count = self.cuts[why as usize].load(Relaxed);
            line(
                &mut out,
                "connections_cut_total",
                &format!("reason=\"{name}\""),
                count,
            );
        }
        head(&mut out, "appraisals_total", "counter", "Evidence judged");
        for (how, name) in JUDGED {
            let count = self.judged[how as usize].load(Relaxed);
            line(
                &mut out,
                "appraisals_total",
                &format!("verdict=\"{name}\""),
                count,
            );
        }
        head(
            &mut out,
            "reloads_total",
            "counter",
            "Reloads of certificate, policy, reference values and collateral",
        );
        for (count, name) in self.reloads.iter().zip(["done", "failed"]) {
            line(
                &mut out,
                "reloads_total",
                &format!("result=\"{name}\""),
                count.load(Relaxed),
            );
        }
        self.histogram(&mut out);
        head(&mut out, "connections", "gauge", "Open connections");
        line(&mut out, "connections", "", self.connections.load(Relaxed));
        for (name, help, value) in gauges {
            head(&mut out, name, "gauge", help);
            line(&mut out, name, "", *value);
        }
        out
    }

    fn histogram(&self, out: &mut String) {
        const NAME: &str = "appraisal_seconds";
        head(
            out,
            NAME,
            "histogram",
            "Time of an appraisal, the audit record included",
        );
        let mut sum = 0;
        for (at, count) in self.times.iter().enumerate() {
            sum += count.load(Relaxed);
            let bound = BUCKETS.get(at).map_or("+Inf".to_owned(), f64::to_string);
            line(
                out,
                "appraisal_seconds_bucket",
                &format!("le=\"{bound}\""),
                sum,
            );
        }
        let seconds = self.time_nanos.load(Relaxed) as f64 / 1e9;
        let _ = writeln!(out, "sealpod_attest_{NAME}_sum {seconds}");
        line(out, "appraisal_seconds_count", "", sum);
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP sealpod_attest_{name} {help}.");
    let _ = writeln!(out, "# TYPE sealpod_attest_{name} {kind}");
}

fn line(out: &mut String, name: &str, labels: &str, value: u64) {
    let _ = if labels.is_empty() {
        writeln!(out, "sealpod_attest_{name} {value}")
    } else {
        writeln!(out, "sealpod_attest_{name}{{{labels}}} {value}")
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_count_is_found_under_its_own_name() {
        let metrics = Metrics::default();
        for (n, (route, _)) in ROUTES.into_iter().enumerate() {
            assert_eq!(route as usize, n);
        }
        metrics.request(Route::KbsResource, 404);
        metrics.cut(Cut::Lifetime);
        metrics.judged(Judged::Refused, Duration::from_millis(3));
        metrics.judged(Judged::Accepted, Duration::from_secs(9));
        let text = metrics.text(&[("sessions", "Sessions", 7)]);
        for line in [
            "sealpod_attest_requests_total{route=\"kbs_resource\",status=\"4xx\"} 1",
            "sealpod_attest_connections_cut_total{reason=\"lifetime\"} 1",
            "sealpod_attest_appraisals_total{verdict=\"refused\"} 1",
            "sealpod_attest_appraisal_seconds_bucket{le=\"0.002\"} 0",
            "sealpod_attest_appraisal_seconds_bucket{le=\"0.005\"} 1",
            "sealpod_attest_appraisal_seconds_bucket{le=\"+Inf\"} 2",
            "sealpod_attest_appraisal_seconds_count 2",
            "sealpod_attest_sessions 7",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
    }
}
