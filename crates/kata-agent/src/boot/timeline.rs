//! How long the stages of the guest's boot took, for the host.

use kata_api::BootStage;
use rustix::time::{ClockId, clock_gettime};

/// Stages so far, on the clock that the kernel starts at its own start.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    stages: Vec<BootStage>,
}

impl Timeline {
    /// Begins at the agent's start: all before was the kernel's.
    #[must_use]
    pub fn begin() -> Self {
        let kernel =
            BootStage { layer: "kernel".into(), name: "boot".into(), start_us: 0, duration_us: now_us() };
        Self { stages: vec![kernel] }
    }

    /// Begins after what others did.
    #[must_use]
    pub fn after(stages: Vec<BootStage>) -> Self {
        Self { stages }
    }

    /// Runs a stage of the agent's and notes how long it took.
    pub fn stage<T>(&mut self, name: &str, work: impl FnOnce() -> T) -> T {
        let start_us = now_us();
        let result = work();
        self.note(name, start_us);
        result
    }

    /// Notes a stage from `start_us` until now.
    pub fn note(&mut self, name: &str, start_us: u64) {
        let duration_us = now_us().saturating_sub(start_us);
        self.stages.push(BootStage { layer: "agent".into(), name: name.into(), start_us, duration_us });
    }

    /// All stages, in order of start.
    #[must_use]
    pub fn stages(&self) -> Vec<BootStage> {
        self.stages.clone()
    }
}

/// Microseconds since the kernel started its clock.
#[must_use]
pub fn now_us() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let part = |number: i64| u64::try_from(number).unwrap_or_default();
    part(now.tv_sec) * 1_000_000 + part(now.tv_nsec) / 1_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_follow_the_kernels_and_do_not_overlap() {
        let mut timeline = Timeline::begin();
        assert_eq!(timeline.stage("one", || 7), 7);
        timeline.stage("two", || ());
        let stages = timeline.stages();
        assert_eq!((stages[0].layer.as_str(), stages[0].start_us), ("kernel", 0));
        assert_eq!(stages[1].name, "one");
        for pair in stages.windows(2) {
            assert!(pair[0].start_us + pair[0].duration_us <= pair[1].start_us, "{stages:?}");
        }
    }
}
