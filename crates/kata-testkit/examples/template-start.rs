//! What a machine takes from its start until its agent serves, as a copy of a template and without one, in turn.
//!
//! `template-start COUNT` prints one JSON object with milliseconds: `shared` and `alone` are pods with a share and pods whose root is a
//! disk, each `copied` and `cold`. Programs and image are named by the variables of the tests; it takes KVM.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a measurement fails by panicking"
)]

use kata_testkit::containerd::{Containerd, Version};
use kata_testkit::host::{stderr, stdout};
use serde_json::{Value, json};

const POD: &str = "template-start";

/// Milliseconds of one start.
fn start(rig: &Containerd, options: &[&str], copied: bool) -> f64 {
    rig.detached(options, POD, "exec sleep 1000");
    let output = rig.host().output(["inspect", POD]);
    let pod: Value = serde_json::from_str(&stdout(&output)).unwrap_or_else(|_| panic!("{}", stderr(&output)));
    rig.remove(POD);
    let stages = pod["timeline"].as_array().unwrap();
    let machine = stages.iter().find(|stage| stage["layer"] == "vmm").unwrap();
    assert_eq!(machine["name"] == "restore", copied, "{stages:?}");
    let served = stages.iter().find(|stage| stage["name"] == "connect").unwrap();
    let microseconds = |stage: &Value, field: &str| stage[field].as_f64().unwrap();
    let end = microseconds(served, "start_us") + microseconds(served, "duration_us");
    (end - microseconds(machine, "start_us")) / 1e3
}

/// Starts of pods with this `shared_fs`.
fn measure(rig: &Containerd, count: usize, share: &str, options: &[&str]) -> Value {
    let store = rig.host().scratch("template");
    let configure = |enabled: bool| {
        rig.host().configure(&format!(
            "[runtime]\nhypervisor_name = \"builtin\"\n[hypervisor.qemu]\ndefault_memory = 256\nshared_fs = \"{share}\"\n\
             [hypervisor.qemu.factory]\nenable_template = {enabled}\ntemplate_path = \"{}\"\n",
            store.display()
        ));
    };
    configure(true);
    let made = rig.host().output(["factory", "init"]);
    assert!(made.status.success(), "{}", stderr(&made));
    let [mut copied, mut cold] = [const { Vec::new() }; 2];
    // One of each to warm the page cache.
    for round in 0..=count {
        for (enabled, times) in [(true, &mut copied), (false, &mut cold)] {
            configure(enabled);
            let time = start(rig, options, enabled);
            if round > 0 {
                times.push(time);
            }
        }
    }
    let gone = rig.host().output(["factory", "destroy"]);
    assert!(gone.status.success(), "{}", stderr(&gone));
    json!({ "copied": copied, "cold": cold })
}

fn main() {
    let count = std::env::args().nth(1).and_then(|word| word.parse().ok()).expect("the number of runs");
    let rig = Containerd::with_blockfiles(Version::V1).expect("the variables of the tests are set");
    let shared = measure(&rig, count, "virtio-fs", &[]);
    let alone = measure(&rig, count, "none", &["--snapshotter", "blockfile"]);
    println!("{}", json!({ "shared": shared, "alone": alone }));
}
