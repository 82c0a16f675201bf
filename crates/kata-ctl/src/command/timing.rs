//! Where the time of a start went.

use std::time::{Duration, Instant};

use kata_api::control::Pod;

use crate::table;

/// Takes the client's own times, and puts them beside the pod's.
pub struct Stopwatch {
    began: Instant,
    owner: Instant,
    stages: Vec<Stage>,
}

struct Stage {
    layer: String,
    name: String,
    start: Duration,
    length: Duration,
}

impl Stopwatch {
    /// Counts from `began`.
    pub fn new(began: Instant) -> Self {
        Self { began, owner: began, stages: Vec::new() }
    }

    /// The owner's own clock starts about now.
    pub fn owner_spawned(&mut self) {
        self.owner = Instant::now();
        self.stage("read the command line, spawn the owner", self.began, self.owner);
    }

    /// Notes a stage of the client's.
    pub fn stage(&mut self, name: &str, start: Instant, end: Instant) {
        self.stages.push(Stage {
            layer: "client".to_owned(),
            name: name.to_owned(),
            start: start.saturating_duration_since(self.began),
            length: end.saturating_duration_since(start),
        });
    }

    /// The report: one line for each stage, by start, then what ran the pod.
    pub fn report(mut self, pod: &Pod) -> String {
        let offset = self.owner.saturating_duration_since(self.began);
        self.stages.extend(pod.timeline.iter().map(|stage| Stage {
            layer: stage.layer.clone(),
            name: stage.name.clone(),
            start: offset + Duration::from_micros(stage.start_us),
            length: Duration::from_micros(stage.duration_us),
        }));
        self.stages.sort_by_key(|stage| stage.start);
        let milliseconds = |time: Duration| format!("{:>8.1}", time.as_secs_f64() * 1000.0);
        let header = ["AT (ms)", "TOOK (ms)", "LAYER", "STAGE"].map(str::to_owned);
        let rows = self.stages.iter().map(|stage| {
            [milliseconds(stage.start), milliseconds(stage.length), stage.layer.clone(), stage.name.clone()]
        });
        let lines: Vec<[String; 4]> = std::iter::once(header).chain(rows).collect();
        format!("{}{}", table::columns(&lines), machine(pod))
    }
}

fn machine(pod: &Pod) -> String {
    let host = rustix::system::uname();
    format!(
        "VMM     {} with {}: {}\nkernel  {} in the guest, {} on the host\nagent   {}\n",
        pod.hypervisor,
        pod.accelerator,
        pod.choice,
        pod.guest_kernel,
        host.release().to_string_lossy(),
        pod.agent_version,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_of_client_and_pod_are_told_by_their_start() {
        let began = Instant::now();
        let mut watch = Stopwatch::new(began);
        watch.owner = began + Duration::from_millis(2);
        watch.stage("create", began + Duration::from_millis(10), began + Duration::from_millis(15));
        let mut pod = Pod { hypervisor: "qemu".into(), accelerator: "tcg".into(), ..Pod::default() };
        pod.timeline.push(kata_api::control::Stage {
            layer: "vmm".into(),
            name: "spawn".into(),
            start_us: 1500,
            duration_us: 4200,
            ..Default::default()
        });
        let report = watch.report(&pod);
        let lines: Vec<&str> = report.lines().collect();
        assert_eq!(lines[1].split_whitespace().collect::<Vec<_>>(), ["3.5", "4.2", "vmm", "spawn"]);
        assert_eq!(lines[2].split_whitespace().collect::<Vec<_>>(), ["10.0", "5.0", "client", "create"]);
        assert!(lines[3].starts_with("VMM     qemu with tcg"), "{report}");
    }
}
