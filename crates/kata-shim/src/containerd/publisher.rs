//! Tells containerd what happens in the pod: `containerd.services.events.ttrpc.v1.Events/Forward`.
//!
//! Events keep their order, so one that containerd cannot take now is tried again before the next. A containerd that is
//! being restarted finds out about processes by itself; what it misses beyond the queue's length is no loss to it.

use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::EventsClient;
use protobuf::MessageFull;
use protobuf::well_known_types::any::Any;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use ttrpc::asynchronous::Client;

use crate::convert::timestamp;

/// Events that may wait for containerd.
const QUEUE: usize = 1024;
/// Bound on one attempt.
const BOUND: Duration = Duration::from_secs(5);
/// Between attempts: at first, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(2);

/// A queue of events on their way to containerd.
pub(super) struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Envelope>,
    task: JoinHandle<()>,
}

impl Publisher {
    /// Publishes to the socket at `address` in the name of `namespace`.
    pub(super) fn new(address: &str, namespace: &str) -> Self {
        let (queue, events) = mpsc::channel(QUEUE);
        let address = if address.contains("://") { address.to_owned() } else { format!("unix://{address}") };
        Self { namespace: namespace.to_owned(), queue, task: tokio::spawn(deliver(address, events)) }
    }

    /// Queues an event under its topic.
    pub(super) fn publish<M: MessageFull>(&self, topic: &str, event: &M) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => return tracing::error!(topic, %error, "an event cannot be encoded"),
        };
        let event = Any { type_url: M::descriptor().full_name().to_owned(), value, ..Any::default() };
        let envelope = Envelope {
            timestamp: timestamp(SystemTime::now()),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: Some(event).into(),
            ..Envelope::default()
        };
        if self.queue.try_send(envelope).is_err() {
            tracing::warn!(topic, "containerd takes no events, and {QUEUE} wait already: one is dropped");
        }
    }

    /// Delivers what is queued, within `bound`.
    pub(super) async fn finish(mut self, bound: Duration) {
        drop(self.queue);
        if tokio::time::timeout(bound, &mut self.task).await.is_err() {
            tracing::warn!(?bound, "containerd did not take the last events");
            self.task.abort();
        }
    }
}

async fn deliver(address: String, mut events: mpsc::Receiver<Envelope>) {
    let mut client = None;
    while let Some(envelope) = events.recv().await {
        let topic = envelope.topic.clone();
        let request = ForwardRequest { envelope: Some(envelope).into(), ..ForwardRequest::default() };
        let mut pause = FIRST_PAUSE;
        loop {
            match forward(&mut client, &address, &request).await {
                Ok(()) => break,
                // It was heard, and will be no more welcome the next time.
                Err(ttrpc::Error::RpcStatus(status)) if status.code() != ttrpc::Code::DEADLINE_EXCEEDED => {
                    tracing::warn!(topic, reason = status.message(), "containerd refused an event");
                    break;
                }
                Err(error) => {
                    tracing::debug!(topic, %error, "containerd does not take an event; trying again")
                }
            }
            client = None;
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }
}

async fn forward(
    client: &mut Option<EventsClient>,
    address: &str,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let connected = match client.take() {
        Some(connected) => connected,
        None => EventsClient::new(Client::connect(address).await?),
    };
    let connected = client.insert(connected);
    connected.forward(ttrpc::context::with_duration(BOUND), request).await.map(drop)
}
