//! What `ctr` takes with our runtime and with runc, in turn under one containerd.
//!
//! `containerd-start COUNT PODS…` prints one JSON object with milliseconds: `kata` and `runc` are runs of `true` from the client's
//! start to its end, `kata_exec` and `runc_exec` execs of `true` in a container that runs, `parallel` the time until the
//! last of PODS pods started at once has ended. Programs and image are named by the variables of the tests.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a measurement fails by panicking"
)]

use std::process::{Child, Stdio};
use std::time::Instant;

use kata_testkit::containerd::{Containerd, IMAGE, Version};

const KATA: &str = "io.containerd.kata.v2";
const RUNC: &str = "io.containerd.runc.v2";

fn start(rig: &Containerd, words: &[&str]) -> Child {
    rig.ctr(words).stdout(Stdio::null()).spawn().unwrap()
}

/// Milliseconds until a client has ended, which must go well.
fn timed(rig: &Containerd, words: &[&str]) -> f64 {
    let begin = Instant::now();
    assert!(start(rig, words).wait().unwrap().success(), "ctr {}", words.join(" "));
    begin.elapsed().as_secs_f64() * 1e3
}

fn run(rig: &Containerd, runtime: &str, round: usize) -> f64 {
    let id = format!("{}-{round}", runtime.replace('.', "-"));
    timed(rig, &["run", "--rm", "--runtime", runtime, IMAGE, &id, "true"])
}

fn execs(rig: &Containerd, runtime: &str, count: usize) -> Vec<f64> {
    timed(rig, &["run", "-d", "--runtime", runtime, IMAGE, "exec", "sleep", "1000"]);
    let exec =
        |round: usize| timed(rig, &["task", "exec", "--exec-id", &format!("e{round}"), "exec", "true"]);
    // The first warms the page cache of the guest.
    exec(0);
    let times = (1..=count).map(exec).collect();
    rig.remove("exec");
    times
}

/// Milliseconds until all of `count` pods, started at once, have run to their end.
fn parallel(rig: &Containerd, count: usize) -> f64 {
    let begin = Instant::now();
    let ids: Vec<String> = (0..count).map(|number| format!("parallel-{number}")).collect();
    let clients: Vec<Child> =
        ids.iter().map(|id| start(rig, &["run", "--rm", "--runtime", KATA, IMAGE, id, "true"])).collect();
    for mut client in clients {
        assert!(client.wait().unwrap().success(), "one of {count} pods started at once failed");
    }
    begin.elapsed().as_secs_f64() * 1e3
}

fn main() {
    let mut numbers = std::env::args().skip(1).map(|word| word.parse().expect("arguments are numbers"));
    let count: usize = numbers.next().expect("the first argument is the number of runs");
    let rig = Containerd::new(Version::V1).expect("the variables of the tests are set");
    rig.host().configure("[hypervisor.qemu]\ndefault_memory = 256\n");
    let (mut kata, mut runc) = (Vec::new(), Vec::new());
    // One of each to warm the page cache.
    for round in 0..=count {
        let times = (run(&rig, RUNC, round), run(&rig, KATA, round));
        if round > 0 {
            runc.push(times.0);
            kata.push(times.1);
        }
    }
    let (kata_exec, runc_exec) = (execs(&rig, KATA, count), execs(&rig, RUNC, count));
    let parallel: Vec<f64> = numbers.map(|pods| parallel(&rig, pods)).collect();
    let figures = serde_json::json!({
        "kata": kata, "runc": runc, "kata_exec": kata_exec, "runc_exec": runc_exec, "parallel": parallel,
    });
    println!("{figures}");
}
