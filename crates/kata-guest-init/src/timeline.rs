//! How long each step took: a line of the kernel's log each, and a file for the agent.

use std::io;
use std::path::Path;

use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::fault::{Level, say};

/// Where the steps are kept, for whoever draws the whole boot: `[{layer, name, start_us, duration_us}]`, in microseconds
/// since the kernel started its clock.
pub const FILE: &str = "/run/kata-guest-init/timeline.json";

/// One step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    layer: &'static str,
    name: String,
    start_us: u64,
    duration_us: u64,
}

/// Steps so far.
#[derive(Debug, Default)]
pub struct Timeline {
    steps: Vec<Step>,
}

impl Timeline {
    /// Runs a step and notes how long it took, also of one that fails.
    pub fn step<T>(&mut self, name: &str, work: impl FnOnce() -> T) -> T {
        let start_us = now_us();
        let result = work();
        let duration_us = now_us().saturating_sub(start_us);
        say(Level::Info, &format!("{name}: {}.{:03} ms", duration_us / 1000, duration_us % 1000));
        self.steps.push(Step { layer: "guest-init", name: name.to_owned(), start_us, duration_us });
        result
    }

    /// Writes what there is to `path`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        std::fs::write(path, serde_json::to_vec(&self.steps)?)
    }
}

fn now_us() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let part = |number: i64| u64::try_from(number).unwrap_or_default();
    part(now.tv_sec) * 1_000_000 + part(now.tv_nsec) / 1_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_kept_in_order_and_do_not_overlap() {
        let mut timeline = Timeline::default();
        assert_eq!(timeline.step("one", || 7), 7);
        timeline.step("two", || ());
        let [one, two] = timeline.steps.as_slice() else { panic!("{timeline:?}") };
        assert!(one.start_us + one.duration_us <= two.start_us);
        let file = tempfile::NamedTempFile::new().unwrap();
        timeline.write(file.path()).unwrap();
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert!(text.starts_with(r#"[{"layer":"guest-init","name":"one","start_us":"#), "{text}");
    }
}
