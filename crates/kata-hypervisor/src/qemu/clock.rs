//! The rate of the clock that an emulated guest sees.
//!
//! Under TCG the guest's time stamp counter is the host's. A guest kernel that finds out its rate by itself measures it against
//! an emulated timer, and on a busy host that fails: q35 then falls back to a slower way, and microvm, which has no further
//! timer, hangs before its first device. So the rate is measured here and told.

use std::time::{Duration, Instant};

/// Reading both clocks takes some 100 ns, so this bounds the error to a few parts in 100 000, as good as the guest's own.
const SHORTEST: Duration = Duration::from_millis(3);
/// Readings of which the quickest counts: between its two clocks, this thread was not taken off its processor.
const READINGS: usize = 5;

/// Both clocks, at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measurement {
    ticks: u64,
    at: Instant,
}

impl Measurement {
    /// `None` where the host's counter does not run evenly, or there is none.
    pub(super) fn begin() -> Option<Self> {
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        if !runs_evenly(&cpu) {
            return None;
        }
        Self::now()
    }

    fn now() -> Option<Self> {
        let read = |_| {
            let at = Instant::now();
            Some((Self { ticks: ticks()?, at }, at.elapsed()))
        };
        (0..READINGS).filter_map(read).min_by_key(|(_, took)| *took).map(|(reading, _)| reading)
    }

    /// The counter's rate in kHz, over all the time since [`Measurement::begin`]; sleeps only where that was too short.
    pub(super) async fn end(self) -> Option<u64> {
        if let Some(rest) = SHORTEST.checked_sub(self.at.elapsed()) {
            tokio::time::sleep(rest).await;
        }
        let now = Self::now()?;
        let ticks = now.ticks.checked_sub(self.ticks)?;
        let nanoseconds = now.at.checked_duration_since(self.at)?.as_nanos();
        let khz = u128::from(ticks).checked_mul(1_000_000)?.checked_div(nanoseconds)?;
        u64::try_from(khz).ok()
    }
}

fn runs_evenly(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    ["constant_tsc", "nonstop_tsc"].iter().all(|wanted| flags.split_whitespace().any(|flag| flag == *wanted))
}

#[cfg(target_arch = "x86_64")]
fn ticks() -> Option<u64> {
    // SAFETY: every 64-bit x86 has the instruction, and Linux lets every process use it unless it asked not to.
    Some(unsafe { core::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn ticks() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counter_is_trusted_only_with_both_flags() {
        assert!(runs_evenly("flags\t\t: fpu constant_tsc rep_good nonstop_tsc\n"));
        assert!(!runs_evenly("flags\t\t: fpu constant_tsc\n"));
        assert!(!runs_evenly("model name : constant_tsc nonstop_tsc\n"));
        assert!(!runs_evenly(""));
    }

    #[tokio::test]
    async fn two_measurements_agree_within_a_thousandth() {
        let Some(first) = Measurement::begin() else {
            eprintln!("skipped: this host's time stamp counter does not run evenly");
            return;
        };
        let first = first.end().await.unwrap();
        let second = Measurement::begin().unwrap().end().await.unwrap();
        assert!(first.abs_diff(second) < first / 1000, "{first} {second} kHz");
    }
}
