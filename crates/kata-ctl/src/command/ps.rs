//! `ps`: the processes of a pod, as its guest sees them.

use std::time::Duration;

use kata_api::control::Process;
use serde::Serialize;

use super::{Outcome, list};
use crate::cli::{ListArgs, PsArgs};
use crate::output;
use crate::pod::{Client, PodDir, choose};
use crate::table::{self, bytes, cpu_time, short, shortened};

/// Longest command that the table shows.
pub(super) const COMMAND_WIDTH: usize = 60;

/// A process of the guest.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    /// `null` for one of the guest's own.
    pub container: Option<String>,
    /// In the guest's pid namespace.
    pub pid: u32,
    /// In the container's.
    pub container_pid: u32,
    pub parent_pid: u32,
    pub uid: u32,
    pub state: String,
    pub threads: u32,
    pub cpu_time_us: u64,
    pub rss_bytes: u64,
    pub age_us: u64,
    pub command: Vec<String>,
}

impl From<Process> for Row {
    fn from(process: Process) -> Self {
        Self {
            container: Some(process.container).filter(|container| !container.is_empty()),
            pid: process.pid,
            container_pid: process.container_pid,
            parent_pid: process.parent_pid,
            uid: process.uid,
            state: process.state,
            threads: process.threads,
            cpu_time_us: process.cpu_time_us,
            rss_bytes: process.rss_bytes,
            age_us: process.age_us,
            command: process.command,
        }
    }
}

/// Lists the processes; without a pod, the pods.
pub async fn run(args: &PsArgs) -> Outcome {
    let Some(name) = &args.pod else {
        return list::run(&ListArgs { all: args.all, json: args.json }).await;
    };
    let pod = PodDir::alive(name)?;
    let client = Client::connect(&pod).await?;
    let container = match &args.container {
        Some(wanted) => Some(choose(&client, &client.inspect().await?, Some(wanted)).await?),
        None => None,
    };
    let mut rows: Vec<Row> =
        client.processes(container.as_deref()).await?.into_iter().map(Row::from).collect();
    rows.retain(|row| args.all || row.container.is_some());
    if args.json {
        output::document(&rows)?;
    } else {
        output::print(&as_table(&rows))?;
    }
    Ok(0)
}

fn as_table(rows: &[Row]) -> String {
    let header = ["CONTAINER", "PID", "GUEST PID", "UID", "S", "CPU TIME", "MEMORY", "AGE", "COMMAND"]
        .map(str::to_owned);
    let line = |row: &Row| {
        [
            row.container.as_deref().map_or("-", short).to_owned(),
            row.container_pid.to_string(),
            row.pid.to_string(),
            row.uid.to_string(),
            row.state.clone(),
            cpu_time(row.cpu_time_us),
            bytes(row.rss_bytes),
            table::span(Duration::from_micros(row.age_us)),
            shortened(&row.command, COMMAND_WIDTH),
        ]
    };
    let lines: Vec<[String; 9]> = std::iter::once(header).chain(rows.iter().map(line)).collect();
    table::columns(&lines)
}
