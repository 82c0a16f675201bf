//! `top`: the processes of a pod by what they use, again and again.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::ps::{COMMAND_WIDTH, Row as Process};
use super::stats::share;
use super::{Outcome, refresh};
use crate::cli::TopArgs;
use crate::failure::Failure;
use crate::output;
use crate::pod::{Client, PodDir};
use crate::table::{self, bytes, cpu_time, short, shortened};

/// A process and its share since the last look.
#[derive(Debug, Serialize)]
struct Row {
    /// Of one processor; `null` at a first look.
    cpu_percent: Option<f64>,
    #[serde(flatten)]
    process: Process,
}

/// Processor time at the last look, by pid.
#[derive(Default)]
struct Looks {
    at: Option<Instant>,
    used: HashMap<u32, u64>,
}

/// Looks once or again and again.
pub async fn run(args: &TopArgs) -> Outcome {
    let pod = PodDir::alive(&args.pod)?;
    let client = Client::connect(&pod).await?;
    let mut looks = Looks::default();
    if args.refresh.once {
        // Figures by time need two looks.
        looks.look(&client).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    refresh::each(&args.refresh, async || {
        let rows = looks.look(&client).await?;
        if args.refresh.json { output::line(&rows) } else { refresh::draw(&args.refresh, &as_table(&rows)) }
    })
    .await
}

impl Looks {
    async fn look(&mut self, client: &Client) -> Result<Vec<Row>, Failure> {
        let found = client.processes(None).await?;
        let now = Instant::now();
        let over = self.at.replace(now).map(|then| now.duration_since(then));
        let before = std::mem::take(&mut self.used);
        self.used = found.iter().map(|process| (process.pid, process.cpu_time_us)).collect();
        let mut rows: Vec<Row> = found
            .into_iter()
            .map(|process| {
                // One that began since has used all it has used since.
                let used =
                    process.cpu_time_us.saturating_sub(before.get(&process.pid).copied().unwrap_or_default());
                Row { cpu_percent: over.map(|over| share(used, over)), process: process.into() }
            })
            .collect();
        rows.sort_by(|a, b| {
            let by_cpu = b.cpu_percent.unwrap_or_default().total_cmp(&a.cpu_percent.unwrap_or_default());
            by_cpu.then(b.process.rss_bytes.cmp(&a.process.rss_bytes)).then(a.process.pid.cmp(&b.process.pid))
        });
        Ok(rows)
    }
}

fn as_table(rows: &[Row]) -> String {
    let header = ["CONTAINER", "GUEST PID", "UID", "S", "CPU", "CPU TIME", "MEMORY", "THREADS", "COMMAND"]
        .map(str::to_owned);
    let line = |row: &Row| {
        [
            row.process.container.as_deref().map_or("-", short).to_owned(),
            row.process.pid.to_string(),
            row.process.uid.to_string(),
            row.process.state.clone(),
            row.cpu_percent.map_or_else(|| "-".to_owned(), |percent| format!("{percent:.1} %")),
            cpu_time(row.process.cpu_time_us),
            bytes(row.process.rss_bytes),
            row.process.threads.to_string(),
            shortened(&row.process.command, COMMAND_WIDTH),
        ]
    };
    let lines: Vec<[String; 9]> = std::iter::once(header).chain(rows.iter().map(line)).collect();
    table::columns(&lines)
}
