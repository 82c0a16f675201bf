//! Root file systems that a snapshotter gives as block devices or file-system images go into the machine as disks.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

use kata_testkit::containerd::{Containerd, Version};
use kata_testkit::host::{stderr, stdout};

/// The line of the root in the container's `/proc/mounts`, with the whole of what it says before its options.
const ROOT: &str = "awk '$2 == \"/\" { print $1, $3 }' /proc/mounts";

/// A containerd with a blockfile snapshotter of ext4 files.
fn with_blockfiles() -> Option<Containerd> {
    let mut rig = Containerd::new(Version::V2)?;
    let scratch = rig.host().scratch("scratch.ext4");
    let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&scratch).arg("64M").status();
    assert!(made.unwrap().success());
    rig.configure(&format!(
        "[plugins.'io.containerd.snapshotter.v1.blockfile']\nscratch_file = {scratch:?}\nfs_type = \"ext4\"\n"
    ));
    rig.stop();
    rig.start();
    Some(rig)
}

#[test]
fn blockfile_is_a_disk_of_the_machine_and_keeps_what_is_written() {
    let Some(rig) = with_blockfiles() else { return };
    if !rig.has_machines() {
        return;
    }
    let output = rig.sh(&["--snapshotter", "blockfile"], "disk", ROOT);
    let text = stdout(&output);
    assert!(text.starts_with("/dev/vd") && text.trim_end().ends_with("ext4"), "{text}{}", stderr(&output));

    // A second task of the same container finds the file of the first.
    rig.detached(&["--snapshotter", "blockfile"], "kept", "echo once > /mark; sync; exec sleep 1000");
    rig.host().wait_for("the file", || rig.exec("kept", "look", "cat /mark").status.success().then_some(()));
    rig.ok(["task", "rm", "--force", "kept"]);
    rig.ok(["task", "start", "-d", "kept"]);
    assert_eq!(stdout(&rig.exec("kept", "look", "cat /mark")), "once\n");
    rig.remove("kept");
}

#[test]
fn read_only_view_of_an_erofs_layer_is_a_disk_of_the_machine() {
    let Some(rig) = Containerd::new(Version::V2) else { return };
    if !rig.has_machines() {
        return;
    }
    let output = rig.sh(&["--snapshotter", "erofs", "--read-only"], "image", ROOT);
    let text = stdout(&output);
    assert!(text.starts_with("/dev/vd") && text.trim_end().ends_with("erofs"), "{text}{}", stderr(&output));
}

#[test]
fn container_on_erofs_layers_is_writable() {
    let Some(rig) = Containerd::new(Version::V2) else { return };
    let output = rig.sh(&["--snapshotter", "erofs"], "layers", "echo written > /new; cat /new; ls /bin/sh");
    assert_eq!(stdout(&output), "written\n/bin/sh\n", "{}", stderr(&output));
}

#[test]
fn native_snapshotter_gives_a_directory_that_is_shared() {
    let Some(rig) = Containerd::new(Version::V2) else { return };
    let output = rig.sh(&["--snapshotter", "native"], "copy", "echo written > /new; cat /new; ls /bin/sh");
    assert_eq!(stdout(&output), "written\n/bin/sh\n", "{}", stderr(&output));
}
