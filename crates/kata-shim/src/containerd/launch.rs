//! From the first container's creation to its pod: the options, the configuration, the network that is there.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use containerd_shim_protos::api::CreateTaskRequest;
use kata_api::runtime_options::Options;
use kata_config::Sources;
use kata_hypervisor::Vm;
use kata_sandbox::{Event, NetworkSpec, ResourceSpec, Sandbox, SandboxSpec};
use oci_spec::runtime::{Hook, Process, Spec};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use tokio::sync::{broadcast, mpsc};

use crate::ground::Ground;
use crate::plan::{Plan, PlanError};
use crate::trace::Level;
use crate::{fault, spans, starts};

/// The options that are ours to read; other runtimes' may reach us when a client asks for the wrong one.
const OPTIONS: &str = "runtimeoptions.v1.Options";

/// A pod that was launched, and everything that happens in it.
pub(super) type Launched = (Sandbox, broadcast::Receiver<Event>);

/// Makes the pod.
pub(crate) struct Launcher {
    pub(super) id: String,
    pub(super) ground: Ground,
    /// When this process began.
    pub(super) started: Instant,
    /// Tells the pod's life.
    pub(super) launched: mpsc::UnboundedSender<Launched>,
    /// What the configuration says of logging is applied here.
    pub(super) level: Level,
    /// Where hooks run, if not in the pod's network namespace.
    pub(super) runtime_netns: Option<Arc<OwnedFd>>,
    pub(super) prepare: Prepare,
}

/// What is asked of a pod: by its first container, or by containerd's sandbox API.
pub(crate) struct Wanted {
    /// The configuration file that the runtime's options name.
    pub(crate) config: Option<PathBuf>,
    /// All of the pod's annotations, also those about others.
    pub(crate) annotations: HashMap<String, String>,
    /// The guest's host name, where it is not the first container's to set.
    pub(crate) hostname: Option<String>,
    /// The hooks that may fill the pod's network namespace.
    pub(crate) hooks: Vec<Hook>,
    /// The bundle of the first container, or of the sandbox.
    pub(crate) bundle: PathBuf,
    /// What it may use of the host.
    pub(crate) resources: ResourceSpec,
    /// Which of the host's processes are ended first where memory is short: `process.oomScoreAdj` of the first container.
    pub(crate) oom_score_adj: i32,
}

impl Wanted {
    /// What the container that `request` and its bundle's `spec` describe asks of the pod that it is the first of.
    pub(crate) fn by_container(request: &CreateTaskRequest, spec: &Spec) -> ttrpc::Result<Self> {
        Ok(Self {
            config: config_path(request.options.as_ref())?,
            annotations: spec.annotations().clone().unwrap_or_default(),
            hostname: None,
            hooks: network_hooks(spec),
            bundle: PathBuf::from(&request.bundle),
            resources: ResourceSpec::of(spec).map_err(|error| fault::invalid(fault::chain(&error)))?,
            oom_score_adj: spec.process().as_ref().and_then(Process::oom_score_adj).unwrap_or_default(),
        })
    }
}

/// Looks everything up and picks the driver.
pub(super) type Prepare = Box<dyn Fn(&Sources) -> Result<(Plan, Box<dyn Vm>), PlanError> + Send + Sync>;

/// The real way to prepare.
pub(super) fn prepare() -> Prepare {
    Box::new(|sources| {
        let plan = Plan::make(sources)?;
        let driver = kata_hypervisor::driver(plan.choice.driver);
        Ok((plan, driver))
    })
}

impl Launcher {
    /// The pod's name.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// The pod that is asked for.
    pub(crate) async fn launch(&self, wanted: Wanted) -> ttrpc::Result<Sandbox> {
        if self.launched.is_closed() {
            return Err(fault::leaving());
        }
        let Wanted { config, annotations, hostname, hooks, bundle, resources, oom_score_adj } = wanted;
        take_oom_score(oom_score_adj);
        let sources = Sources { file: config, overrides: Vec::new(), annotations: ours(&annotations) };
        let (plan, vm) = (self.prepare)(&sources).map_err(|error| {
            let words = fault::chain(&error);
            match error {
                PlanError::Config(_) => fault::invalid(words),
                PlanError::Artefacts(_) | PlanError::Host(_) => fault::precondition("create", words),
            }
        })?;
        self.ground.note_kubernetes(&annotations);
        self.level.set(plan.config.runtime.effective_log_level());
        if plan.config.runtime.enable_tracing {
            spans::begin(&self.id, &plan.config.runtime.otlp_endpoint, self.runtime_netns.clone());
        }
        let spec = SandboxSpec {
            id: self.id.clone(),
            hostname,
            config: plan.config,
            artefacts: plan.artefacts,
            run_dir: self.ground.run_dir.clone(),
            started: self.started,
            choice: plan.choice,
            network: Some(NetworkSpec { hooks, bundle, runtime_netns: self.runtime_netns.clone() }),
            resources,
        };
        let sandbox =
            Sandbox::launch(spec, vm).await.map_err(|error| fault::from_sandbox("create", &error))?;
        starts::keep(&sandbox, self.ground.starts(), self.started);
        if self.launched.send((sandbox.clone(), sandbox.events())).is_err() {
            // Nobody would ever take it down.
            sandbox.shutdown().await.map_err(|error| fault::from_sandbox("create", &error))?;
            return Err(fault::leaving());
        }
        Ok(sandbox)
    }
}

/// Gives this process, and all that it starts from here on, its place among those that the host's kernel may end. Without, it
/// were containerd's, which hardly anything comes before.
fn take_oom_score(score: i32) {
    let path = "/proc/self/oom_score_adj";
    let now = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok());
    if now == Some(score) {
        return;
    }
    if let Err(error) = std::fs::write(path, score.to_string()) {
        tracing::warn!(score, ?now, %error, "the pod's processes keep their oom_score_adj (lowering it needs CAP_SYS_RESOURCE)");
    }
}

/// Whether a message carries the runtime's options. Some clients write a host before the name.
pub(super) fn is_options(any: &Any) -> bool {
    any.type_url.rsplit('/').next() == Some(OPTIONS)
}

/// The configuration file that the options name.
pub(super) fn config_path(options: Option<&Any>) -> ttrpc::Result<Option<PathBuf>> {
    let Some(any) = options.filter(|any| !any.type_url.is_empty()) else { return Ok(None) };
    if !is_options(any) {
        tracing::warn!(type_url = any.type_url, "options of another runtime are not read");
        return Ok(None);
    }
    let options = Options::parse_from_bytes(&any.value).map_err(|error| {
        fault::invalid(format!("the runtime's options ({OPTIONS}) cannot be read: {error}"))
    })?;
    if !options.config_body.is_empty() && options.config_path.is_empty() {
        return Err(fault::invalid(
            "the runtime's options carry the configuration itself, which is not supported: set ConfigPath to a file",
        ));
    }
    Ok(Some(options.config_path).filter(|path| !path.is_empty()).map(PathBuf::from))
}

/// The pod's annotations, as far as they are about this runtime.
fn ours(all: &HashMap<String, String>) -> BTreeMap<String, String> {
    let ours = |(name, _): &(&String, &String)| name.starts_with("io.katacontainers.");
    all.iter().filter(ours).map(|(name, text)| (name.clone(), text.clone())).collect()
}

/// The hooks that may fill the pod's network namespace.
fn network_hooks(spec: &Spec) -> Vec<Hook> {
    let Some(hooks) = spec.hooks() else { return Vec::new() };
    // The name of the first kind is deprecated, and Docker's network comes by it.
    #[allow(deprecated, reason = "the specification keeps prestart, and clients use it")]
    let prestart = hooks.prestart();
    [prestart, hooks.create_runtime()].into_iter().flatten().flatten().cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(type_url: &str, options: &Options) -> CreateTaskRequest {
        let value = options.write_to_bytes().unwrap();
        let any = Any { type_url: type_url.to_owned(), value, ..Any::default() };
        CreateTaskRequest { options: Some(any).into(), ..CreateTaskRequest::default() }
    }

    #[test]
    fn the_configuration_file_is_the_options_config_path() {
        let options = Options { config_path: "/etc/kata.toml".to_owned(), ..Options::default() };
        for url in [OPTIONS.to_owned(), format!("types.example/{OPTIONS}")] {
            assert_eq!(
                config_path(request(&url, &options).options.as_ref()).unwrap(),
                Some("/etc/kata.toml".into())
            );
        }
        assert_eq!(config_path(None).unwrap(), None);
        assert_eq!(config_path(request(OPTIONS, &Options::default()).options.as_ref()).unwrap(), None);
        assert_eq!(
            config_path(request("containerd.runc.v1.Options", &options).options.as_ref()).unwrap(),
            None
        );
    }

    #[test]
    fn options_that_cannot_be_carried_out_are_refused() {
        let body = Options { config_body: b"[runtime]".to_vec(), ..Options::default() };
        assert!(config_path(request(OPTIONS, &body).options.as_ref()).is_err());
        let garbage = Any { type_url: OPTIONS.to_owned(), value: vec![0xff], ..Any::default() };
        let garbage = CreateTaskRequest { options: Some(garbage).into(), ..CreateTaskRequest::default() };
        assert!(config_path(garbage.options.as_ref()).is_err());
    }

    #[test]
    fn the_pod_has_the_oom_score_of_its_first_container_and_not_containerds() {
        let wanted = |process: &str| {
            let text = format!(r#"{{"ociVersion":"1.1.0"{process}}}"#);
            Wanted::by_container(&CreateTaskRequest::default(), &serde_json::from_str(&text).unwrap())
                .unwrap()
        };
        let given =
            wanted(r#","process":{"cwd":"/","args":["a"],"user":{"uid":0,"gid":0},"oomScoreAdj":321}"#);
        assert_eq!((given.oom_score_adj, wanted("").oom_score_adj), (321, 0));
        take_oom_score(given.oom_score_adj);
        let score =
            |process: &str| std::fs::read_to_string(format!("/proc/{process}/oom_score_adj")).unwrap();
        assert_eq!(score("self"), "321\n");
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        assert_eq!(score(&child.id().to_string()), "321\n");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn prestart_hooks_come_before_create_runtime_hooks() {
        let spec = r#"{"ociVersion":"1.1.0","hooks":{"createRuntime":[{"path":"/b"}],"prestart":[{"path":"/a"}],
            "poststop":[{"path":"/c"}]}}"#;
        let paths: Vec<PathBuf> = network_hooks(&serde_json::from_str(spec).unwrap())
            .into_iter()
            .map(|hook| hook.path().clone())
            .collect();
        assert_eq!(paths, [PathBuf::from("/a"), "/b".into()]);
    }
}
