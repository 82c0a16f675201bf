//! Root file systems that a snapshotter gives as block devices or file-system images go into the machine as disks.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::{Command, Stdio};

use kata_testkit::containerd::{Containerd, Version};
use kata_testkit::host::{stderr, stdout};

/// The line of the root in the container's `/proc/mounts`, with the whole of what it says before its options.
const ROOT: &str = "awk '$2 == \"/\" { print $1, $3 }' /proc/mounts";

#[test]
fn blockfile_is_a_disk_of_the_machine_and_keeps_what_is_written() {
    let Some(rig) = Containerd::with_blockfiles(Version::V2) else { return };
    if !rig.has_machines() {
        return;
    }
    let output = rig.sh(&["--snapshotter", "blockfile"], "disk", ROOT);
    let text = stdout(&output);
    assert!(text.starts_with("/dev/vd") && text.trim_end().ends_with("ext4"), "{text}{}", stderr(&output));

    // A second task of the same container finds the file of the first.
    rig.detached(
        &["--snapshotter", "blockfile"],
        "kept",
        "[ -e /mark ] || echo once > /mark; exec sleep 1000",
    );
    rig.host().wait_for("the file", || rig.exec("kept", "look", "cat /mark").status.success().then_some(()));
    rig.ok(["task", "rm", "--force", "kept"]);
    rig.ok(["task", "start", "-d", "kept"]);
    assert_eq!(stdout(&rig.exec("kept", "look", "cat /mark")), "once\n");
    rig.remove("kept");
}

/// The disks of the container's machine, each with whether it is read-only.
const DISKS: &str = "for disk in /sys/block/vd*; do [ -e $disk/ro ] && cat $disk/ro; done";

#[test]
fn erofs_layers_of_a_read_only_root_are_disks_of_the_machine() {
    let Some(rig) = Containerd::new(Version::V2) else { return };
    if !rig.has_machines() {
        return;
    }
    let script = format!("{DISKS}; ls /bin/sh; touch /new");
    let output = rig.sh(&["--snapshotter", "erofs", "--read-only"], "image", &script);
    assert_eq!(stdout(&output), "1\n/bin/sh\n", "{}", stderr(&output));
    assert!(stderr(&output).contains("Read-only file system"), "{}", stderr(&output));
}

#[test]
fn what_a_container_writes_over_erofs_layers_is_in_its_snapshot() {
    let Some(rig) = Containerd::new(Version::V2) else { return };
    let script = "echo written > /new; cat /new; ls /bin/sh; exec sleep 1000";
    rig.detached(&["--snapshotter", "erofs"], "layers", script);
    rig.host().wait_for("the file", || rig.exec("layers", "look", "cat /new").status.success().then_some(()));
    let diff = ["snapshots", "--snapshotter", "erofs", "diff", "layers"];
    let mut diff = rig.ctr(diff).stdout(Stdio::piped()).spawn().unwrap();
    let unpack = Command::new("tar").args(["-xzO", "new"]).stdin(diff.stdout.take().unwrap()).output();
    assert_eq!(stdout(&unpack.unwrap()), "written\n");
    assert!(diff.wait().unwrap().success());
    rig.remove("layers");
}

#[test]
fn native_snapshotter_gives_a_directory_that_is_shared() {
    let Some(rig) = Containerd::new(Version::V2) else { return };
    let output = rig.sh(&["--snapshotter", "native"], "copy", "echo written > /new; cat /new; ls /bin/sh");
    assert_eq!(stdout(&output), "written\n/bin/sh\n", "{}", stderr(&output));
}
