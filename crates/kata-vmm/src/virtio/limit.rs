//! Limits of rates: a bucket that fills with tokens at the rate, from which work is paid.
//!
//! Work may begin while the bucket is not empty and takes all it costs, so that the level falls below zero; then the next waits
//! until the debt is paid. One piece of work that costs more than the bucket holds is slow, but never stuck.

use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

/// A token, in the unit of levels: what comes in a nanosecond at one token a second.
const TOKEN: i128 = 1_000_000_000;
/// What part of a second's tokens a bucket holds.
const BURST: i128 = 10;

/// Tokens that come at a steady rate.
#[derive(Debug)]
pub struct Bucket {
    /// Tokens a second.
    rate: i128,
    /// [`TOKEN`]s that are there; below zero they are owed.
    level: i128,
    /// Most [`TOKEN`]s that it holds.
    most: i128,
    /// When the level was right.
    at: Instant,
}

impl Bucket {
    /// A full bucket, of a tenth of a second's tokens, at least one.
    pub fn new(per_second: NonZeroU64, now: Instant) -> Bucket {
        let rate = i128::from(per_second.get());
        Bucket::full(rate, (rate * TOKEN / BURST).max(TOKEN), now)
    }

    /// A full bucket of so many tokens.
    pub fn of(tokens: u32, per_second: NonZeroU64, now: Instant) -> Bucket {
        Bucket::full(per_second.get().into(), i128::from(tokens) * TOKEN, now)
    }

    fn full(rate: i128, most: i128, now: Instant) -> Bucket {
        Bucket { rate, level: most, most, at: now }
    }

    /// How long work has to wait; `None` where it may begin.
    pub fn wait(&mut self, now: Instant) -> Option<Duration> {
        let passed = now.saturating_duration_since(self.at).as_nanos();
        let come = i128::try_from(passed).unwrap_or(i128::MAX).saturating_mul(self.rate);
        self.level = self.level.saturating_add(come).min(self.most);
        self.at = self.at.max(now);
        if self.level > 0 {
            return None;
        }
        let nanoseconds = -self.level / self.rate + 1;
        Some(Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)))
    }

    /// Takes tokens out.
    pub fn spend(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub(i128::from(tokens) * TOKEN);
    }
}

/// Limits of bytes and of requests a second, with the timer that says when there are tokens again.
#[derive(Debug)]
pub struct Limits {
    bytes: Option<Bucket>,
    requests: Option<Bucket>,
    timer: OwnedFd,
}

impl Limits {
    /// `None` where there is nothing to limit.
    pub fn new(bytes: Option<NonZeroU64>, requests: Option<NonZeroU64>) -> std::io::Result<Option<Limits>> {
        if bytes.is_none() && requests.is_none() {
            return Ok(None);
        }
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let bucket = |rate: Option<NonZeroU64>| rate.map(|rate| Bucket::new(rate, Instant::now()));
        Ok(Some(Limits { bytes: bucket(bytes), requests: bucket(requests), timer }))
    }

    /// Whether a request may begin. Where not, the timer fires when it may.
    pub fn admit(&mut self) -> bool {
        let now = Instant::now();
        let buckets = [&mut self.bytes, &mut self.requests];
        let Some(wait) = buckets.into_iter().flatten().filter_map(|bucket| bucket.wait(now)).max() else {
            return true;
        };
        let wait =
            Timespec::try_from(wait).unwrap_or_else(|_| Timespec { tv_sec: i64::from(u32::MAX), tv_nsec: 0 });
        let once = Itimerspec { it_interval: Timespec::default(), it_value: wait };
        match timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
            Ok(_) => false,
            Err(e) => {
                // Better too fast than stuck.
                tracing::warn!(error = %e, "the timer of a rate limit cannot be set");
                true
            }
        }
    }

    /// A request of so many bytes began.
    pub fn spend(&mut self, bytes: usize) {
        if let Some(bucket) = &mut self.bytes {
            bucket.spend(u64::try_from(bytes).unwrap_or(u64::MAX));
        }
        if let Some(bucket) = &mut self.requests {
            bucket.spend(1);
        }
    }
}

impl AsFd for Limits {
    /// The timer: to be watched edge-triggered, it is never read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rate(tokens: u64) -> NonZeroU64 {
        NonZeroU64::new(tokens).unwrap()
    }

    #[test]
    fn costly_work_begins_and_the_next_waits_until_it_is_paid() {
        let start = Instant::now();
        let mut bucket = Bucket::new(rate(1000), start);
        assert_eq!(bucket.wait(start), None);
        // A hundred tokens were there.
        bucket.spend(1100);
        let wait = bucket.wait(start).unwrap();
        assert_eq!(wait, Duration::from_nanos(1_000_000_001));
        assert!(bucket.wait(start + Duration::from_millis(999)).is_some());
        assert_eq!(bucket.wait(start + wait), None);
    }

    #[test]
    fn rest_fills_no_more_than_the_bucket() {
        let start = Instant::now();
        let mut bucket = Bucket::new(rate(1000), start);
        let later = start + Duration::from_secs(3600);
        assert_eq!(bucket.wait(later), None);
        bucket.spend(100);
        assert!(bucket.wait(later).is_some());
    }

    proptest! {
        /// However work comes, what was begun in a span is no more than the rate, the bucket and one piece of work.
        #[test]
        fn rate_is_never_exceeded(
            per_second in 1u64..u64::MAX / 2,
            work in prop::collection::vec((0u64..1_000_000, 0u64..2_000_000_000), 1..60),
        ) {
            let start = Instant::now();
            let (mut bucket, mut now) = (Bucket::new(rate(per_second), start), start);
            let (mut begun, mut last) = (0u128, 0u128);
            for (cost, pause) in work {
                now += Duration::from_nanos(pause);
                if bucket.wait(now).is_none() {
                    bucket.spend(cost);
                    begun += u128::from(cost);
                    last = u128::from(cost);
                }
            }
            let passed = now.duration_since(start).as_nanos();
            let rate = u128::from(per_second);
            let most = rate * passed / 1_000_000_000 + (rate / 10).max(1) + last + 1;
            prop_assert!(begun <= most, "{begun} of {most}");
        }
    }
}
