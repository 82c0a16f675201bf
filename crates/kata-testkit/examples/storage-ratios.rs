//! What a container's work on files of the host takes with our runtime and with runc, in turn under one containerd.
//!
//! `storage-ratios COUNT` prints one JSON object: for each kind of work the milliseconds of `kata` and `runc`, from the start of
//! an exec to its end. Programs and image are named by the variables of the tests.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a measurement fails by panicking")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use kata_testkit::containerd::{Containerd, IMAGE, Version};

const RUNTIMES: [(&str, &str); 2] = [("kata", "io.containerd.kata.v2"), ("runc", "io.containerd.runc.v2")];
const MIB: usize = 128;

/// Kinds of work, each a shell script in a directory of the host. What is read was written by the host just before, so that
/// no guest has it in memory.
const WORK: [(&str, &str); 4] = [
    ("read", "dd if=/data/host of=/dev/null bs=1M status=none"),
    ("write", "dd if=/dev/zero of=/data/guest bs=1M count=128 conv=fsync status=none"),
    ("small", "dd if=/dev/zero of=/data/small bs=4k count=4096 status=none"),
    (
        "files",
        "mkdir /data/d && for i in $(seq 500); do echo > /data/d/$i; done && ls -l /data/d > /dev/null && rm -r /data/d",
    ),
];

fn work(rig: &Containerd, runtime: &str, dir: &Path, script: &str, round: usize) -> f64 {
    std::fs::write(dir.join("host"), vec![b'k'; MIB << 20]).unwrap();
    let id = format!("e{round}");
    let words = ["task", "exec", "--exec-id", &id, runtime, "sh", "-c", script];
    let begin = Instant::now();
    assert!(rig.ctr(words).stdout(Stdio::null()).status().unwrap().success(), "{script}");
    begin.elapsed().as_secs_f64() * 1e3
}

fn main() {
    let count: usize = std::env::args()
        .nth(1)
        .and_then(|word| word.parse().ok())
        .expect("the argument is the number of runs");
    let rig = Containerd::new(Version::V1).expect("the variables of the tests are set");
    rig.host().configure("[hypervisor.qemu]\ndefault_memory = 512\n");
    let dir = rig.host().scratch("data");
    std::fs::create_dir_all(&dir).unwrap();
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", dir.display());
    for (name, runtime) in RUNTIMES {
        rig.ok(["run", "-d", "--runtime", runtime, "--mount", &mount, IMAGE, name, "sleep", "10000"]);
    }
    let mut figures: BTreeMap<&str, BTreeMap<&str, Vec<f64>>> = BTreeMap::new();
    let mut rounds = 0..;
    for (kind, script) in WORK {
        // One of each to warm up.
        for measured in (0..=count).map(|round| round > 0) {
            for (name, _) in RUNTIMES {
                let time = work(&rig, name, &dir, script, rounds.next().unwrap());
                if measured {
                    figures.entry(kind).or_default().entry(name).or_default().push(time);
                }
            }
        }
    }
    RUNTIMES.iter().for_each(|(name, _)| rig.remove(name));
    println!("{}", serde_json::to_string(&figures).unwrap());
}
