//! The services' end of a pod's life: what they tell whoever decides when the pod is over.

use containerd_shim_protos::events::task::TaskCreate;
use tokio::sync::{mpsc, oneshot};

/// What the services tell the pod's life.
#[derive(Debug)]
pub(crate) enum Request {
    /// A container is being made; the event to publish if it is.
    CreateBegan(Box<TaskCreate>),
    /// No longer, whatever became of it. Its id.
    CreateEnded(String),
    /// A client was told how the pod ended, or that it cannot be used.
    Told,
    /// Ends the pod.
    ShutDown(Answer),
    /// Ends the pod and leaves nothing of it.
    Destroy(Answer),
}

/// Who waits for a request to be carried out.
#[derive(Debug)]
pub(crate) struct Answer(oneshot::Sender<Result<(), String>>);

impl Answer {
    pub(crate) fn done(self) {
        self.send(Ok(()));
    }

    /// Somebody who went away need not be told.
    pub(crate) fn send(self, result: Result<(), String>) {
        let _ = self.0.send(result);
    }
}

/// The services' end of a pod's life.
#[derive(Clone, Debug)]
pub(crate) struct Reins(mpsc::UnboundedSender<Request>);

impl Reins {
    pub(crate) fn new() -> (Self, mpsc::UnboundedReceiver<Request>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }

    /// A container is being made while the answer lives: the pod is in use.
    pub(crate) fn creating(&self, event: TaskCreate) -> Creating {
        let id = event.container_id.clone();
        self.send(Request::CreateBegan(Box::new(event)));
        Creating { reins: self.clone(), id }
    }

    /// A client is told how the pod ended, or that it cannot be used.
    pub(crate) fn told(&self) {
        self.send(Request::Told);
    }

    /// Ends the pod, and comes back once that is under way and events of it are told.
    pub(crate) async fn shut_down(&self) {
        let _ = self.ask(Request::ShutDown).await;
    }

    /// Ends the pod and comes back once nothing of it is left on the host.
    ///
    /// # Errors
    /// What is left, and why.
    pub(crate) async fn destroy(&self) -> Result<(), String> {
        let leaving = || Err("the owner is leaving; ask again".to_owned());
        self.ask(Request::Destroy).await.unwrap_or_else(leaving)
    }

    async fn ask(&self, request: impl FnOnce(Answer) -> Request) -> Option<Result<(), String>> {
        let (answer, answered) = oneshot::channel();
        self.send(request(Answer(answer)));
        answered.await.ok()
    }

    fn send(&self, request: Request) {
        // Without a receiver the process is about to exit.
        let _ = self.0.send(request);
    }
}

/// See [`Reins::creating`].
pub(crate) struct Creating {
    reins: Reins,
    id: String,
}

impl Drop for Creating {
    fn drop(&mut self) {
        self.reins.send(Request::CreateEnded(std::mem::take(&mut self.id)));
    }
}
