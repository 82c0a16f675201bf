//! Containers: what is asked for, and what can be done with one that was made.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Cri, EnumOrUnknown, Pod, Status, api, number};
use crate::containerd::IMAGE;
use crate::host::wait_for;

/// A container to be. What has no word here is set with [`Self::with`].
pub struct ContainerPlan<'a> {
    pod: &'a Pod<'a>,
    config: api::ContainerConfig,
}

impl<'a> ContainerPlan<'a> {
    pub(super) fn new(pod: &'a Pod<'a>, name: &str) -> Self {
        let mut config = api::ContainerConfig::new();
        name.clone_into(&mut config.metadata.mut_or_insert_default().name);
        IMAGE.clone_into(&mut config.image.mut_or_insert_default().image);
        config.log_path = format!("{name}.log");
        let security = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        // As a kubelet has it: the pod's choice of namespaces is each container's.
        let of_pod = &pod.config().linux.security_context.namespace_options;
        security.namespace_options.clone_from(of_pod);
        Self { pod, config }
    }

    /// Changes what is asked for as the protocol has it.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut api::ContainerConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Changes its security context.
    #[must_use]
    pub fn security(self, change: impl FnOnce(&mut api::LinuxContainerSecurityContext)) -> Self {
        self.with(|config| {
            change(config.linux.mut_or_insert_default().security_context.mut_or_insert_default());
        })
    }

    /// Changes its resources.
    #[must_use]
    pub fn resources(self, change: impl FnOnce(&mut api::LinuxContainerResources)) -> Self {
        self.with(|config| change(config.linux.mut_or_insert_default().resources.mut_or_insert_default()))
    }

    /// How often a container of this name was made before: with another number it is another container.
    #[must_use]
    pub fn attempt(self, attempt: u32) -> Self {
        self.with(|config| {
            let metadata = config.metadata.mut_or_insert_default();
            metadata.attempt = attempt;
            config.log_path = format!("{}-{attempt}.log", metadata.name);
        })
    }

    /// Another image than busybox.
    #[must_use]
    pub fn image(self, name: &str) -> Self {
        self.with(|config| name.clone_into(&mut config.image.mut_or_insert_default().image))
    }

    /// What it runs instead of the image's entry point.
    #[must_use]
    pub fn command(self, words: &[&str]) -> Self {
        self.with(|config| config.command = words.iter().map(|word| (*word).to_owned()).collect())
    }

    /// Has it run a shell script.
    #[must_use]
    pub fn sh(self, script: &str) -> Self {
        self.command(&["sh", "-c", script])
    }

    /// Has it sleep.
    #[must_use]
    pub fn idle(self) -> Self {
        self.command(&["sleep", "1000"])
    }

    /// A variable of its environment.
    #[must_use]
    pub fn env(self, key: &str, value: &str) -> Self {
        let pair = api::KeyValue { key: key.to_owned(), value: value.to_owned(), ..Default::default() };
        self.with(|config| config.envs.push(pair))
    }

    /// A file or directory of the host.
    #[must_use]
    pub fn mount(self, host: impl AsRef<Path>, container: &str) -> Self {
        self.mount_with(host, container, |_| ())
    }

    /// The same, not to be written to.
    #[must_use]
    pub fn mount_read_only(self, host: impl AsRef<Path>, container: &str) -> Self {
        self.mount_with(host, container, |mount| mount.readonly = true)
    }

    /// The same with what else a mount has.
    #[must_use]
    pub fn mount_with(
        self,
        host: impl AsRef<Path>,
        container: &str,
        change: impl FnOnce(&mut api::Mount),
    ) -> Self {
        let mut mount = api::Mount::new();
        host.as_ref().to_str().unwrap().clone_into(&mut mount.host_path);
        container.clone_into(&mut mount.container_path);
        change(&mut mount);
        self.with(|config| config.mounts.push(mount))
    }

    /// An annotation.
    #[must_use]
    pub fn annotation(self, key: &str, value: &str) -> Self {
        self.with(|config| drop(config.annotations.insert(key.to_owned(), value.to_owned())))
    }

    /// A label.
    #[must_use]
    pub fn label(self, key: &str, value: &str) -> Self {
        self.with(|config| drop(config.labels.insert(key.to_owned(), value.to_owned())))
    }

    /// Memory in MiB and CPU time in thousandths of a CPU that it gets at most.
    #[must_use]
    pub fn limits(self, mebibytes: i64, millicpus: i64) -> Self {
        self.resources(|resources| {
            resources.memory_limit_in_bytes = mebibytes << 20;
            resources.cpu_period = 100_000;
            resources.cpu_quota = millicpus * 100;
        })
    }

    /// Who its process is.
    #[must_use]
    pub fn user(self, uid: i64, gid: i64) -> Self {
        self.security(|security| {
            security.run_as_user = number(uid);
            security.run_as_group = number(gid);
        })
    }

    /// With all that root may do.
    #[must_use]
    pub fn privileged(self) -> Self {
        self.security(|security| security.privileged = true)
    }

    /// A terminal for it, and its standard input.
    #[must_use]
    pub fn terminal(self) -> Self {
        self.stdin().with(|config| config.tty = true)
    }

    /// Its standard input is open for whoever attaches.
    #[must_use]
    pub fn stdin(self) -> Self {
        self.with(|config| config.stdin = true)
    }

    /// Makes it, or says how that failed.
    pub fn try_create(self) -> Result<Container<'a>, Status> {
        let log = self.pod.logs().join(&self.config.log_path);
        let mut request = api::CreateContainerRequest::new();
        self.pod.id().clone_into(&mut request.pod_sandbox_id);
        request.config = Some(self.config).into();
        request.sandbox_config = Some(self.pod.config().clone()).into();
        let answer: api::CreateContainerResponse = self.pod.client().runtime("CreateContainer", request)?;
        Ok(Container { cri: self.pod.cri(), id: answer.container_id, log })
    }

    /// Makes it, without starting it.
    #[track_caller]
    pub fn create(self) -> Container<'a> {
        self.try_create().unwrap_or_else(|status| panic!("CreateContainer: {}", status.message()))
    }

    /// Makes it and starts it, or says how that failed: the runtime sees it only when it is started. Nothing of it is
    /// left then.
    pub fn try_start(self) -> Result<Container<'a>, Status> {
        let container = self.try_create()?;
        match container.try_start() {
            Ok(()) => Ok(container),
            Err(status) => {
                container.remove();
                Err(status)
            }
        }
    }

    /// Makes it and starts it.
    #[track_caller]
    pub fn start(self) -> Container<'a> {
        let container = self.create();
        container.start();
        container
    }

    /// Makes it, starts it, waits for its end and removes it: its exit code and its output.
    #[track_caller]
    pub fn run(self) -> Ran {
        let container = self.start();
        let code = container.wait().exit_code;
        container.wait_for_whole_log();
        let ran = Ran { stdout: container.log_of("stdout"), stderr: container.log_of("stderr"), code };
        container.remove();
        ran
    }
}

/// What a command left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// Its exit code.
    pub code: i32,
}

impl Ran {
    /// Standard output of a command that must have succeeded.
    #[track_caller]
    pub fn text(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.stdout
    }
}

/// A container that was made.
pub struct Container<'a> {
    cri: &'a Cri,
    id: String,
    log: PathBuf,
}

impl Container<'_> {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The CRI that it was made by.
    pub fn cri(&self) -> &Cri {
        self.cri
    }

    /// Starts it, or says how that failed.
    pub fn try_start(&self) -> Result<(), Status> {
        let mut request = api::StartContainerRequest::new();
        self.id.clone_into(&mut request.container_id);
        self.cri.client().runtime::<_, api::Nothing>("StartContainer", request).map(drop)
    }

    /// Starts it.
    #[track_caller]
    pub fn start(&self) {
        self.try_start().unwrap_or_else(|status| panic!("StartContainer: {}", status.message()));
    }

    /// What the runtime says of it.
    #[track_caller]
    pub fn status(&self) -> api::ContainerStatus {
        let mut request = api::ContainerStatusRequest::new();
        self.id.clone_into(&mut request.container_id);
        let answer: api::ContainerStatusResponse =
            self.cri.client().runtime("ContainerStatus", request).unwrap();
        answer.status.unwrap()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&self) -> api::ContainerStatus {
        let ended = || {
            let status = self.status();
            (status.state == EnumOrUnknown::new(api::ContainerState::CONTAINER_EXITED)).then_some(status)
        };
        wait_for("the container to end", Duration::from_secs(60), ended)
    }

    /// Runs a command in it, which has `seconds` to end if they are not 0, or says how that failed.
    pub fn try_exec(&self, words: &[&str], seconds: i64) -> Result<Ran, Status> {
        let mut request = api::ExecSyncRequest::new();
        self.id.clone_into(&mut request.container_id);
        request.cmd = words.iter().map(|word| (*word).to_owned()).collect();
        request.timeout = seconds;
        let answer: api::ExecSyncResponse = self.cri.client().runtime("ExecSync", request)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Ran { stdout: text(&answer.stdout), stderr: text(&answer.stderr), code: answer.exit_code })
    }

    /// Runs a command in it.
    #[track_caller]
    pub fn exec(&self, words: &[&str]) -> Ran {
        self.try_exec(words, 0).unwrap_or_else(|status| panic!("ExecSync {words:?}: {}", status.message()))
    }

    /// Runs a shell script in it.
    #[track_caller]
    pub fn sh(&self, script: &str) -> Ran {
        self.exec(&["sh", "-c", script])
    }

    /// Runs a shell script until it succeeds; answers what it printed then.
    #[track_caller]
    pub fn until(&self, script: &str) -> String {
        wait_for(script, Duration::from_secs(30), || {
            let ran = self.sh(script);
            (ran.code == 0).then_some(ran.stdout)
        })
    }

    /// Its figures.
    #[track_caller]
    pub fn stats(&self) -> api::ContainerStats {
        let mut request = api::ContainerStatsRequest::new();
        self.id.clone_into(&mut request.container_id);
        let answer: api::ContainerStatsResponse =
            self.cri.client().runtime("ContainerStats", request).unwrap();
        answer.stats.unwrap()
    }

    /// Changes its resources, or says how that failed.
    pub fn try_update(&self, change: impl FnOnce(&mut api::LinuxContainerResources)) -> Result<(), Status> {
        let mut request = api::UpdateContainerResourcesRequest::new();
        self.id.clone_into(&mut request.container_id);
        change(request.linux.mut_or_insert_default());
        self.cri.client().runtime::<_, api::Nothing>("UpdateContainerResources", request).map(drop)
    }

    /// Has the runtime open its log file anew.
    #[track_caller]
    pub fn reopen_log(&self) {
        let mut request = api::ReopenContainerLogRequest::new();
        self.id.clone_into(&mut request.container_id);
        self.cri.client().runtime::<_, api::Nothing>("ReopenContainerLog", request).unwrap();
    }

    /// Its log file.
    pub fn log_file(&self) -> &Path {
        &self.log
    }

    /// What it has printed.
    pub fn log(&self) -> String {
        self.log_lines(|_| true)
    }

    /// What it has printed to `stdout` or `stderr`.
    pub fn log_of(&self, stream: &str) -> String {
        self.log_lines(|from| from == stream)
    }

    /// A line is `<time> <stream> <F or P> <text>`; P: it goes on in the next.
    fn log_lines(&self, wanted: impl Fn(&str) -> bool) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let mut said = String::new();
        for line in text.lines() {
            let mut words = line.splitn(4, ' ').skip(1);
            let (stream, tag) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            if wanted(stream) {
                said.push_str(words.next().unwrap_or_default());
                said.push_str(if tag == "F" { "\n" } else { "" });
            }
        }
        said
    }

    /// Waits until what it has printed contains `text`.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str) {
        let what = format!("`{text}` in the log");
        wait_for(&what, Duration::from_secs(30), || self.log().contains(text).then_some(()));
    }

    /// Waits until nobody writes to its log any more: the end of a container is told before its last words are written.
    #[track_caller]
    fn wait_for_whole_log(&self) {
        let descriptors = format!("/proc/{}/fd", self.cri.containerd().pid());
        wait_for("the end of the log", Duration::from_secs(20), || {
            let open = std::fs::read_dir(&descriptors).unwrap().flatten();
            let is_log = |path: PathBuf| std::fs::read_link(path).is_ok_and(|file| file == self.log);
            (!open.map(|descriptor| descriptor.path()).any(is_log)).then_some(())
        });
    }

    /// Asks it to end, and ends it after `seconds`.
    #[track_caller]
    pub fn stop(&self, seconds: i64) {
        let mut request = api::StopContainerRequest::new();
        self.id.clone_into(&mut request.container_id);
        request.timeout = seconds;
        let stopped = self.cri.client().runtime::<_, api::Nothing>("StopContainer", request);
        stopped.unwrap_or_else(|status| panic!("StopContainer: {}", status.message()));
    }

    /// Removes it; one that runs is ended first.
    #[track_caller]
    pub fn remove(&self) {
        let mut request = api::RemoveContainerRequest::new();
        self.id.clone_into(&mut request.container_id);
        let removed = self.cri.client().runtime::<_, api::Nothing>("RemoveContainer", request);
        removed.unwrap_or_else(|status| panic!("RemoveContainer: {}", status.message()));
    }
}
