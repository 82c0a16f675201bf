use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use oci_spec::runtime::{HookBuilder, HooksBuilder};

use super::*;

fn network(bundle: &Path, hooks: &[Hook], runtime_netns: Option<Arc<OwnedFd>>) -> NetworkSpec {
    NetworkSpec { hooks: hooks.to_vec(), bundle: bundle.to_owned(), runtime_netns }
}

/// A bundle whose hooks are scripts in it.
struct Bundle(tempfile::TempDir);

impl Bundle {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn script(&self, name: &str, text: &str) -> Hook {
        let path = self.path().join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        HookBuilder::default().path(path).build().unwrap()
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path().join(name)).unwrap()
    }

    async fn run(&self, hook: Hook) -> Result<(), String> {
        let result = run_network_hooks("c", &network(self.path(), &[hook], None)).await;
        // The directory's name is of no interest.
        result
            .map_err(|error| crate::error::chain(&error).replace(&format!("{}/", self.path().display()), ""))
    }
}

#[tokio::test]
async fn hook_reads_the_state_from_its_input() {
    let bundle = Bundle::new();
    let mut spec = Spec::default();
    spec.set_annotations(Some([("colour".to_owned(), "red".to_owned())].into()));
    let hook = bundle.script("hook", "cat > \"$(basename $0).state\"");
    let stop = bundle.script("stop", "cat > \"$(basename $0).state\"");
    let hooks = HooksBuilder::default().create_runtime(vec![hook]).poststop(vec![stop]).build().unwrap();
    spec.set_hooks(Some(hooks));
    let hooks = Hooks::new("web", bundle.path(), &spec, None);
    hooks.create().await.unwrap();
    let state = |name| serde_json::from_str::<serde_json::Value>(&bundle.read(name)).unwrap();
    let expected = serde_json::json!({
        "ociVersion": spec.version(), "id": "web", "status": "creating", "pid": std::process::id(),
        "bundle": bundle.path(), "annotations": {"colour": "red"},
    });
    assert_eq!(state("hook.state"), expected);
    hooks.poststop().await;
    let stopped = state("stop.state");
    assert_eq!((&stopped["status"], stopped.get("pid")), (&"stopped".into(), None));
}

#[tokio::test]
async fn hook_gets_arguments_and_environment_as_given() {
    let bundle = Bundle::new();
    let mut hook = HookBuilder::default().path("/bin/sh").build().unwrap();
    let script = "echo $0 $1 > args; env | grep -v ^PWD= | sort > env";
    hook.set_args(Some(["sh", "-c", script, "zero", "one"].map(str::to_owned).to_vec()));
    hook.set_env(Some(["A=b=c", "EMPTY="].map(str::to_owned).to_vec()));
    bundle.run(hook).await.unwrap();
    assert_eq!(
        (bundle.read("args").as_str(), bundle.read("env").as_str()),
        ("zero one\n", "A=b=c\nEMPTY=\n")
    );
}

#[tokio::test]
async fn failed_hook_is_told_with_its_last_words() {
    let bundle = Bundle::new();
    let hook = bundle.script("hook", "echo one >&2; echo 'no such bridge' >&2; exit 3");
    assert_eq!(bundle.run(hook).await.unwrap_err(), "the hook hook exited with code 3: no such bridge");
    let hook = bundle.script("hook", "kill -9 $$");
    assert_eq!(bundle.run(hook).await.unwrap_err(), "the hook hook was killed by signal 9");
    let hook = HookBuilder::default().path("/nonexistent/hook").build().unwrap();
    let text = bundle.run(hook).await.unwrap_err();
    assert_eq!(text, "the hook /nonexistent/hook cannot be run: No such file or directory (os error 2)");
}

#[tokio::test]
async fn hook_that_hangs_is_killed_at_its_timeout() {
    let bundle = Bundle::new();
    let mut hook = bundle.script("hook", "echo $$ > pid; echo waiting >&2; exec sleep 60");
    hook.set_timeout(Some(4));
    let text = bundle.run(hook).await.unwrap_err();
    assert_eq!(text, "the hook hook did not end within 4s and was killed: waiting");
    assert!(!Path::new("/proc").join(bundle.read("pid").trim()).exists());
}

#[tokio::test]
async fn what_a_hook_leaves_running_is_not_waited_for() {
    let bundle = Bundle::new();
    let hook = bundle.script("hook", "sleep 600 & echo $! > pid; echo done >&2");
    let start = Instant::now();
    bundle.run(hook).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    let pid = bundle.read("pid").trim().parse().ok().and_then(rustix::process::Pid::from_raw).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn first_hook_that_fails_is_the_last_to_run() {
    let bundle = Bundle::new();
    let hooks = [bundle.script("one", "exit 1"), bundle.script("two", "touch ran")];
    run_network_hooks("c", &network(bundle.path(), &hooks, None)).await.unwrap_err();
    assert!(!bundle.path().join("ran").exists());

    let mut spec = Spec::default();
    let hooks = HooksBuilder::default().poststart(hooks.to_vec()).build().unwrap();
    spec.set_hooks(Some(hooks));
    Hooks::new("c", bundle.path(), &spec, None).poststart().await;
    assert!(bundle.path().join("ran").exists(), "a container that runs goes on");
}

#[tokio::test]
async fn hook_runs_in_the_network_namespace_that_the_owner_came_from() {
    let own = || std::fs::File::open("/proc/thread-self/ns/net").unwrap();
    let left: Arc<OwnedFd> = Arc::new(own().into());
    let before = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    let Some(_netns) = kata_testkit::netns::Netns::enter() else { return };
    let bundle = Bundle::new();
    let hooks = [bundle.script("hook", "readlink /proc/self/ns/net > where")];
    run_network_hooks("c", &network(bundle.path(), &hooks, Some(left))).await.unwrap();
    assert_eq!(bundle.read("where").trim(), before.to_str().unwrap());
    assert_ne!(std::fs::read_link("/proc/thread-self/ns/net").unwrap(), before);
}
