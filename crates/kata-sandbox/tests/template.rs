//! Pods that start as copies of a machine, over a fake one and a fake agent.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod rig;

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::time::Duration;

use kata_hypervisor::fake::FakeVm;
use kata_hypervisor::{Growth, Size};
use kata_initdata::Initdata;
use kata_sandbox::template::{self, About, TemplateError};
use kata_sandbox::{ResourceSpec, Sandbox};
use oci_spec::runtime::Spec;
use rig::{Rig, soon};
use rustix::mount::{MountFlags, UnmountFlags};

struct Factory {
    rig: Rig,
}

impl Factory {
    async fn new() -> Option<Self> {
        let mut rig = Rig::new().await?;
        let qemu = &mut rig.config.hypervisor.qemu;
        (qemu.default_memory, qemu.default_maxmemory) = (256, 2048);
        qemu.factory.enable_template = true;
        qemu.factory.template_path = rig.dir.path().join("vc/template");
        Some(Self { rig })
    }

    fn dir(&self) -> PathBuf {
        self.rig.config.hypervisor.qemu.factory.template_path.clone()
    }

    /// Makes a template, and leaves a machine that was not booted.
    async fn make(&mut self) -> Result<About, TemplateError> {
        let making = template::make(self.rig.spec(), Box::new(self.rig.guest()), std::future::pending());
        let (made, ()) = soon(async { tokio::join!(making, self.rig.announce()) }).await;
        self.rig.assert_clean().await;
        self.rig.vm = FakeVm::new();
        made
    }

    fn file(&self, about: &About, name: &str) -> PathBuf {
        let status = self.status(false);
        assert_eq!(status.templates[0].about.as_ref(), Some(about));
        self.dir().join(&status.templates[0].digest).join(name)
    }

    fn status(&self, verify: bool) -> template::Status {
        let spec = self.rig.spec();
        template::status(&spec.config, &spec.artefacts, verify).unwrap()
    }

    /// Starts a pod, ends it, and answers the stage in which its machine came to run.
    async fn start(&mut self) -> String {
        let pod = self.rig.launch().await.unwrap();
        let stage = self.stage(&pod).await;
        soon(pod.shutdown()).await.unwrap();
        self.rig.assert_clean().await;
        self.rig.vm = FakeVm::new();
        stage
    }

    async fn stage(&self, pod: &Sandbox) -> String {
        // An agent that has said long ago that it serves says nothing more.
        if tokio::time::timeout(Duration::from_secs(1), pod.ready()).await.is_err() {
            self.rig.announce().await;
        }
        soon(pod.ready()).await.unwrap();
        let timeline = pod.inspect().await.timeline;
        let of_machine = |name: &str| ["start", "restore"].contains(&name);
        timeline.iter().find(|stage| of_machine(&stage.name)).unwrap().name.clone()
    }
}

#[tokio::test]
async fn pod_starts_where_its_template_stood_and_becomes_its_own() {
    let Some(mut factory) = Factory::new().await else { return };
    assert_eq!(factory.status(false).state, "none");
    let about = factory.make().await.unwrap();
    assert!(about.announced && !about.guest_kernel.is_empty(), "{about:?}");
    assert!(!factory.rig.agent.calls().contains(&"CreateSandbox".to_owned()));
    let status = factory.status(true);
    assert_eq!((status.state, status.templates.len(), status.reason), ("ready", 1, None));
    let modes = ["", "memory", "about.json"].map(|name| {
        let path = factory.file(&about, name);
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    });
    assert_eq!(modes, [0o700, 0o400, 0o400]);

    let before = factory.rig.agent.calls().len();
    let pod = factory.rig.launch().await.unwrap();
    assert_eq!(factory.stage(&pod).await, "restore");
    let calls = factory.rig.agent.calls().split_off(before);
    assert_eq!(calls, ["ReseedRandomDev", "SetGuestDateTime", "CreateSandbox"]);
    let seen = pod.inspect().await;
    assert_eq!((seen.guest_kernel, seen.agent_version), (about.guest_kernel, about.agent_version));
    soon(pod.shutdown()).await.unwrap();
    factory.rig.assert_clean().await;
}

#[tokio::test]
async fn pod_boots_where_no_template_is_of_use() {
    let Some(mut factory) = Factory::new().await else { return };
    assert_eq!(factory.start().await, "start");
    let about = factory.make().await.unwrap();
    assert_eq!(factory.start().await, "restore");

    // Another machine.
    factory.rig.config.hypervisor.qemu.kernel_params.0.push("loglevel=7".to_owned());
    let status = factory.status(false);
    assert_eq!((status.state, status.reason.as_deref()), ("stale", Some("of another command line")));
    assert_eq!(factory.start().await, "start");
    factory.rig.config.hypervisor.qemu.kernel_params.0.clear();

    // A driver without templates, and pods that want none.
    factory.rig.vm = FakeVm::new().without_snapshots();
    assert_eq!(factory.start().await, "start");
    factory.rig.config.hypervisor.qemu.factory.enable_template = false;
    assert_eq!(factory.start().await, "start");
    factory.rig.config.hypervisor.qemu.factory.enable_template = true;

    // What the guest reads while it boots, one that has booted does not read.
    let initdata = Initdata::parse("version = \"0.1.0\"\nalgorithm = \"sha256\"\n".into()).unwrap();
    factory.rig.capabilities = vec!["initdata"];
    factory.rig.config.hypervisor.qemu.initdata = initdata.to_annotation().unwrap();
    assert_eq!(factory.start().await, "start");
    factory.rig.config.hypervisor.qemu.initdata.clear();
    assert_eq!(factory.start().await, "restore");

    // Damage that only the machine monitor, or only a look at all of it, finds.
    let state = std::fs::OpenOptions::new().write(true).open(factory.file(&about, "state")).unwrap();
    state.write_all_at(b"A", 0).unwrap();
    assert_eq!(factory.status(false).state, "ready");
    let status = factory.status(true);
    assert_eq!(status.state, "damaged");
    assert!(status.reason.unwrap().ends_with("/state is not what was written"));
    assert_eq!(factory.start().await, "start");
    state.write_all_at(b"a", 0).unwrap();
    assert_eq!(factory.start().await, "restore");

    // Damage that is seen at once, and a directory that somebody else can write to.
    let memory = factory.file(&about, "memory");
    std::fs::set_permissions(&memory, PermissionsExt::from_mode(0o420)).unwrap();
    assert!(factory.status(false).reason.unwrap().contains("others can write to it"));
    assert_eq!(factory.start().await, "start");
    std::fs::set_permissions(&memory, PermissionsExt::from_mode(0o400)).unwrap();
    std::fs::OpenOptions::new().write(true).open(&memory).unwrap().set_len(1).unwrap();
    assert!(factory.status(false).reason.unwrap().contains("/memory has 1 bytes instead of"));
    assert_eq!(factory.start().await, "start");
    std::fs::remove_file(&memory).unwrap();
    assert_eq!(factory.status(false).state, "damaged");
    assert_eq!(factory.start().await, "start");
}

#[tokio::test]
async fn pod_that_was_promised_more_grows_and_one_that_was_promised_less_boots() {
    let Some(mut factory) = Factory::new().await else { return };
    factory.make().await.unwrap();
    let promise = |bytes: u64| {
        let text = format!(
            r#"{{"ociVersion":"1.1.0","annotations":{{"io.kubernetes.cri.container-type":"sandbox",
                "io.kubernetes.cri.sandbox-memory":"{bytes}"}}}}"#
        );
        ResourceSpec::of(&serde_json::from_str::<Spec>(&text).unwrap()).unwrap()
    };
    factory.rig.resources = promise(512 << 20);
    let pod = factory.rig.launch().await.unwrap();
    assert_eq!(factory.stage(&pod).await, "restore");
    let machine = factory.rig.vm.with_spec(|spec| (spec.memory_mib, spec.growth));
    let (booted, growth) = machine.unwrap();
    assert_eq!((booted, growth), (256, Some(Growth { memory_mib: 2048, ..growth.unwrap() })));
    let Size { memory_mib, .. } = factory.rig.vm.size().unwrap();
    assert!(memory_mib >= 512 + 32, "{memory_mib}");
    assert!(factory.rig.agent.calls().contains(&"OnlineCPUMem".to_owned()));
    soon(pod.shutdown()).await.unwrap();
    factory.rig.vm = FakeVm::new();
    factory.rig.resources = promise(64 << 20);
    assert_eq!(factory.start().await, "start");
}

#[tokio::test]
async fn templates_are_removed_when_nothing_starts_from_them_any_more() {
    let Some(mut factory) = Factory::new().await else { return };
    factory.make().await.unwrap();
    // Another configuration's stays, as long as its files do.
    factory.rig.config.hypervisor.qemu.default_memory = 512;
    factory.make().await.unwrap();
    assert_eq!(factory.status(false).templates.len(), 2);
    std::fs::write(factory.rig.dir.path().join("image/vmlinux"), "another kernel").unwrap();
    assert_eq!(factory.status(false).state, "stale");
    factory.make().await.unwrap();
    assert_eq!(factory.status(false).templates.len(), 1);
    // The same again replaces it.
    factory.make().await.unwrap();
    // What others have there is theirs, and what a process that is gone has begun is nobody's.
    std::fs::create_dir(factory.dir().join(".new-999999999")).unwrap();
    std::fs::write(factory.dir().join("notes"), "").unwrap();
    let digest = factory.status(false).digest;
    assert_eq!(template::destroy(&factory.rig.config).unwrap(), [digest, ".new-999999999".to_owned()]);
    assert_eq!(std::fs::read_dir(factory.dir()).unwrap().count(), 1);
    assert_eq!(template::destroy(&factory.rig.config).unwrap(), Vec::<String>::new());
}

#[tokio::test]
async fn template_that_cannot_be_made_leaves_nothing() {
    let Some(mut factory) = Factory::new().await else { return };
    let spec = factory.rig.spec();
    let vm = Box::new(factory.rig.guest().without_snapshots());
    let refused = template::make(spec, vm, std::future::pending()).await.unwrap_err();
    assert!(refused.to_string().ends_with("set runtime.hypervisor_name to \"builtin\""), "{refused}");

    factory.rig.vm = FakeVm::new();
    let given_up = tokio::time::sleep(Duration::from_millis(200));
    let making = template::make(factory.rig.spec(), Box::new(factory.rig.guest()), given_up);
    assert!(matches!(soon(making).await.unwrap_err(), TemplateError::GivenUp));
    factory.rig.assert_clean().await;
    assert_eq!(std::fs::read_dir(factory.dir()).unwrap().count(), 0);

    std::fs::set_permissions(factory.dir(), PermissionsExt::from_mode(0o777)).unwrap();
    factory.rig.vm = FakeVm::new();
    let making = template::make(factory.rig.spec(), Box::new(factory.rig.guest()), std::future::pending());
    assert!(matches!(making.await.unwrap_err(), TemplateError::Untrusted { .. }));

    let small = c"size=8m,mode=0700";
    rustix::mount::mount("none", factory.dir(), "tmpfs", MountFlags::empty(), small).unwrap();
    let making = template::make(factory.rig.spec(), Box::new(factory.rig.guest()), std::future::pending());
    let full = making.await.unwrap_err();
    rustix::mount::unmount(factory.dir(), UnmountFlags::empty()).unwrap();
    assert!(full.to_string().contains(" MiB left, and a template may take 256 MiB"), "{full}");
    factory.rig.assert_clean().await;
}
