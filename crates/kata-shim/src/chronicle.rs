//! What has happened in a pod, kept for those who come later: `Control.Events`.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kata_api::control::{self, EventsResponse};
use kata_sandbox::{Event, ProcessId};
use tokio::sync::broadcast::{Receiver, error::RecvError};
use tokio::sync::watch;

/// Events that are kept.
const KEPT: usize = 512;
/// Longest wait for an event.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// The events of one pod. Clones share them.
#[derive(Clone)]
pub(crate) struct Chronicle {
    pages: Arc<Mutex<VecDeque<control::Event>>>,
    /// The number of the next event, and whether there will be none.
    turned: Arc<watch::Sender<(u64, bool)>>,
}

impl Chronicle {
    /// Without events.
    pub(crate) fn new() -> Self {
        // The first is number 1: 0 asks for all.
        Self { pages: Arc::default(), turned: Arc::new(watch::Sender::new((1, false))) }
    }

    /// Writes down what comes, until the pod is over.
    pub(crate) fn record(&self, mut events: Receiver<Event>) {
        let chronicle = self.clone();
        tokio::spawn(async move {
            loop {
                match events.recv().await {
                    Ok(event) => chronicle.write(&event),
                    Err(RecvError::Lagged(missed)) => tracing::warn!(missed, "events are not kept"),
                    Err(RecvError::Closed) => return,
                }
            }
        });
    }

    fn pages(&self) -> MutexGuard<'_, VecDeque<control::Event>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, event: &Event) {
        let ended = matches!(event, Event::Stopped { .. });
        let (number, _) = *self.turned.borrow();
        let event = control::Event { number, at_ms: now_ms(), ..told(event) };
        let mut pages = self.pages();
        if pages.len() == KEPT {
            pages.pop_front();
        }
        pages.push_back(event);
        drop(pages);
        self.turned.send_replace((number + 1, ended));
    }

    /// The events from number `from` on; where there are none yet, waits for one.
    pub(crate) async fn since(&self, from: u64, wait: Duration) -> EventsResponse {
        let mut turned = self.turned.subscribe();
        let news = turned.wait_for(|(next, ended)| *ended || *next > from.max(1));
        // Without news within the bound the answer is empty.
        let _ = tokio::time::timeout(wait.min(WAIT_MAX), news).await;
        let pages = self.pages();
        let (next, ended) = *self.turned.borrow();
        let events = pages.iter().filter(|event| event.number >= from).cloned().collect();
        EventsResponse { events, next, ended, ..EventsResponse::default() }
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// An event in the words of the wire, without number and time.
fn told(event: &Event) -> control::Event {
    let of = |kind: &str, process: &ProcessId| control::Event {
        kind: kind.to_owned(),
        container: process.container.clone(),
        exec: process.exec.clone().unwrap_or_default(),
        ..control::Event::default()
    };
    let container = |kind: &str, id: &str| of(kind, &ProcessId::init(id));
    match event {
        Event::Created { process } => of("created", process),
        Event::Started { process } => of("started", process),
        Event::Exited { process, exit } => control::Event { exit_code: exit.code, ..of("exited", process) },
        Event::Deleted { process, exit } => control::Event { exit_code: exit.code, ..of("deleted", process) },
        Event::Paused { container: id } => container("paused", id),
        Event::Resumed { container: id } => container("resumed", id),
        Event::Oom { container: id } => container("oom", id),
        Event::Stopped { fault } => control::Event {
            kind: "stopped".to_owned(),
            fault: fault.clone().unwrap_or_default(),
            ..control::Event::default()
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn created(id: &str) -> Event {
        Event::Created { process: ProcessId::init(id) }
    }

    #[tokio::test]
    async fn who_comes_late_is_told_what_has_happened() {
        let chronicle = Chronicle::new();
        chronicle.write(&created("a"));
        chronicle.write(&Event::Oom { container: "a".to_owned() });
        let told = chronicle.since(0, Duration::ZERO).await;
        let kinds: Vec<&str> = told.events.iter().map(|event| event.kind.as_str()).collect();
        assert_eq!((kinds, told.next, told.ended), (vec!["created", "oom"], 3, false));
        assert!(told.events[0].at_ms > 0 && told.events[1].container == "a");
    }

    #[tokio::test]
    async fn who_waits_is_told_of_the_next_event_and_of_the_end() {
        let chronicle = Chronicle::new();
        chronicle.write(&created("a"));
        let waiting = {
            let chronicle = chronicle.clone();
            tokio::spawn(async move { chronicle.since(2, Duration::from_secs(30)).await })
        };
        tokio::task::yield_now().await;
        chronicle.write(&Event::Stopped { fault: Some("it broke".to_owned()) });
        let told = waiting.await.unwrap();
        assert_eq!((told.events.len(), told.events[0].fault.as_str(), told.ended), (1, "it broke", true));
        assert!(chronicle.since(told.next, Duration::from_secs(30)).await.events.is_empty());
    }

    #[tokio::test]
    async fn a_wait_without_news_is_answered_empty() {
        let told = Chronicle::new().since(0, Duration::from_millis(1)).await;
        assert_eq!((told.events.len(), told.next, told.ended), (0, 1, false));
    }

    #[tokio::test]
    async fn the_oldest_events_go_first() {
        let chronicle = Chronicle::new();
        for _ in 0..KEPT + 3 {
            chronicle.write(&created("a"));
        }
        let told = chronicle.since(0, Duration::ZERO).await;
        assert_eq!((told.events.len(), told.events[0].number), (KEPT, 4));
    }
}
