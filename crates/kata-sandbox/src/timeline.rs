//! The stages of a pod's start, on the owner's clock.

use std::time::{Duration, Instant};

use kata_api::Announcement;
use serde::{Deserialize, Serialize};

use crate::agent_client::guest_text;

/// The stage in which a machine is started that boots.
pub(crate) const BOOTED: &str = "start";
/// The stage that one has instead which goes on where its template stood.
pub(crate) const COPIED: &str = "restore";

/// Who spent the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layer {
    /// The owner process and its helpers.
    Host,
    /// The virtual machine monitor and the firmware.
    Vmm,
    /// The guest's kernel.
    Kernel,
    /// The agent.
    Agent,
    /// A container's creation and start.
    Container,
}

impl Layer {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Vmm => "vmm",
            Self::Kernel => "kernel",
            Self::Agent => "agent",
            Self::Container => "container",
        }
    }
}

/// One stage of a pod's start. Stages may overlap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// Who.
    pub layer: Layer,
    /// What was done.
    pub name: String,
    /// Microseconds since the owner process began.
    pub start_us: u64,
    /// Microseconds it took.
    pub duration_us: u64,
}

/// A stopwatch that starts with the owner process. Each task fills one of its own; the actor merges them.
#[derive(Clone, Debug)]
pub(crate) struct Timeline {
    zero: Instant,
    stages: Vec<Stage>,
}

impl Timeline {
    pub(crate) fn new(zero: Instant) -> Self {
        Self { zero, stages: Vec::new() }
    }

    /// An empty one with the same zero, to be [merged](Self::merge) later.
    pub(crate) fn fork(&self) -> Self {
        Self::new(self.zero)
    }

    pub(crate) fn merge(&mut self, other: Self) {
        self.stages.extend(other.stages);
        self.stages.sort_by_key(|stage| stage.start_us);
    }

    pub(crate) fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// Records a stage that began at `start` and ends now.
    pub(crate) fn add(&mut self, layer: Layer, name: impl Into<String>, start: Instant) {
        self.span(layer, name, start, start.elapsed());
    }

    fn span(&mut self, layer: Layer, name: impl Into<String>, start: Instant, length: Duration) {
        let (start_us, duration_us) = (micros(start.saturating_duration_since(self.zero)), micros(length));
        self.stages.push(Stage { layer, name: name.into(), start_us, duration_us });
    }

    /// Adds what the guest reports of its boot.
    ///
    /// The clocks are tied together at the announcement: the end of the guest's last stage is the moment at which it
    /// was `received`, so every guest stage is late by the few microseconds that the line took to arrive. What lies
    /// between `vmm_ran` and the zero of the guest's clock is firmware and kernel decompression.
    pub(crate) fn add_guest(&mut self, announcement: &Announcement, vmm_ran: Instant, received: Instant) {
        let guest_now_us = announcement
            .timeline
            .iter()
            .map(|stage| stage.start_us.saturating_add(stage.duration_us))
            .max()
            .unwrap_or(0);
        let guest_zero = received.checked_sub(Duration::from_micros(guest_now_us)).unwrap_or(vmm_ran);
        self.span(Layer::Vmm, "firmware", vmm_ran, guest_zero.saturating_duration_since(vmm_ran));
        for stage in &announcement.timeline {
            let layer = if stage.layer == "kernel" { Layer::Kernel } else { Layer::Agent };
            let Some(start) = guest_zero.checked_add(Duration::from_micros(stage.start_us)) else { continue };
            self.span(layer, guest_text(&stage.name), start, Duration::from_micros(stage.duration_us));
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use kata_api::BootStage;

    use super::*;

    #[test]
    fn guest_stages_end_when_the_announcement_arrives() {
        let zero = Instant::now();
        let at = |ms| zero + Duration::from_millis(ms);
        let stage = |layer: &str, start_us, duration_us| BootStage {
            layer: layer.to_owned(),
            name: "x".to_owned(),
            start_us,
            duration_us,
        };
        let announcement = Announcement {
            agent_version: "1".to_owned(),
            kernel: "6.1".to_owned(),
            timeline: vec![stage("kernel", 0, 300_000), stage("agent", 300_000, 100_000)],
        };
        let mut timeline = Timeline::new(zero);
        timeline.add_guest(&announcement, at(50), at(1000));
        let spans: Vec<_> = timeline.stages().iter().map(|s| (s.layer, s.start_us, s.duration_us)).collect();
        assert_eq!(
            spans,
            [
                (Layer::Vmm, 50_000, 550_000),
                (Layer::Kernel, 600_000, 300_000),
                (Layer::Agent, 900_000, 100_000)
            ]
        );
    }
}
