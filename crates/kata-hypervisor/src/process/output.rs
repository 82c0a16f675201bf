//! The bounded tail of what a process or a guest says.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest piece that reaches the log as one line.
const LINE_LIMIT: usize = 1024;

/// The last bytes of a stream, shared between the task that reads it and whoever asks.
#[derive(Clone, Debug)]
pub struct Tail {
    bytes: Arc<Mutex<VecDeque<u8>>>,
    limit: usize,
}

impl Tail {
    /// Keeps at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { bytes: Arc::default(), limit }
    }

    /// Appends; the oldest bytes give way.
    pub fn push(&self, new: &[u8]) {
        let new = new.get(new.len().saturating_sub(self.limit)..).unwrap_or_default();
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let excess = (bytes.len() + new.len()).saturating_sub(self.limit).min(bytes.len());
        bytes.drain(..excess);
        bytes.extend(new);
    }

    /// What is kept, as [`printable`] text.
    pub fn text(&self) -> String {
        let bytes: Vec<u8> = {
            let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
            bytes.iter().copied().collect()
        };
        printable(&bytes)
    }

    /// The last `count` lines of [`Tail::text`].
    pub fn last_lines(&self, count: usize) -> String {
        let text = self.text();
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        lines.get(lines.len().saturating_sub(count)..).unwrap_or_default().join("\n")
    }
}

/// As text: of control characters only line feeds and tabs remain, because a guest must not send escape sequences to the
/// terminal of whoever reads what it said.
pub fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

/// Reads `from` to its end into `tail`, and hands it line by line to the log at debug level.
pub(crate) async fn capture(mut from: impl AsyncRead + Unpin, tail: Tail, name: String) {
    let mut chunk = vec![0_u8; 4096];
    let mut line = Vec::new();
    while let Ok(count @ 1..) = from.read(&mut chunk).await {
        let new = chunk.get(..count).unwrap_or_default();
        tail.push(new);
        if tracing::enabled!(tracing::Level::DEBUG) {
            log_lines(&name, &mut line, new);
        }
    }
    if !line.is_empty() {
        log_line(&name, &line);
    }
}

fn log_lines(name: &str, line: &mut Vec<u8>, new: &[u8]) {
    for byte in new {
        match byte {
            b'\n' => {
                log_line(name, line);
                line.clear();
            }
            byte => line.push(*byte),
        }
        if line.len() >= LINE_LIMIT {
            log_line(name, line);
            line.clear();
        }
    }
}

fn log_line(name: &str, line: &[u8]) {
    tracing::debug!(target: "kata_hypervisor::output", from = name, "{}", printable(line));
}
