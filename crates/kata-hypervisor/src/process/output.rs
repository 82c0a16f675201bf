//! The bounded tail of what a process or a guest says.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest piece that reaches the log as one line.
const LINE_LIMIT: usize = 1024;
/// What of one stream reaches the log in all: a guest must not fill the host's disk.
const LOG_LIMIT: usize = 1 << 20;

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

/// Reads `from` to its end into `tail`, and hands the first mebibyte of it to the log, line by line.
pub(crate) async fn capture(mut from: impl AsyncRead + Unpin, tail: Tail, name: String) {
    let mut chunk = vec![0_u8; 4096];
    let mut lines = Lines::new(name);
    while let Ok(count @ 1..) = from.read(&mut chunk).await {
        let new = chunk.get(..count).unwrap_or_default();
        tail.push(new);
        lines.take(new);
    }
    lines.end();
}

/// A stream on its way to the log.
struct Lines {
    name: String,
    line: Vec<u8>,
    /// Bytes that may still reach the log.
    left: usize,
}

impl Lines {
    fn new(name: String) -> Self {
        Self { name, line: Vec::new(), left: LOG_LIMIT }
    }

    fn take(&mut self, new: &[u8]) {
        if self.left == 0 {
            return;
        }
        for byte in new {
            match byte {
                b'\n' => self.end(),
                byte => self.line.push(*byte),
            }
            if self.line.len() >= LINE_LIMIT {
                self.end();
            }
        }
    }

    fn end(&mut self) {
        let text = printable(&self.line);
        if !text.trim().is_empty() && self.left > 0 {
            self.left = self.left.saturating_sub(text.len());
            self.log(&text);
            if self.left == 0 {
                self.log("it says too much: the rest is not kept");
            }
        }
        self.line.clear();
    }

    /// Each source has a target of its own, by which `kata-ctl logs` tells them apart.
    fn log(&self, text: &str) {
        match self.name.as_str() {
            "console" => tracing::info!(target: "console", "{text}"),
            name => tracing::info!(target: "vmm", "{name}: {text}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_that_says_too_much_is_cut_off_in_the_log() {
        let mut lines = Lines::new("console".to_owned());
        for _ in 0..2 * LOG_LIMIT / 100 {
            lines.take(&[b'x'; 99]);
            lines.take(b"\n");
        }
        assert_eq!(lines.left, 0);
        assert!(lines.line.is_empty());
    }
}
