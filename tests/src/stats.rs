//! Percentiles and memory figures for the benches and the demo.

use std::path::Path;

/// The value below which the share `p` (0 to 1) of the sorted samples lies, by nearest rank.
#[must_use]
pub fn percentile(samples: &[f64], p: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    if sorted.is_empty() {
        return f64::NAN;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "few samples"
    )]
    let rank = (p * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// A field of `/proc/<pid>/smaps_rollup`, kB, for instance `Pss`.
#[must_use]
pub fn smaps_kib(proc_dir: &Path, field: &str) -> Option<u64> {
    let text = std::fs::read_to_string(proc_dir.join("smaps_rollup")).ok()?;
    let line = text.lines().find(|l| l.split(':').next() == Some(field))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// PSS of a process that lies in shared memory objects (the guest's memory), KiB.
#[must_use]
pub fn memfd_pss_kib(proc_dir: &Path) -> u64 {
    let maps = std::fs::read_to_string(proc_dir.join("smaps")).unwrap_or_default();
    let mut shared = false;
    let mut sum = 0;
    for line in maps.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if !first.ends_with(':') {
            shared = line.contains("/memfd:");
        } else if first == "Pss:" && shared {
            sum += line
                .split_whitespace()
                .nth(1)
                .and_then(|n| n.parse::<u64>().ok())
                .unwrap_or(0);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let samples: Vec<f64> = (1..=20).map(f64::from).collect();
        assert!((percentile(&samples, 0.5) - 10.0).abs() < 1e-9);
        assert!((percentile(&samples, 0.95) - 19.0).abs() < 1e-9);
        assert!(percentile(&[], 0.5).is_nan());
        assert!((percentile(&[3.0], 0.95) - 3.0).abs() < 1e-9);
    }
}
