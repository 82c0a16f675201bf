//! What Cloud Hypervisor reports on its event monitor: JSON objects, one after the other, spread over lines.

use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest event that is understood, in bytes.
const EVENT_LIMIT: usize = 64 * 1024;

/// Of all that it reports, what the driver acts on.
#[derive(Debug, Deserialize, PartialEq, Eq)]
struct Event {
    source: String,
    event: String,
}

impl Event {
    /// The guest has reset itself, and would be started anew.
    fn is_reset(&self) -> bool {
        self.source == "vm" && self.event == "rebooting"
    }
}

/// Comes back when the guest has reset itself; with `false` where the events end without that.
pub(super) async fn until_reset(mut from: impl AsyncRead + Unpin) -> bool {
    let mut pending = Vec::new();
    let mut chunk = vec![0_u8; 4096];
    while let Ok(count @ 1..) = from.read(&mut chunk).await {
        pending.extend_from_slice(chunk.get(..count).unwrap_or_default());
        if take_events(&mut pending).iter().any(Event::is_reset) {
            return true;
        }
    }
    false
}

/// Takes every complete event off the front. What makes no sense, or no end, is dropped.
fn take_events(pending: &mut Vec<u8>) -> Vec<Event> {
    let mut events = Vec::new();
    let mut stream = serde_json::Deserializer::from_slice(pending).into_iter::<serde_json::Value>();
    let mut used = 0;
    let broken = loop {
        match stream.next() {
            Some(Ok(value)) => {
                used = stream.byte_offset();
                events.extend(serde_json::from_value(value).ok());
            }
            Some(Err(error)) => break !error.is_eof(),
            None => break false,
        }
    };
    if broken || pending.len().saturating_sub(used) > EVENT_LIMIT {
        tracing::warn!("Cloud Hypervisor reported something that makes no sense");
        pending.clear();
    } else {
        pending.drain(..used);
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = "{\n  \"timestamp\": {\n    \"secs\": 0,\n    \"nanos\": 4\n  },\n  \"source\": \"vmm\",\n  \"event\": \"starting\",\n  \
                          \"properties\": null\n}\n\n{\"source\": \"vm\", \"event\": \"rebooting\", \"properties\": {\"a\": \"}\"}}\n";

    #[test]
    fn events_are_found_wherever_the_stream_is_cut() {
        for at in 0..STREAM.len() {
            let (first, second) = STREAM.as_bytes().split_at(at);
            let mut pending = first.to_vec();
            let mut events = take_events(&mut pending);
            pending.extend_from_slice(second);
            events.extend(take_events(&mut pending));
            let names: Vec<&str> = events.iter().map(|event| event.event.as_str()).collect();
            assert_eq!(names, ["starting", "rebooting"], "cut at {at}");
            assert!(pending.trim_ascii().is_empty());
        }
    }

    #[test]
    fn what_makes_no_sense_is_dropped_and_never_grows() {
        let mut pending = b"no event".to_vec();
        assert_eq!(take_events(&mut pending), []);
        assert!(pending.is_empty());
        let mut pending = vec![b'['; EVENT_LIMIT + 1];
        assert_eq!(take_events(&mut pending), []);
        assert!(pending.is_empty());
    }

    #[tokio::test]
    async fn events_that_end_without_a_reset_are_none() {
        assert!(until_reset(STREAM.as_bytes()).await);
        assert!(!until_reset(&b"{\"source\": \"vm\", \"event\": \"shutdown\"}"[..]).await);
    }
}
