//! The agent's own log, into the owner's.
//!
//! The agent serves one JSON object a line on [`ports::LOG`]. What it says is the guest's word: it is cut, cleaned and
//! limited in all, so that a guest can fill neither the owner's memory nor the host's disk.

use std::path::{Path, PathBuf};

use kata_api::ports;
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};

use crate::agent_client::guest_text;
use crate::hybrid;

/// The most that is taken of one line, in bytes.
const LINE_MAX: u64 = 8 * 1024;
/// The most that is taken of one pod's agent, in bytes.
const TOTAL_MAX: usize = 1024 * 1024;

/// A line, as far as it is looked at.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Line {
    level: String,
    msg: String,
    #[serde(flatten)]
    rest: serde_json::Map<String, serde_json::Value>,
}

/// Copies the agent's log until it ends or has said too much. An agent without one is left in peace.
pub(crate) async fn forward(hybrid: PathBuf, pod: String) {
    if let Err(error) = copy(&hybrid, &pod).await {
        tracing::debug!(pod, %error, "the agent's log cannot be read");
    }
}

async fn copy(hybrid: &Path, pod: &str) -> std::io::Result<()> {
    let open = hybrid::connect(hybrid, ports::LOG).await.map_err(std::io::Error::other)?;
    let mut reader = BufReader::new(open.stream);
    let (mut line, mut total) = (Vec::new(), 0_usize);
    while total < TOTAL_MAX {
        line.clear();
        if (&mut reader).take(LINE_MAX).read_until(b'\n', &mut line).await? == 0 {
            return Ok(());
        }
        total = total.saturating_add(line.len());
        repeat(pod, &String::from_utf8_lossy(&line));
    }
    tracing::warn!(pod, "the agent says too much: the rest of its log is not kept");
    Ok(())
}

/// Says a line again, at its own level.
fn repeat(pod: &str, text: &str) {
    let line = serde_json::from_str(text)
        .unwrap_or_else(|_| Line { msg: text.trim_end().to_owned(), ..Line::default() });
    let mut said = guest_text(&line.msg);
    for (name, value) in line.rest.iter().filter(|(name, _)| *name != "ts" && *name != "target") {
        said.push_str(&guest_text(&format!(" {name}={value}")));
    }
    match line.level.as_str() {
        "ERROR" => tracing::error!(target: "agent", pod, "{said}"),
        "WARN" => tracing::warn!(target: "agent", pod, "{said}"),
        "DEBUG" | "TRACE" => tracing::debug!(target: "agent", pod, "{said}"),
        _ => tracing::info!(target: "agent", pod, "{said}"),
    }
}
