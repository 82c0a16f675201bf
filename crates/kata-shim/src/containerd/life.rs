//! The life of an owner under containerd: it outlives its pod, for containerd asks until it has deleted the last container.
//!
//! ```text
//!   until_shut_down ───────────────────────────────▶ leave ──▶ exit
//!     │ first container ended ▶ the machine goes       │ teardown, last events, directories, then the answer
//!     │ machine died ▶ every process has ended        Shutdown, Destroy, SIGTERM, or no container within a bound
//!     └ events ▶ publisher
//! ```
//!
//! The machine does not wait for containerd: where the pod's first container has ended, nothing can run in it any more, and
//! Kubernetes may keep the dead pod for hours. A pod that containerd's sandbox API made has no first container: it lives, empty
//! or not, until that API stops it.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::topics;
use kata_sandbox::{Event, Exit, Inspection, ProcessId, Sandbox, Status};
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::Instant;

use super::launch::Launched;
use super::publisher::Publisher;
use crate::convert::timestamp;
use crate::fault::chain;
use crate::ground::Ground;
use crate::life::{LifeError, Watch};
use crate::reins::{Answer, Request};

/// How long an owner without a pod waits for its first container.
const UNUSED_BOUND: Duration = Duration::from_secs(60);
/// How long the last events may take.
const FLUSH: Duration = Duration::from_secs(5);
/// When whoever shuts the pod down is answered, whatever is still under way: containerd gives it 3 s.
const ANSWER_BOUND: Duration = Duration::from_millis(2500);
/// How long connections are waited for at the end, so that the last answer gets through.
const LINGER: Duration = Duration::from_secs(1);

/// Exit status of a process that ended unseen, as containerd has it.
const UNKNOWN: u32 = 255;

/// Why the owner goes, and who wants to know when it is done.
struct End {
    cause: &'static str,
    answers: Vec<Answer>,
}

impl End {
    fn new(cause: &'static str) -> Self {
        Self { cause, answers: Vec::new() }
    }

    fn answered(cause: &'static str, answer: Answer) -> Self {
        Self { cause, answers: vec![answer] }
    }
}

/// What a pod lives for, and so when its machine goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Its first container.
    FirstContainer,
    /// Whatever containers come and go: the sandbox API says when it is over.
    Sandbox,
}

pub(super) struct Life {
    pub(super) purpose: Purpose,
    pub(super) ground: Ground,
    pub(super) publisher: Publisher,
    pub(super) watch: Watch,
    pub(super) requests: mpsc::UnboundedReceiver<Request>,
    pub(super) launched: mpsc::UnboundedReceiver<Launched>,
    pub(super) connections: watch::Receiver<usize>,
}

/// What is known of the pod on the way.
struct Pod {
    purpose: Purpose,
    sandbox: Option<Sandbox>,
    events: Option<broadcast::Receiver<Event>>,
    /// The container that the pod lives for.
    first: Option<String>,
    /// Containers that were made and not deleted, and what of them was published.
    containers: HashMap<String, Told>,
    /// Containers being made.
    creating: HashMap<String, Creating>,
}

/// What was published of a container, beside that it was made.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    started: bool,
    exit: Option<Exit>,
}

/// A container that is being made.
struct Creating {
    /// To publish if it is.
    event: TaskCreate,
    /// Who asked for it: of several, one at most gets it.
    requests: usize,
}

impl Pod {
    fn new(purpose: Purpose) -> Self {
        let (containers, creating) = (HashMap::new(), HashMap::new());
        Self { purpose, sandbox: None, events: None, first: None, containers, creating }
    }

    /// Whether nobody would miss it.
    fn idle(&self) -> bool {
        match self.purpose {
            Purpose::FirstContainer => self.containers.is_empty() && self.creating.is_empty(),
            Purpose::Sandbox => self.sandbox.is_none(),
        }
    }

    async fn event(&mut self) -> Result<Event, RecvError> {
        match &mut self.events {
            Some(events) => events.recv().await,
            None => std::future::pending().await,
        }
    }

    fn create_began(&mut self, event: TaskCreate) {
        let id = event.container_id.clone();
        self.creating.entry(id).or_insert(Creating { event, requests: 0 }).requests += 1;
    }

    fn create_ended(&mut self, id: &str) {
        if let Some(creating) = self.creating.get_mut(id) {
            creating.requests = creating.requests.saturating_sub(1);
            if creating.requests == 0 {
                self.creating.remove(id);
            }
        }
    }

    /// Takes what has happened already; where some of it was `lost`, what the pod itself tells.
    async fn catch_up(&mut self, mut lost: bool, publisher: &Publisher) {
        loop {
            match self.events.as_mut().map(broadcast::Receiver::try_recv) {
                Some(Ok(event)) => self.on_event(event, publisher),
                Some(Err(TryRecvError::Lagged(missed))) => {
                    tracing::warn!(
                        missed,
                        "the owner was too slow for the pod's events; it looks at the pod instead"
                    );
                    lost = true;
                }
                Some(Err(TryRecvError::Empty | TryRecvError::Closed)) | None => break,
            }
        }
        if let (true, Some(sandbox)) = (lost, &self.sandbox) {
            let pod = sandbox.inspect().await;
            for event in self.missed(&pod) {
                self.on_event(event, publisher);
            }
        }
    }

    /// What has happened to containers and was not published. Of execs the pod does not tell: who waits for one is answered.
    fn missed(&self, pod: &Inspection) -> Vec<Event> {
        let mut events = Vec::new();
        for container in &pod.containers {
            let process = ProcessId::init(&container.id);
            let told = self.containers.get(&container.id).copied();
            if told.is_none() && !self.creating.contains_key(&container.id) {
                // Its creation was not asked for here, or has failed.
                continue;
            }
            if told.is_none() {
                events.push(Event::Created { process: process.clone() });
            }
            let told = told.unwrap_or_default();
            if !told.started && matches!(container.state, Status::Running | Status::Paused) {
                events.push(Event::Started { process: process.clone() });
            }
            if told.exit.is_none() && container.state == Status::Stopped {
                let at = container.exited_at_ms.map(|ms| UNIX_EPOCH + Duration::from_millis(ms));
                let (code, at) = (container.exit_code.unwrap_or(UNKNOWN), at.unwrap_or_else(SystemTime::now));
                events.push(Event::Exited { process, exit: Exit { code, at } });
            }
        }
        let gone = self.containers.iter().filter(|(id, _)| !pod.containers.iter().any(|it| it.id == **id));
        for (id, told) in gone {
            let process = ProcessId::init(id);
            let exit = told.exit.unwrap_or_else(|| Exit { code: UNKNOWN, at: SystemTime::now() });
            if told.exit.is_none() {
                events.push(Event::Exited { process: process.clone(), exit });
            }
            events.push(Event::Deleted { process, exit });
        }
        events
    }

    /// Whether an event of a container was published before: what was made up for may still come.
    fn is_told(&self, event: &Event) -> bool {
        let told = |process: &ProcessId| self.containers.get(&process.container);
        match event {
            Event::Created { process } if process.exec.is_none() => told(process).is_some(),
            Event::Started { process } if process.exec.is_none() => {
                told(process).is_some_and(|it| it.started)
            }
            Event::Exited { process, .. } if process.exec.is_none() => {
                told(process).is_some_and(|it| it.exit.is_some())
            }
            Event::Deleted { process, .. } if process.exec.is_none() => told(process).is_none(),
            _ => false,
        }
    }

    /// Remembers what is published of a container.
    fn note(&mut self, event: &Event) {
        let (Event::Started { process } | Event::Exited { process, .. }) = event else { return };
        let Some(told) = self.containers.get_mut(&process.container).filter(|_| process.exec.is_none())
        else {
            return;
        };
        match event {
            Event::Exited { exit, .. } => told.exit = Some(*exit),
            _ => told.started = true,
        }
    }

    fn on_event(&mut self, event: Event, publisher: &Publisher) {
        if self.is_told(&event) {
            return;
        }
        self.note(&event);
        match &event {
            Event::Created { process: ProcessId { container, exec: None } } => {
                self.containers.insert(container.clone(), Told::default());
                if self.purpose == Purpose::FirstContainer {
                    self.first.get_or_insert_with(|| container.clone());
                }
                if let Some(made) = self.creating.remove(container) {
                    publisher.publish(topics::TASK_CREATE_EVENT_TOPIC, &made.event);
                }
            }
            Event::Exited { process, exit }
                if process.exec.is_none() && self.first.as_ref() == Some(&process.container) =>
            {
                tracing::info!(%process, code = exit.code, "the pod's first container ended: the machine is taken down");
                if let Some(sandbox) = self.sandbox.clone() {
                    tokio::spawn(take_down(sandbox, process.clone()));
                }
            }
            Event::Deleted { process, .. } if process.exec.is_none() => {
                self.containers.remove(&process.container);
            }
            // Of a container that was never made, its client is told by the answer to its creation.
            Event::Exited { process, .. } if !self.containers.contains_key(&process.container) => return,
            // Goes to containerd's log, which is where somebody looks for the reason of a 255.
            Event::Stopped { fault: Some(fault) } => tracing::error!("the pod failed: {fault}"),
            _ => {}
        }
        publish(publisher, event);
    }
}

impl Life {
    /// Lives until containerd needs the owner no more. The pod is torn down then.
    pub(super) async fn run(mut self) -> Result<(), LifeError> {
        let mut pod = Pod::new(self.purpose);
        let end = self.until_shut_down(&mut pod).await;
        tracing::info!(cause = end.cause, "the owner leaves");
        self.leave(pod, end).await
    }

    async fn until_shut_down(&mut self, pod: &mut Pod) -> End {
        let mut unused = Instant::now() + UNUSED_BOUND;
        loop {
            let idle = pod.idle();
            tokio::select! {
                // What a creation announces is there before the event that it leads to.
                biased;
                Some(request) = self.requests.recv() => match request {
                    Request::CreateBegan(event) => pod.create_began(*event),
                    Request::CreateEnded(id) => {
                        pod.catch_up(false, &self.publisher).await;
                        pod.create_ended(&id);
                        unused = Instant::now() + UNUSED_BOUND;
                    }
                    Request::Told => {}
                    Request::ShutDown(answer) => return End::answered("containerd shut it down", answer),
                    Request::Destroy(answer) => return End::answered("a client destroyed the pod", answer),
                },
                Some((sandbox, events)) = self.launched.recv() => {
                    pod.sandbox = Some(sandbox);
                    pod.events = Some(events);
                }
                event = pod.event() => match event {
                    Ok(event) => {
                        // containerd shuts down what it has emptied, but not where its own sandbox is gone already.
                        unused = Instant::now() + UNUSED_BOUND;
                        pod.on_event(event, &self.publisher);
                    }
                    Err(RecvError::Lagged(missed)) => {
                        tracing::warn!(missed, "the owner was too slow for the pod's events; it looks at the pod instead");
                        pod.catch_up(true, &self.publisher).await;
                    }
                    Err(RecvError::Closed) => pod.events = None,
                },
                () = tokio::time::sleep_until(unused), if idle => return End::new("nothing was asked of it for 60 s"),
                _ = self.watch.terminate.recv() => return End::new("SIGTERM"),
                _ = self.watch.interrupt.recv() => return End::new("SIGINT"),
            }
        }
    }

    async fn leave(mut self, mut pod: Pod, end: End) -> Result<(), LifeError> {
        // What is launched from here on is refused; what was launched just now goes as well.
        self.launched.close();
        while let Some((sandbox, events)) = self.launched.recv().await {
            (pod.sandbox, pod.events) = (Some(sandbox), Some(events));
        }
        let Self { ground, publisher, mut requests, mut connections, .. } = self;
        let mut waiting = end.answers;
        let patience = tokio::time::sleep(ANSWER_BOUND);
        let gone = vanish(ground, publisher, &mut pod);
        tokio::pin!(patience, gone);
        let result = loop {
            tokio::select! {
                biased;
                result = &mut gone => break result,
                Some(request) = requests.recv() => waiting.extend(who_waits(request)),
                () = &mut patience, if !waiting.is_empty() && !patience.is_elapsed() => {
                    waiting.drain(..).for_each(Answer::done);
                }
            }
        };
        let told = || result.as_ref().map_err(|error| chain(error)).copied();
        waiting.drain(..).for_each(|answer| answer.send(told()));
        // They may ask until they have heard.
        let hung_up = tokio::time::timeout(LINGER, connections.wait_for(|open| *open == 0));
        tokio::pin!(hung_up);
        loop {
            tokio::select! {
                _ = &mut hung_up => break,
                Some(request) = requests.recv() => who_waits(request).into_iter().for_each(|answer| answer.send(told())),
            }
        }
        result
    }
}

/// Who waits for the owner's end with this request.
fn who_waits(request: Request) -> Option<Answer> {
    match request {
        Request::ShutDown(answer) | Request::Destroy(answer) => Some(answer),
        Request::CreateBegan(_) | Request::CreateEnded(_) | Request::Told => None,
    }
}

/// Takes down what there is, tells the last of it, and leaves no directory.
async fn vanish(ground: Ground, publisher: Publisher, pod: &mut Pod) -> Result<(), LifeError> {
    let torn_down = match &pod.sandbox {
        Some(sandbox) => sandbox.shutdown().await.map_err(LifeError::Teardown),
        None => Ok(()),
    };
    pod.catch_up(false, &publisher).await;
    publisher.finish(FLUSH).await;
    torn_down.and_then(|()| ground.clear().map_err(LifeError::Clear))
}

/// Ends the machine once the container's output is with its client.
async fn take_down(sandbox: Sandbox, process: ProcessId) {
    // That there is no such process any more means that it was deleted meanwhile, with its output.
    let _ = sandbox.delivered(&process).await;
    if let Err(error) = sandbox.shutdown().await {
        tracing::error!("{}", error.chain());
    }
}

/// An event in containerd's words. Those of an exec have topics of their own, but for its end.
fn publish(publisher: &Publisher, event: Event) {
    let pid = std::process::id();
    match event {
        Event::Created { process: ProcessId { container: container_id, exec: Some(exec_id) } } => {
            let event = TaskExecAdded { container_id, exec_id, ..TaskExecAdded::default() };
            publisher.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        }
        Event::Started { process: ProcessId { container: container_id, exec: None } } => {
            let event = TaskStart { container_id, pid, ..TaskStart::default() };
            publisher.publish(topics::TASK_START_EVENT_TOPIC, &event);
        }
        Event::Started { process: ProcessId { container: container_id, exec: Some(exec_id) } } => {
            let event = TaskExecStarted { container_id, exec_id, pid, ..TaskExecStarted::default() };
            publisher.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
        }
        Event::Exited { process: ProcessId { container: container_id, exec }, exit } => {
            let id = exec.unwrap_or_else(|| container_id.clone());
            let (exit_status, exited_at) = (exit.code, timestamp(exit.at));
            let event = TaskExit { container_id, id, pid, exit_status, exited_at, ..TaskExit::default() };
            publisher.publish(topics::TASK_EXIT_EVENT_TOPIC, &event);
        }
        Event::Paused { container: container_id } => {
            let event = TaskPaused { container_id, ..TaskPaused::default() };
            publisher.publish(topics::TASK_PAUSED_EVENT_TOPIC, &event);
        }
        Event::Resumed { container: container_id } => {
            let event = TaskResumed { container_id, ..TaskResumed::default() };
            publisher.publish(topics::TASK_RESUMED_EVENT_TOPIC, &event);
        }
        Event::Oom { container: container_id } => {
            publisher.publish(topics::TASK_OOM_EVENT_TOPIC, &TaskOOM { container_id, ..TaskOOM::default() });
        }
        Event::Deleted { process: ProcessId { container: container_id, exec: None }, exit } => {
            let (exit_status, exited_at) = (exit.code, timestamp(exit.at));
            let event = TaskDelete { container_id, pid, exit_status, exited_at, ..TaskDelete::default() };
            publisher.publish(topics::TASK_DELETE_EVENT_TOPIC, &event);
        }
        // The first was published with what its request said; the deletion of an exec and the pod's end have no event.
        Event::Created { .. } | Event::Deleted { .. } | Event::Stopped { .. } => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inspection(containers: &str) -> Inspection {
        let containers = serde_json::from_str(&format!("[{containers}]")).unwrap();
        Inspection { containers, ..Inspection::default() }
    }

    #[test]
    fn what_was_missed_is_made_up_for_once() {
        let mut pod = Pod::new(Purpose::Sandbox);
        for id in ["runs", "ended", "gone"] {
            pod.containers.insert(id.to_owned(), Told::default());
        }
        pod.create_began(TaskCreate { container_id: "made".to_owned(), ..TaskCreate::default() });
        let now = inspection(
            r#"{"id":"runs","state":"running","args":[]},{"id":"made","state":"created","args":[]},
            {"id":"ended","state":"stopped","args":[],"exit_code":7,"exited_at_ms":1000},
            {"id":"failed","state":"stopped","args":[],"exit_code":1}"#,
        );
        let missed = pod.missed(&now);
        let told: Vec<String> = missed
            .iter()
            .map(|event| match event {
                Event::Created { process } => format!("created {}", process.container),
                Event::Started { process } => format!("started {}", process.container),
                Event::Exited { process, exit } => format!("exited {} {}", process.container, exit.code),
                Event::Deleted { process, .. } => format!("deleted {}", process.container),
                other => format!("{other:?}"),
            })
            .collect();
        assert_eq!(
            told,
            ["started runs", "created made", "exited ended 7", "exited gone 255", "deleted gone"]
        );
        for event in &missed {
            pod.note(event);
        }
        let again = Event::Exited {
            process: ProcessId::init("ended"),
            exit: Exit { code: 7, at: SystemTime::now() },
        };
        assert!(pod.is_told(&again) && pod.is_told(&missed[0]) && !pod.is_told(&missed[1]));
    }
}
