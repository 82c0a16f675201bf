//! `stats`: what containers use in their guests, and their machines on the host.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use serde::Serialize;

use super::{Outcome, refresh};
use crate::cli::StatsArgs;
use crate::failure::{Failure, chain};
use crate::output;
use crate::pod::{Client, PodDir, PodState};
use crate::table::{self, bytes, short};

/// A container's use.
#[derive(Debug, Serialize)]
struct Row {
    pod: String,
    container: String,
    /// Of one processor, since the last look; `null` at a first one.
    cpu_percent: Option<f64>,
    cpu_usage_us: u64,
    memory_usage_bytes: u64,
    /// `null` where only the machine's size bounds it.
    memory_limit_bytes: Option<u64>,
    processes: u64,
    io_read_bytes: u64,
    io_written_bytes: u64,
    network_received_bytes: u64,
    network_sent_bytes: u64,
    /// Resident memory of the whole pod's virtual machine monitor, on the host; the same for all its containers.
    host_memory_bytes: Option<u64>,
}

/// Times of the last look, by pod and container.
#[derive(Default)]
struct Looks(HashMap<(String, String), (Instant, u64)>);

/// Looks once or again and again.
pub async fn run(args: &StatsArgs) -> Outcome {
    let mut looks = Looks::default();
    if args.refresh.once {
        // Figures by time need two looks.
        let first = looks.look(args.pod.as_deref()).await?;
        if !first.is_empty() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
    refresh::each(&args.refresh, async || {
        let rows = looks.look(args.pod.as_deref()).await?;
        if args.refresh.json { output::line(&rows) } else { refresh::draw(&args.refresh, &as_table(&rows)) }
    })
    .await
}

impl Looks {
    async fn look(&mut self, wanted: Option<&str>) -> Result<Vec<Row>, Failure> {
        let pods = match wanted {
            Some(name) => vec![PodDir::alive(name)?],
            None => PodDir::all()?.into_iter().filter(is_alive).collect(),
        };
        let mut rows = Vec::new();
        for pod in pods {
            match self.pod(&pod).await {
                Ok(found) => rows.extend(found),
                Err(failure) if wanted.is_some() => return Err(failure),
                Err(failure) => {
                    let why = failure.error.map(|error| chain(&*error)).unwrap_or_default();
                    eprintln!("kata-ctl: pod {} is left out: {why}", pod.name);
                }
            }
        }
        Ok(rows)
    }

    async fn pod(&mut self, pod: &PodDir) -> Result<Vec<Row>, Failure> {
        let client = Client::connect(pod).await?;
        let seen = client.inspect().await?;
        let host_memory_bytes = resident(seen.vmm_pid);
        let mut rows = Vec::new();
        for container in seen.containers.iter().filter(|it| matches!(it.state.as_str(), "running" | "paused"))
        {
            let metrics = client.stats(&container.id).await?;
            let cpu_percent = self.percent(&pod.name, &container.id, metrics.cpu.usage_usec);
            rows.push(row(pod, &container.id, &metrics, cpu_percent, host_memory_bytes));
        }
        Ok(rows)
    }

    fn percent(&mut self, pod: &str, container: &str, usage_us: u64) -> Option<f64> {
        let now = Instant::now();
        let before = self.0.insert((pod.to_owned(), container.to_owned()), (now, usage_us));
        before.map(|(then, used)| share(usage_us.saturating_sub(used), now.duration_since(then)))
    }
}

/// Per cent of one processor.
pub(super) fn share(used_us: u64, over: Duration) -> f64 {
    let over = over.as_secs_f64();
    if over <= 0.0 { 0.0 } else { Duration::from_micros(used_us).as_secs_f64() / over * 100.0 }
}

fn is_alive(pod: &PodDir) -> bool {
    matches!(PodState::load(&pod.run_dir), Ok(Some(state)) if !state.is_stopped() && state.owner_lives())
}

fn row(
    pod: &PodDir,
    container: &str,
    metrics: &Metrics,
    cpu_percent: Option<f64>,
    host_memory_bytes: Option<u64>,
) -> Row {
    let limit = metrics.memory.usage_limit;
    Row {
        pod: pod.name.clone(),
        container: container.to_owned(),
        cpu_percent,
        cpu_usage_us: metrics.cpu.usage_usec,
        memory_usage_bytes: metrics.memory.usage,
        // cgroups write "max" for none, which the agent tells as the largest number.
        memory_limit_bytes: Some(limit).filter(|limit| (1..1 << 62).contains(limit)),
        processes: metrics.pids.current,
        io_read_bytes: metrics.io.usage.iter().map(|device| device.rbytes).sum(),
        io_written_bytes: metrics.io.usage.iter().map(|device| device.wbytes).sum(),
        network_received_bytes: metrics.network.iter().map(|interface| interface.rx_bytes).sum(),
        network_sent_bytes: metrics.network.iter().map(|interface| interface.tx_bytes).sum(),
        host_memory_bytes,
    }
}

/// Resident memory of a process of this host.
fn resident(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

fn as_table(rows: &[Row]) -> String {
    let header = [
        "POD",
        "CONTAINER",
        "CPU",
        "MEMORY",
        "LIMIT",
        "PROCESSES",
        "READ",
        "WRITTEN",
        "RECEIVED",
        "SENT",
        "ON HOST",
    ]
    .map(str::to_owned);
    let line = |row: &Row| {
        [
            short(&row.pod).to_owned(),
            short(&row.container).to_owned(),
            row.cpu_percent.map_or_else(|| "-".to_owned(), |percent| format!("{percent:.1} %")),
            bytes(row.memory_usage_bytes),
            row.memory_limit_bytes.map_or_else(|| "-".to_owned(), bytes),
            row.processes.to_string(),
            bytes(row.io_read_bytes),
            bytes(row.io_written_bytes),
            bytes(row.network_received_bytes),
            bytes(row.network_sent_bytes),
            row.host_memory_bytes.map_or_else(|| "-".to_owned(), bytes),
        ]
    };
    let lines: Vec<[String; 11]> = std::iter::once(header).chain(rows.iter().map(line)).collect();
    table::columns(&lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_one_processor() {
        assert!((share(500_000, Duration::from_secs(1)) - 50.0).abs() < 1e-9);
        assert!((share(4_000_000, Duration::from_secs(2)) - 200.0).abs() < 1e-9);
        assert!(share(1, Duration::ZERO).abs() < 1e-9);
    }

    #[test]
    fn this_process_has_resident_memory() {
        assert!(resident(std::process::id()).unwrap() > 100_000);
        assert_eq!(resident(0), None);
    }
}
