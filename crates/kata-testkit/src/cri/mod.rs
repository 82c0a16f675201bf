//! Pods as a kubelet makes them: a client of the CRI and a containerd that serves it, with CNI networks.
//!
//! ```text
//!  test ── CRI (gRPC) ──▶ containerd ──▶ containerd-shim-kata-v2 ──▶ pod ═══ eth0
//!                            │ bridge, host-local, loopback, portmap            │
//!                            ▼                                                  │
//!                  kt0 10.89.0.1, fd00:89::1 ── veth ── the pod's namespace ── tap
//!                  └── a network namespace of the test's own ──┘
//! ```
//!
//! ```no_run
//! # use kata_testkit::{containerd::Version, cri::Cri};
//! let Some(cri) = Cri::new(Version::V2) else { return };
//! let pod = cri.pod("web").hostname("www").run();
//! let main = pod.container("main").sh("echo hello; exec sleep 1000").start();
//! assert_eq!(main.sh("hostname").text(), "www\n");
//! pod.remove();
//! ```

mod cgroup;
mod client;
mod config;
mod container;
mod image;
mod pod;
mod stream;

// The generated messages, each named as in the protocol.
#[allow(
    missing_docs,
    rust_2018_idioms,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::cast_possible_truncation,
    reason = "generated"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/api.rs"));
}

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use protobuf::{EnumOrUnknown, MessageField};
use serde_json::{Value, json};

pub use client::Client;
pub use config::handler;
pub use container::{Container, ContainerPlan, Ran};
pub use generated::api;
pub use pod::{Pod, PodPlan};
pub use stream::Stream;
pub use tonic::{Code, Status};

use crate::containerd::{Containerd, IMAGE, Version};
use crate::host::{Host, left_of, wait_for};

/// Name of the image of the first container of a pod, whose process waits and reaps.
pub const PAUSE_IMAGE: &str = "docker.io/library/pause:latest";
/// What it runs: with a shared pid namespace, the pod's orphans become its children.
const PAUSE: &str = "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait $!; done";
/// containerd's namespace for all of the CRI.
const NAMESPACE: &str = "k8s.io";

/// A containerd with CRI and networks, and a client of it. When it is dropped, no pod may be left.
pub struct Cri {
    client: Client,
    rig: Containerd,
}

impl Cri {
    /// Starts one with the handlers `kata` and `runc`; `None` (said and counted) where something of it is missing.
    pub fn new(version: Version) -> Option<Self> {
        Self::with_handlers(version, |_| String::new())
    }

    /// The same with further handlers, as [`handler`] writes them, or other sections of the configuration.
    pub fn with_handlers(version: Version, handlers: impl FnOnce(&Host) -> String) -> Option<Self> {
        if !Path::new(config::PLUGINS).join("bridge").exists() {
            crate::skip("containernetworking-plugins is not installed");
            return None;
        }
        let within = ["unshare", "--net", "sh", "-c", "ip link set lo up && exec \"$0\" \"$@\""];
        let configure = |rig: &Containerd| config::text(rig, &handlers(rig.host()));
        let rig = Containerd::with_cri(version, configure, &within)?;
        let cri = Self { client: Client::new(&rig.socket()), rig };
        cgroup::make(&cri.cgroup());
        cri.network(&json!([cri.bridge(), { "type": "portmap", "capabilities": {"portMappings": true} }]));
        cri.import(IMAGE, cri.rig.host().layout());
        cri.image(PAUSE_IMAGE, |config| config["Entrypoint"] = json!(["sh", "-c", PAUSE]));
        Some(cri)
    }

    /// The containerd below.
    pub fn containerd(&self) -> &Containerd {
        &self.rig
    }

    /// The same, to stop it and start it again.
    pub fn containerd_mut(&mut self) -> &mut Containerd {
        &mut self.rig
    }

    /// The world around it.
    pub fn host(&self) -> &Host {
        self.rig.host()
    }

    /// Calls that have no words of their own here.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// A pod to be.
    pub fn pod(&self, name: &str) -> PodPlan<'_> {
        PodPlan::new(self, name)
    }

    /// The plugin `bridge` as pods are connected by default, for [`Self::network`].
    pub fn bridge(&self) -> Value {
        json!({ "type": "bridge", "bridge": "kt0", "isGateway": true, "ipam": self.addresses() })
    }

    /// Where plugins take addresses from: `ipam` of a plugin for [`Self::network`].
    pub fn addresses(&self) -> Value {
        config::addresses(&self.rig)
    }

    /// Connects pods started from now on to this chain of plugins.
    pub fn network(&self, plugins: &Value) {
        let written = config::set_network(&self.rig, plugins);
        let loaded = || {
            let request = api::StatusRequest { verbose: true, ..Default::default() };
            let answer: api::StatusResponse = self.client.runtime("Status", request).ok()?;
            let ready = answer.status.conditions.iter().all(|condition| condition.status);
            let config: Value = serde_json::from_str(answer.info.get("cniconfig")?).ok()?;
            let networks = config["Networks"].as_array()?;
            let is_in = networks.iter().any(|network| network["Config"]["Source"] == written.as_str());
            (ready && is_in).then_some(())
        };
        wait_for("the CRI and its network to be ready", Duration::from_secs(20), loaded);
    }

    /// An image named `name`: busybox with what `change` makes of its configuration (`Cmd`, `Entrypoint`, `User` …).
    pub fn image(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let layout = self.host().scratch(&format!("layouts/{}", name.replace('/', "-")));
        image::derive(self.host().layout(), &layout, change);
        self.import(name, &layout);
    }

    fn import(&self, name: &str, layout: &Path) {
        let archive = self.host().scratch("cri-image.tar");
        let tar = Command::new("tar").arg("-C").arg(layout).arg("-cf").arg(&archive).arg(".").status();
        assert!(tar.unwrap().success());
        let base = name.trim_end_matches(":latest");
        let words = ["--namespace", NAMESPACE, "images", "import", "--base-name", base];
        self.rig.ok(words.into_iter().chain([archive.to_str().unwrap()]));
        // The CRI hears of it by an event.
        let known = || {
            let mut request = api::ImageStatusRequest::new();
            request.image.mut_or_insert_default().image = name.to_owned();
            let answer: api::ImageStatusResponse = self.client.image("ImageStatus", request).ok()?;
            answer.image.is_some().then_some(())
        };
        wait_for("the image in the CRI", Duration::from_secs(20), known);
    }

    /// The cgroup on the host below which all pods have theirs, as the CRI names it.
    pub fn cgroup(&self) -> String {
        let world = self.host().run_dir();
        let name = world.parent().and_then(Path::file_name).unwrap_or_default();
        format!("/{}", name.to_string_lossy())
    }

    /// What pods have below that cgroup, in all hierarchies.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        cgroup::below(&self.cgroup())
    }

    /// Ids of all pods, also of those that have been stopped.
    pub fn pods(&self) -> Vec<String> {
        let answer: api::ListPodSandboxResponse =
            self.client.runtime("ListPodSandbox", api::ListPodSandboxRequest::new()).unwrap();
        answer.items.into_iter().map(|pod| pod.id).collect()
    }

    /// Ids of all containers.
    pub fn containers(&self) -> Vec<String> {
        let answer: api::ListContainersResponse =
            self.client.runtime("ListContainers", api::ListContainersRequest::new()).unwrap();
        answer.containers.into_iter().map(|container| container.id).collect()
    }
}

impl Drop for Cri {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let pods = self.pods();
            assert!(pods.is_empty(), "the test left these pods: {pods:?}");
        }
        if !std::thread::panicking() {
            let cgroups = || self.cgroups().iter().map(|path| path.display().to_string()).collect();
            let left = left_of(cgroups);
            assert!(left.is_empty(), "cgroups are left: {left:?}");
        }
        cgroup::clear(&self.cgroup());
    }
}

/// Runs a test with a CRI of this version, where there is one.
pub fn with(version: Version, test: fn(&mut Cri)) {
    if let Some(mut cri) = Cri::new(version) {
        test(&mut cri);
    }
}

/// Makes of each named `fn(&mut Cri)` a test for each containerd: `v1::name` and `v2::name`.
#[macro_export]
macro_rules! with_each_cri {
    ($($test:ident),* $(,)?) => {
        mod v1 {
            $(#[test] fn $test() { $crate::cri::with($crate::containerd::Version::V1, super::$test) })*
        }
        mod v2 {
            $(#[test] fn $test() { $crate::cri::with($crate::containerd::Version::V2, super::$test) })*
        }
    };
}

/// An optional number of the protocol.
pub fn number(value: i64) -> MessageField<api::Int64Value> {
    MessageField::some(api::Int64Value { value, ..Default::default() })
}
