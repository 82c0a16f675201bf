//! What containerd tells those who listen: `ctr events`, line by line.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::Containerd;
use crate::host::patience;

/// How long an event that is certain to come may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// One event.
#[derive(Clone, Debug)]
pub struct Event {
    /// E.g. `/tasks/exit`.
    pub topic: String,
    /// Its fields as JSON; proto3 leaves out what is zero.
    pub fields: Value,
}

impl Event {
    /// `<date> <time> <offset> <zone> <namespace> <topic> <fields>`
    fn parse(line: &str) -> Option<Self> {
        let (head, fields) = line.split_at(line.find('{')?);
        let topic = head.split_whitespace().last()?.to_owned();
        Some(Self { topic, fields: serde_json::from_str(fields).ok()? })
    }

    /// A text among the fields, or nothing.
    pub fn text(&self, field: &str) -> &str {
        self.fields.get(field).and_then(Value::as_str).unwrap_or_default()
    }

    /// A number among the fields, or zero.
    pub fn number(&self, field: &str) -> u64 {
        self.fields.get(field).and_then(Value::as_u64).unwrap_or_default()
    }
}

/// Collects events from when it is made until it is dropped.
pub struct Events {
    client: Child,
    seen: Arc<(Mutex<Vec<Event>>, Condvar)>,
}

impl Events {
    /// Subscribes; answers when nothing can be missed any more.
    pub fn of(rig: &Containerd) -> Self {
        let mut client = rig.ctr(["events"]).stdout(Stdio::piped()).spawn().unwrap();
        let seen = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
        let lines = BufReader::new(client.stdout.take().unwrap()).lines();
        let sink = Arc::clone(&seen);
        std::thread::spawn(move || {
            for event in lines.map_while(Result::ok).filter_map(|line| Event::parse(&line)) {
                sink.0.lock().unwrap().push(event);
                sink.1.notify_all();
            }
        });
        let events = Self { client, seen };
        // The client does not say when it is subscribed. An event of our making that it shows does.
        let began = Instant::now();
        let subscribed = |seen: &[Event]| (!seen.is_empty()).then_some(());
        for n in 0.. {
            rig.ok(["namespaces", "label", "default", &format!("listening={n}")]);
            if events.until(Duration::from_millis(50), subscribed).is_some() {
                break;
            }
            assert!(began.elapsed() < patience(PATIENCE), "`ctr events` shows nothing");
        }
        events
    }

    fn until<T>(&self, patience: Duration, mut probe: impl FnMut(&[Event]) -> Option<T>) -> Option<T> {
        let mut found = None;
        let seen = self.seen.0.lock().unwrap();
        let waiting = |seen: &mut Vec<Event>| {
            found = probe(seen);
            found.is_none()
        };
        let _ = self.seen.1.wait_timeout_while(seen, patience, waiting).unwrap();
        found
    }

    /// Waits for the first event of `topic` that is about `container`.
    #[track_caller]
    pub fn wait(&self, topic: &str, container: &str) -> Event {
        self.wait_within(PATIENCE, topic, |event| event.text("container_id") == container)
    }

    /// Waits for the first event of `topic` that `matches`, with [`patience`].
    #[track_caller]
    pub fn wait_within(&self, usually: Duration, topic: &str, matches: impl Fn(&Event) -> bool) -> Event {
        let patience = patience(usually);
        let probe =
            |seen: &[Event]| seen.iter().find(|event| event.topic == topic && matches(event)).cloned();
        self.until(patience, probe)
            .unwrap_or_else(|| panic!("no {topic} within {patience:?} among {:#?}", self.all()))
    }

    /// Everything seen so far.
    pub fn all(&self) -> Vec<Event> {
        self.seen.0.lock().unwrap().clone()
    }

    /// What was seen of one container's task, in order, without `/tasks/`.
    pub fn order(&self, container: &str) -> Vec<String> {
        let all = self.all().into_iter().filter(|event| event.text("container_id") == container);
        all.filter_map(|event| event.topic.strip_prefix("/tasks/").map(str::to_owned)).collect()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_taken_apart() {
        let line =
            "2023-05-06 07:08:09.1 +0000 UTC default /tasks/exit {\"container_id\":\"a\",\"exit_status\":3}";
        let event = Event::parse(line).unwrap();
        assert_eq!(
            (event.topic.as_str(), event.text("container_id"), event.number("exit_status")),
            ("/tasks/exit", "a", 3)
        );
    }
}
