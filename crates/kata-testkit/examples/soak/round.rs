//! One pod's life, as a seed has it.

use std::fmt;
use std::time::{Duration, Instant};

use kata_testkit::containerd::send;
use kata_testkit::cri::{Container, Cri, Pod, api};
use kata_testkit::host::wait_for;
use rustix::process::Signal;
use serde_json::Value;

/// How long the death of a part may go unnoticed, and a deletion fail: a kubelet tries again, too.
const PATIENCE: Duration = Duration::from_secs(60);
/// How many loads there are at most before the end.
const LOADS: usize = 4;

/// A round, and what it has done.
pub struct Round<'a> {
    cri: &'a Cri,
    number: u64,
    random: fastrand::Rng,
    did: Vec<&'static str>,
}

impl fmt::Display for Round<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "round {}: {}", self.number, self.did.join(", "))
    }
}

impl<'a> Round<'a> {
    /// Round `number` of a seed.
    pub fn new(cri: &'a Cri, seed: u64, number: u64) -> Self {
        let random = fastrand::Rng::with_seed(seed.wrapping_mul(1_000_003).wrapping_add(number));
        Self { cri, number, random, did: Vec::new() }
    }

    fn name(&self) -> String {
        format!("soak-{}", self.number)
    }

    /// A pod from its start to its end; panics where something is not as it should be.
    pub fn run(&mut self) {
        if self.random.u8(..10) == 0 {
            return self.give_up_early();
        }
        self.did.push("start");
        let pod = self.cri.pod(&self.name()).run();
        let count = self.random.usize(1..=2);
        let containers: Vec<_> =
            (0..count).map(|n| pod.container(&format!("main{n}")).idle().start()).collect();
        for _ in 0..self.random.usize(..=LOADS) {
            let container = &containers[self.random.usize(..containers.len())];
            self.load(container);
        }
        self.end(&pod, &containers);
        self.remove(&pod);
    }

    /// A pod whose client goes away while it starts.
    fn give_up_early(&mut self) {
        self.did.push("client killed during the start");
        let rig = self.cri.containerd();
        let name = self.name();
        let image = kata_testkit::containerd::IMAGE;
        let mut client = rig.ctr(rig.run(&["--rm", image, &name, "true"])).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(self.random.u64(..3000)));
        let _ = client.kill();
        client.wait().unwrap();
        wait_for("the container to be gone", PATIENCE, || {
            rig.output(["task", "rm", "--force", &name]);
            rig.output(["container", "rm", &name]);
            let listed = rig.ok(["container", "ls", "-q"]) + &rig.ok(["task", "ls", "-q"]);
            (!listed.lines().any(|line| line == name)).then_some(())
        });
    }

    fn load(&mut self, container: &Container<'_>) {
        match self.random.u8(..6) {
            0 => {
                self.did.push("exec");
                assert_eq!(container.sh("echo out; echo err >&2; exit 7").code, 7);
            }
            1 => {
                self.did.push("io");
                let write = "head -c 4194304 /dev/urandom > /f && cp /f /g && sync && cmp /f /g && rm /f /g";
                assert_eq!(container.sh(write).code, 0, "files differ");
            }
            2 => {
                self.did.push("network");
                assert_eq!(container.sh("ping -c 2 -W 20 10.89.0.1").code, 0, "the bridge does not answer");
            }
            3 => {
                self.did.push("output");
                assert_eq!(container.sh("head -c 1000000 /dev/zero | tr '\\0' x").text().len(), 1_000_000);
            }
            4 => {
                self.did.push("stats");
                assert!(container.stats().memory.working_set_bytes.value > 0);
            }
            _ => {
                self.did.push("pause");
                self.ctr(&["task", "pause", container.id()]);
                std::thread::sleep(Duration::from_millis(self.random.u64(..500)));
                self.ctr(&["task", "resume", container.id()]);
                assert_eq!(container.sh("echo on").text(), "on\n");
            }
        }
    }

    /// `ctr` where the CRI has no word for it.
    fn ctr(&self, words: &[&str]) {
        self.cri.containerd().ok(["--namespace", "k8s.io"].iter().chain(words));
    }

    fn end(&mut self, pod: &Pod<'_>, containers: &[Container<'_>]) {
        match self.random.u8(..10) {
            0 | 1 => self.did.push("removed while it runs"),
            2 => {
                self.did.push("stopped");
                pod.stop();
            }
            3 | 4 => {
                self.did.push("container killed");
                let container = &containers[0];
                self.ctr(&["task", "kill", "--signal", "KILL", container.id()]);
                assert_eq!(container.wait().exit_code, 137);
            }
            5 => {
                self.did.push("owner killed");
                send(owner(self.cri, pod.id()).expect("the pod has an owner"), Signal::KILL);
                self.dead(pod);
            }
            n => {
                let parts = parts(self.cri, pod.id());
                assert!(!parts.is_empty(), "the pod has no processes");
                let (name, pid) = &parts[self.random.usize(..parts.len())];
                let signal = if n == 9 { Signal::STOP } else { Signal::KILL };
                let what = if n == 9 { "stopped by a signal" } else { "killed" };
                self.did.push(format!("{name} {what}").leak());
                send(*pid, signal);
                self.dead(pod);
            }
        }
    }

    /// Waits until the pod's death is known.
    fn dead(&self, pod: &Pod<'_>) {
        wait_for("the pod's death to be known", PATIENCE, || (!pod.is_ready()).then_some(()));
    }

    /// Removes the pod as a kubelet does, which tries again.
    fn remove(&mut self, pod: &Pod<'_>) {
        let mut request = api::RemovePodSandboxRequest::new();
        pod.id().clone_into(&mut request.pod_sandbox_id);
        let begin = Instant::now();
        let mut tries = 0;
        loop {
            let removed = pod.try_stop().and_then(|()| {
                self.cri.client().runtime::<_, api::Nothing>("RemovePodSandbox", request.clone())
            });
            match removed {
                Ok(_) => break,
                Err(status) if begin.elapsed() > PATIENCE => {
                    panic!("cannot be removed: {}", status.message())
                }
                Err(status) => {
                    eprintln!("soak: round {}: not removed yet: {}", self.number, status.message())
                }
            }
            tries += 1;
            std::thread::sleep(Duration::from_secs(1));
        }
        if tries > 0 {
            self.did.push("removed not at the first time");
        }
        let dir = self.cri.host().run_dir().join(pod.id());
        wait_for("the pod's directory to be gone", PATIENCE, || (!dir.exists()).then_some(()));
    }

    /// Best effort to be rid of what a failed round made, so that the next finds room.
    pub fn give_up(&self) {
        let mut filter = api::ListPodSandboxRequest::new();
        filter.filter.mut_or_insert_default();
        let Ok(listed) =
            self.cri.client().runtime::<_, api::ListPodSandboxResponse>("ListPodSandbox", filter)
        else {
            return;
        };
        let name = self.name();
        for pod in listed.items.iter().filter(|pod| pod.metadata.name == name) {
            let mut stop = api::StopPodSandboxRequest::new();
            pod.id.clone_into(&mut stop.pod_sandbox_id);
            let _ = self.cri.client().runtime::<_, api::Nothing>("StopPodSandbox", stop);
            let mut remove = api::RemovePodSandboxRequest::new();
            pod.id.clone_into(&mut remove.pod_sandbox_id);
            let _ = self.cri.client().runtime::<_, api::Nothing>("RemovePodSandbox", remove);
        }
    }
}

fn read(cri: &Cri, pod: &str, file: &str) -> String {
    std::fs::read_to_string(cri.host().run_dir().join(pod).join(file)).unwrap_or_default()
}

/// The process that owns a pod.
pub fn owner(cri: &Cri, pod: &str) -> Option<u32> {
    let state: Value = serde_json::from_str(&read(cri, pod, "state.json")).ok()?;
    u32::try_from(state.get("owner_pid")?.as_u64()?).ok()
}

/// The pod's other processes on the host, with their names, as its leak record has them.
fn parts(cri: &Cri, pod: &str) -> Vec<(String, u32)> {
    let record = read(cri, pod, "resources.jsonl");
    let entries = record.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    entries
        .filter_map(|entry| {
            let process = entry.get("process")?;
            let pid = u32::try_from(process.get("pid")?.as_u64()?).ok()?;
            Some((process.get("name")?.as_str()?.to_owned(), pid))
        })
        .filter(|(_, pid)| std::path::Path::new(&format!("/proc/{pid}")).exists())
        .collect()
}
