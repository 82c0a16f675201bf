//! The agent's log: JSON lines kept in a bounded buffer until the host reads them, and the console besides.
//!
//! ```text
//!  tracing ─▶ JsonLayer ─▶ LogBuffer (256 KiB, oldest lines go first) ─▶ vsock log port
//!                      └─▶ console: warnings always, everything at debug level
//! ```
//!
//! A log call never waits: not for the host, and not for the console, which is written without blocking.

use std::collections::VecDeque;
use std::fmt::{Debug, Write as _};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags, open};
use serde_json::{Map, Value};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};

/// Bytes of log that are kept for a host that does not read.
const CAPACITY: usize = 256 << 10;

#[derive(Debug, Default)]
struct Lines {
    queue: VecDeque<String>,
    bytes: usize,
    dropped: u64,
}

/// Log lines on their way to the host. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct LogBuffer {
    lines: Arc<Mutex<Lines>>,
    more: Arc<Notify>,
}

impl LogBuffer {
    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a line (with its newline); the oldest go where the space does not suffice.
    pub fn push(&self, line: String) {
        let mut lines = self.lines();
        lines.bytes += line.len();
        lines.queue.push_back(line);
        while lines.bytes > CAPACITY {
            let Some(oldest) = lines.queue.pop_front() else { break };
            lines.bytes -= oldest.len();
            lines.dropped += 1;
        }
        drop(lines);
        self.more.notify_one();
    }

    fn pop(&self) -> Option<String> {
        let mut lines = self.lines();
        if lines.dropped > 0 {
            let dropped = std::mem::take(&mut lines.dropped);
            return Some(format!("{{\"level\":\"WARN\",\"msg\":\"{dropped} log lines dropped\"}}\n"));
        }
        let line = lines.queue.pop_front()?;
        lines.bytes -= line.len();
        if lines.queue.is_empty() {
            lines.queue.shrink_to(16);
        }
        Some(line)
    }

    /// Writes all lines, present and future, to `peer` until it goes away. A line in flight then is kept.
    pub async fn serve(&self, mut peer: impl AsyncWrite + Unpin) {
        loop {
            while let Some(line) = self.pop() {
                if peer.write_all(line.as_bytes()).await.is_err() {
                    let mut lines = self.lines();
                    lines.bytes += line.len();
                    lines.queue.push_front(line);
                    return;
                }
            }
            self.more.notified().await;
        }
    }
}

/// Turns events into JSON lines: `ts` (RFC 3339, UTC), `level`, `target`, `msg`, and the event's fields.
struct JsonLayer {
    buffer: LogBuffer,
    console: Option<OwnedFd>,
    /// Least severe level that goes to the console too.
    console_level: LevelFilter,
}

impl<S: Subscriber> Layer<S> for JsonLayer {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let level = *event.metadata().level();
        if level <= self.console_level {
            self.print(level, &fields);
        }
        let mut line = Map::new();
        line.insert("ts".into(), timestamp(SystemTime::now()).into());
        line.insert("level".into(), level.as_str().into());
        line.insert("target".into(), event.metadata().target().into());
        line.insert("msg".into(), fields.message.into());
        line.extend(fields.rest);
        self.buffer.push(Value::Object(line).to_string() + "\n");
    }
}

impl JsonLayer {
    fn print(&self, level: Level, fields: &Fields) {
        let Some(console) = &self.console else { return };
        let mut text = format!("kata-agent: {level} {}", fields.message);
        for (name, value) in &fields.rest {
            let _ = write!(text, " {name}={value}");
        }
        text.push_str("\r\n");
        let _ = rustix::io::write(console, text.as_bytes());
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    rest: Map<String, Value>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            (name, value) => {
                self.rest.insert(name.to_owned(), value);
            }
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.put(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, crate::chain(value).into());
    }
}

/// Seconds and microseconds of UTC; the epoch for a clock that is set beyond the calendar's four digits of years.
fn timestamp(at: SystemTime) -> String {
    const LAST: Duration = Duration::from_secs(253_402_300_799);
    let within = at.duration_since(UNIX_EPOCH).is_ok_and(|since| since <= LAST);
    humantime::format_rfc3339_micros(if within { at } else { UNIX_EPOCH }).to_string()
}

/// Makes the log the process's own from here on. With `console`, its lines go there too: warnings, or everything from
/// debug level on.
pub fn install(level: LevelFilter, console: bool) -> LogBuffer {
    let buffer = LogBuffer::default();
    let flags = OFlags::WRONLY | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let path = if console { "/dev/console" } else { "/dev/stderr" };
    let console_level = if level >= LevelFilter::DEBUG { level } else { LevelFilter::WARN };
    let layer =
        JsonLayer { buffer: buffer.clone(), console: open(path, flags, Mode::empty()).ok(), console_level };
    let subscriber = tracing_subscriber::registry().with(layer.with_filter(level));
    // Fails only where a log was installed before, which then stays.
    let _ = tracing::subscriber::set_global_default(subscriber);
    buffer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_follow_the_calendar() {
        let at = |seconds| timestamp(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000000Z");
        assert_eq!(at(1_795_391_999), "2026-11-22T23:59:59.000000Z");
        assert_eq!(at(u64::from(u32::MAX) << 8), "1970-01-01T00:00:00.000000Z");
    }

    #[test]
    fn a_host_that_does_not_read_loses_the_oldest_lines_and_is_told() {
        let buffer = LogBuffer::default();
        for number in 0..3 {
            buffer.push(format!("{number}{}\n", "x".repeat(CAPACITY / 2)));
        }
        assert!(buffer.pop().unwrap().contains("2 log lines dropped"));
        assert!(buffer.pop().unwrap().starts_with('2'));
        assert_eq!(buffer.pop(), None);
    }

    #[test]
    fn events_become_lines_with_their_fields() {
        let buffer = LogBuffer::default();
        let layer = JsonLayer { buffer: buffer.clone(), console: None, console_level: LevelFilter::OFF };
        let subscriber = tracing_subscriber::registry().with(layer.with_filter(LevelFilter::INFO));
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(container = "c1", pid = 7, "started \"it\"");
            tracing::debug!("too fine");
        });
        let line: Value = serde_json::from_str(&buffer.pop().unwrap()).unwrap();
        assert_eq!((&line["msg"], &line["container"]), (&"started \"it\"".into(), &"c1".into()));
        assert_eq!((&line["pid"], &line["level"]), (&7.into(), &"INFO".into()));
        assert_eq!(buffer.pop(), None);
    }

    #[tokio::test]
    async fn a_line_in_flight_survives_a_lost_reader() {
        let buffer = LogBuffer::default();
        buffer.push("one\n".into());
        let (near, far) = tokio::io::duplex(64);
        drop(far);
        buffer.serve(near).await;
        assert_eq!(buffer.pop().as_deref(), Some("one\n"));
    }
}
