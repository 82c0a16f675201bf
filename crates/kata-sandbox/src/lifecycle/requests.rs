//! What callers ask for, and what becomes of it. Every request is answered exactly once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use kata_api::GuestProcess;
use oci_spec::runtime::LinuxResources;
use tokio::sync::watch;

use super::files::ContainerFiles;
use super::message::{Created, Done, Launched};
use super::{Actor, Link, Message, Phase, Reply, Request, work};
use crate::agent_client::{Agent, AgentError};
use crate::error::{ErrorKind, SandboxError};
use crate::pod::{ContainerSpec, Event, Exit, ProcessId, Status, Stdio};
use crate::process_table::{Container, Pending, Process, check_id};
use crate::stdio::Streams;

/// Signals that end a creation: there is no process yet that could handle them.
const ENDING: [u32; 5] = [1, 2, 3, 9, 15];
/// The code of a container that was deleted before it was started.
const NEVER_STARTED: u32 = 128 + 9;

impl Actor {
    pub(super) fn request(&mut self, request: Request) {
        match request {
            Request::Create(spec, reply) => self.create(*spec, reply),
            Request::Exec { id, process, stdio, reply } => answer(reply, self.exec(&id, process, stdio)),
            Request::Start(id, reply) => self.start(id, reply),
            Request::Wait(id, reply) => answer(reply, self.table.process(&id).map(|process| process.watch())),
            Request::Delivered(id, reply) => {
                let streams = self.table.process(&id).map(|process| process.streams.as_ref());
                answer(reply, streams.map(|streams| streams.and_then(Streams::delivered)));
            }
            Request::Kill { id, signal, all, reply } => self.kill(&id, signal, all, reply),
            Request::Resize { id, rows, columns, reply } => self.resize(id, rows, columns, reply),
            Request::CloseStdin(id, reply) => {
                answer(reply, self.table.process(&id).map(|process| process.close_stdin.notify_one()));
            }
            Request::Freeze { container, to, reply } => self.freeze(container, to, reply),
            Request::Stats(container, reply) => {
                let known = self.table.container(&container).map(drop);
                let id = ProcessId::init(container);
                self.ask_agent("read statistics of", id, known, reply, |agent, id| async move {
                    agent.stats(&id.container).await
                });
            }
            Request::Processes(container, reply) => self.processes(container, reply),
            Request::Update(container, resources, reply) => self.update(container, *resources, reply),
            Request::State(id, reply) => answer(reply, self.table.state(&id)),
            Request::Pids(container, reply) => answer(reply, self.pids_of(&container)),
            Request::Delete(id, reply) => self.delete(id, reply),
            Request::Shutdown(reply) => self.shutdown(reply),
            Request::Inspect(reply) => {
                let _ = reply.send(self.inspect());
            }
        }
    }

    fn processes(&mut self, container: Option<String>, reply: Reply<Vec<GuestProcess>>) {
        let known = container.as_ref().map_or(Ok(()), |id| self.table.container(id).map(drop));
        let id = ProcessId::init(container.clone().unwrap_or_else(|| self.pod.id.clone()));
        self.ask_agent("list the processes of", id, known, reply, |agent, _| async move {
            agent.processes(container.as_deref()).await
        });
    }

    /// Fails once the pod is over.
    fn alive(&self) -> Result<(), SandboxError> {
        match (&*self.link.borrow(), self.phase) {
            (Link::Down(error), _) => Err(error.clone()),
            (_, Phase::Creating | Phase::Ready) => Ok(()),
            (_, phase) => Err(SandboxError::Dead { cause: format!("it is {}", phase.as_str()) }),
        }
    }

    /// Asks the agent in a task of its own, once it can be asked.
    fn ask_agent<T, F>(
        &self,
        action: &'static str,
        process: ProcessId,
        permitted: Result<(), SandboxError>,
        reply: Reply<T>,
        call: impl FnOnce(Agent, ProcessId) -> F + Send + 'static,
    ) where
        T: Send + 'static,
        F: Future<Output = Result<T, AgentError>> + Send,
    {
        if let Err(error) = self.alive().and(permitted) {
            return answer(reply, Err(error));
        }
        let link = self.link.subscribe();
        tokio::spawn(async move {
            let ask = async {
                let agent = Link::agent(&link).await?;
                let result = call(agent, process.clone()).await;
                result.map_err(|error| work::agent_error(action, &process, error, &link))
            };
            answer(reply, ask.await);
        });
    }

    fn create(&mut self, spec: ContainerSpec, reply: Reply<()>) {
        let id = ProcessId::init(&spec.id);
        let mut init = Process::new(id.clone(), spec.stdio.clone());
        let close_stdin = init.close_stdin.clone();
        let (cancel, cancelled) = watch::channel(None);
        let args =
            spec.spec.process().as_ref().and_then(|process| process.args().clone()).unwrap_or_default();
        let refused = |source| SandboxError::GuestSpec { process: id.clone(), source: Arc::new(source) };
        let begun = check_id(&spec.id)
            .and_then(|()| self.alive())
            .and_then(|()| init.begin(Pending::Create, &[Status::Created]))
            .and_then(|()| self.pids(&spec).map_err(refused))
            .and_then(|pids| {
                let bundle = spec.bundle.clone();
                let (files, hooks, execs) = (None, None, BTreeMap::new());
                let container = Container { bundle, args, files, hooks, init, execs, cancel };
                self.table.insert(&spec.id, container).map(|()| pids)
            });
        let pids = match begun {
            Ok(pids) => pids,
            Err(error) => return answer(reply, Err(error)),
        };
        self.dirty = true;
        let (pod, post, link) = (self.pod.clone(), self.post.clone(), self.link.subscribe());
        while self.creations.try_join_next().is_some() {}
        self.creations.spawn(async move {
            let result = work::create(&pod, &link, (spec, pids), close_stdin, cancelled).await.map(Box::new);
            let _ = post.send(Message::Done(Done::Created { id, result, reply }));
        });
    }

    pub(super) fn created(
        &mut self,
        id: ProcessId,
        result: Result<Box<Created>, SandboxError>,
        reply: Reply<()>,
    ) {
        let cancelled =
            self.table.container(&id.container).ok().and_then(|container| *container.cancel.borrow());
        match (result, cancelled) {
            (Ok(created), None) => {
                let created = *created;
                self.timeline.merge(created.timeline);
                if let Ok(container) = self.table.container(&id.container) {
                    container.files = Some(created.files);
                    container.hooks = Some(created.hooks);
                    container.init.streams = Some(created.streams);
                    container.init.pending = None;
                }
                self.watch_exit(&id);
                self.emit(Event::Created { process: id });
                answer(reply, Ok(()));
            }
            // The kill came when all was done already.
            (Ok(created), Some(_)) => {
                let (pod, post, link) = (self.pod.clone(), self.post.clone(), self.link.subscribe());
                self.creations.spawn(async move {
                    work::undo(&pod, &link, &id, *created).await;
                    let result = Err(SandboxError::CreateCancelled(id.clone()));
                    let _ = post.send(Message::Done(Done::Created { id, result, reply }));
                });
            }
            (Err(error), signal) => {
                let exit =
                    Exit { code: 128_u32.saturating_add(signal.unwrap_or(127)), at: SystemTime::now() };
                if let Ok(process) = self.table.process(&id) {
                    process.end(exit);
                }
                // A pod that is over keeps what it had, for those who look on.
                if self.alive().is_ok() {
                    self.table.remove(&id);
                }
                self.dirty = true;
                answer(reply, Err(error));
            }
        }
    }

    fn exec(
        &mut self,
        id: &ProcessId,
        command: Box<oci_spec::runtime::Process>,
        stdio: Stdio,
    ) -> Result<(), SandboxError> {
        let name = id.exec.clone().unwrap_or_default();
        check_id(&name)?;
        if self.fault.is_some() {
            self.alive()?;
        }
        // Of a pod that ended with its container, the container's end is what there is to say.
        let init = &self.table.container(&id.container)?.init;
        match init.status() {
            Status::Created | Status::Running | Status::Paused if init.pending != Some(Pending::Delete) => {}
            _ => init.check("execute in", &[Status::Running])?,
        }
        self.alive()?;
        let mut process = Process::new(id.clone(), stdio);
        process.command = Some(command);
        self.table.insert_exec(id, &name, process)?;
        self.emit(Event::Created { process: id.clone() });
        Ok(())
    }

    fn start(&mut self, id: ProcessId, reply: Reply<u32>) {
        let work = match self.begin_start(&id) {
            Ok(work) => work,
            Err(error) => return answer(reply, Err(error)),
        };
        let (pod, post, link) = (self.pod.clone(), self.post.clone(), self.link.subscribe());
        tokio::spawn(async move {
            let result = match work {
                work::Start::Container(hooks) => work::start(&pod, &link, &id, hooks).await,
                work::Start::Exec(launch) => work::launch(&pod, &link, &id, launch).await,
            };
            let _ = post.send(Message::Done(Done::Started { id, result, reply }));
        });
    }

    /// What it takes to start a process.
    fn begin_start(&mut self, id: &ProcessId) -> Result<work::Start, SandboxError> {
        self.alive()?;
        let container = self.table.container(&id.container)?;
        let hooks = container.hooks.clone();
        if id.exec.is_some() {
            container.init.check("execute in", &[Status::Running])?;
        }
        let process = self.table.process(id)?;
        process.begin(Pending::Start, &[Status::Created])?;
        let command = process.command.take();
        Ok(match command {
            None => work::Start::Container(hooks),
            Some(command) => work::Start::Exec(work::Launch {
                command,
                stdio: process.stdio.clone(),
                close_stdin: process.close_stdin.clone(),
            }),
        })
    }

    pub(super) fn started(
        &mut self,
        id: ProcessId,
        result: Result<Launched, SandboxError>,
        reply: Reply<u32>,
    ) {
        let over = self.alive();
        let Ok(process) = self.table.process(&id) else {
            return answer(reply, Err(SandboxError::UnknownProcess(id)));
        };
        let is_exec = id.exec.is_some();
        let early_exit = process.early_exit.take();
        process.pending = None;
        let result = result.and_then(|launched| {
            over?;
            process.advance(Status::Running, "start")?;
            process.streams = process.streams.take().or(launched.streams);
            self.timeline.merge(launched.timeline);
            Ok(())
        });
        match result {
            Ok(()) => {
                self.emit(Event::Started { process: id.clone() });
                if is_exec {
                    self.watch_exit(&id);
                }
                answer(reply, Ok(std::process::id()));
                if let Some(exit) = early_exit {
                    self.end(&id, exit);
                }
            }
            Err(error) => {
                // An exec that did not start is over. A container stays created, unless its process is gone too.
                let failed =
                    is_exec.then(|| Exit { code: failed_start(error.kind()), at: SystemTime::now() });
                if let Some(exit) = early_exit.or(failed) {
                    self.end(&id, exit);
                }
                self.dirty = true;
                answer(reply, Err(error));
            }
        }
    }

    /// Waits for a process to end, for all who wait for it here.
    fn watch_exit(&mut self, id: &ProcessId) {
        let (id, post, link) = (id.clone(), self.post.clone(), self.link.subscribe());
        while self.watchers.try_join_next().is_some() {}
        self.watchers.spawn(async move {
            let Ok(agent) = Link::agent(&link).await else { return };
            let result = agent.wait(&id).await;
            let _ = post.send(Message::Done(Done::Exited(id, result)));
        });
    }

    pub(super) fn exited(&mut self, id: &ProcessId, result: Result<i32, AgentError>) {
        let code = match result {
            Ok(code) => u32::try_from(code).unwrap_or(super::MACHINE_DIED),
            // The pod's end is under way, and ends the process.
            Err(AgentError::Lost { .. }) => return,
            Err(error) => {
                tracing::error!(process = %id, %error, "the agent does not tell how the process ends; it counts as ended");
                super::MACHINE_DIED
            }
        };
        let exit = Exit { code, at: SystemTime::now() };
        match self.table.process(id) {
            // Nobody shall hear of an end before they heard of the start.
            Ok(process) if process.pending == Some(Pending::Start) => process.early_exit = Some(exit),
            Ok(_) => self.end(id, exit),
            Err(_) => {}
        }
    }

    fn end(&mut self, id: &ProcessId, exit: Exit) {
        if self.table.process(id).is_ok_and(|process| process.end(exit)) {
            self.emit(Event::Exited { process: id.clone(), exit });
        }
    }

    fn kill(&mut self, id: &ProcessId, signal: u32, all: bool, reply: Reply<()>) {
        let targets = match self.kill_targets(id, signal, all) {
            Ok(Some(targets)) => targets,
            Ok(None) => return answer(reply, Ok(())),
            Err(error) => return answer(reply, Err(error)),
        };
        self.ask_agent("kill", id.clone(), Ok(()), reply, move |agent, _| async move {
            let mut result = Ok(());
            for target in &targets {
                result = result.and(agent.signal(target, signal).await);
            }
            result
        });
    }

    /// The processes to signal; `None` where the signal ended a creation.
    fn kill_targets(
        &mut self,
        id: &ProcessId,
        signal: u32,
        all: bool,
    ) -> Result<Option<Vec<ProcessId>>, SandboxError> {
        let process = self.table.process(id)?;
        if process.status() == Status::Stopped {
            return Err(SandboxError::AlreadyEnded(id.clone()));
        }
        if id.exec.is_some() && process.pending.is_none() {
            process.check("kill", &[Status::Running])?;
        }
        if process.pending == Some(Pending::Create) {
            if !ENDING.contains(&signal) {
                process.check("kill", &[])?;
            }
            self.table.container(&id.container)?.cancel.send_replace(Some(signal));
            return Ok(None);
        }
        let mut targets = vec![id.clone()];
        if all {
            let container = self.table.container(&id.container)?;
            let running = container.execs.iter().filter(|(_, exec)| exec.status() == Status::Running);
            targets = running.map(|(exec, _)| ProcessId::exec(&id.container, exec)).collect();
            // The last one: its end takes the others along.
            targets.push(ProcessId::init(&id.container));
        }
        Ok(Some(targets))
    }

    fn resize(&mut self, id: ProcessId, rows: u32, columns: u32, reply: Reply<()>) {
        let known = match self.table.process(&id) {
            Ok(process) => match &mut process.command {
                // Not in the guest yet: it will start with this size.
                Some(command) => {
                    let size = oci_spec::runtime::BoxBuilder::default().height(rows).width(columns).build();
                    command.set_console_size(size.ok());
                    return answer(reply, Ok(()));
                }
                None => Ok(()),
            },
            Err(error) => Err(error),
        };
        self.ask_agent("resize the terminal of", id, known, reply, move |agent, id| async move {
            agent.resize(&id, rows, columns).await
        });
    }

    fn freeze(&mut self, container: String, to: Status, reply: Reply<()>) {
        let (pending, from) = if to == Status::Paused {
            (Pending::Pause, Status::Running)
        } else {
            (Pending::Resume, Status::Paused)
        };
        let begun = self
            .alive()
            .and_then(|()| self.table.container(&container))
            .and_then(|container| container.init.begin(pending, &[from]));
        if let Err(error) = begun {
            return answer(reply, Err(error));
        }
        let (post, link) = (self.post.clone(), self.link.subscribe());
        tokio::spawn(async move {
            let result = work::freeze(&link, &container, pending).await;
            let _ = post.send(Message::Done(Done::Frozen { container, to, result, reply }));
        });
    }

    pub(super) fn frozen(
        &mut self,
        container: &str,
        to: Status,
        result: Result<(), SandboxError>,
        reply: Reply<()>,
    ) {
        let result = self.table.container(container).and_then(|container| {
            container.init.pending = None;
            result?;
            container.init.advance(to, if to == Status::Paused { "pause" } else { "resume" })
        });
        if result.is_ok() {
            let container = container.to_owned();
            let paused = to == Status::Paused;
            self.emit(if paused { Event::Paused { container } } else { Event::Resumed { container } });
        }
        self.dirty = true;
        answer(reply, result);
    }

    fn update(&mut self, container: String, resources: LinuxResources, reply: Reply<()>) {
        let id = ProcessId::init(container);
        if let Err(error) = self.alive().and_then(|()| self.table.process(&id).map(drop)) {
            return answer(reply, Err(error));
        }
        let (pod, link) = (self.pod.clone(), self.link.subscribe());
        tokio::spawn(async move {
            answer(reply, work::update(&pod, &link, &id, resources).await);
        });
    }

    fn pids_of(&mut self, container: &str) -> Result<Vec<u32>, SandboxError> {
        let execs = self.table.container(container)?.execs.values();
        let alive =
            execs.filter(|process| matches!(process.status(), Status::Running | Status::Paused)).count();
        // Also of a container that was not started, or has ended: containerd deletes whatever has no pid when it comes back.
        Ok(vec![std::process::id(); alive + 1])
    }

    fn delete(&mut self, id: ProcessId, reply: Reply<Exit>) {
        let remains = match self.begin_delete(&id) {
            Ok(Some(remains)) => remains,
            Ok(None) => return self.delete_cancelled(id, reply),
            Err(error) => return answer(reply, Err(error)),
        };
        let (pod, post, link) = (self.pod.clone(), self.post.clone(), self.link.subscribe());
        // A teardown waits for it: it takes down mounts.
        self.creations.spawn(async move {
            let (result, files) = work::delete(&pod, &link, &id, remains).await;
            let _ = post.send(Message::Done(Done::Deleted { id, result, files, reply }));
        });
    }

    /// What a deletion has to release; `None` where it has to end a creation first.
    fn begin_delete(&mut self, id: &ProcessId) -> Result<Option<work::Remains>, SandboxError> {
        let container = self.table.container(&id.container)?;
        if id.exec.is_some() {
            let process = self.table.process(id)?;
            process.begin(Pending::Delete, &[Status::Created, Status::Stopped])?;
            let streams = process.streams.take().into_iter().collect();
            return Ok(Some(work::Remains { streams, files: None, hooks: None }));
        }
        if container.init.pending == Some(Pending::Create) {
            container.cancel.send_replace(Some(9));
            return Ok(None);
        }
        let busy = |exec: &Process| exec.status() == Status::Running || exec.pending.is_some();
        if let Some((exec, _)) = container.execs.iter().find(|(_, exec)| busy(exec)) {
            return Err(SandboxError::ExecRuns { container: id.clone(), exec: exec.clone() });
        }
        container.init.begin(Pending::Delete, &[Status::Created, Status::Stopped])?;
        let processes = container.execs.values_mut().chain([&mut container.init]);
        let streams = processes.filter_map(|process| process.streams.take()).collect();
        Ok(Some(work::Remains { streams, files: container.files.take(), hooks: container.hooks.clone() }))
    }

    /// A deletion during the creation: the creation's end removes the container.
    fn delete_cancelled(&mut self, id: ProcessId, reply: Reply<Exit>) {
        let watch = self.table.process(&id).map(|process| process.watch());
        tokio::spawn(async move {
            answer(reply, work::wait(&id, watch).await);
        });
    }

    pub(super) fn deleted(
        &mut self,
        id: &ProcessId,
        result: Result<(), SandboxError>,
        files: Option<ContainerFiles>,
        reply: Reply<Exit>,
    ) {
        self.dirty = true;
        if let Err(error) = result {
            if let Ok(process) = self.table.process(id) {
                process.pending = None;
            }
            if let (None, Ok(container)) = (&id.exec, self.table.container(&id.container)) {
                container.files = files;
            }
            return answer(reply, Err(error));
        }
        self.end(id, Exit { code: NEVER_STARTED, at: SystemTime::now() });
        let exit = self.table.process(id).map(|process| process.exit());
        self.table.remove(id);
        if let Ok(Some(exit)) = exit {
            self.emit(Event::Deleted { process: id.clone(), exit });
        }
        let unknown = || SandboxError::UnknownProcess(id.clone());
        answer(reply, exit.and_then(|exit| exit.ok_or_else(unknown)));
    }
}

/// The code that a shell gives for a command that it cannot run.
fn failed_start(kind: ErrorKind) -> u32 {
    match kind {
        ErrorKind::NotFound => 127,
        ErrorKind::PermissionDenied => 126,
        _ => super::MACHINE_DIED,
    }
}

fn answer<T>(reply: Reply<T>, result: Result<T, SandboxError>) {
    // A caller that went away is not missed.
    let _ = reply.send(result);
}
