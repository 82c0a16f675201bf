//! Pods in guests of the services image: systemd on a verified disk, the agent as one of its services.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Instant;

use kata_testkit::guest_services::{self, Extension};
use kata_testkit::host::{Host, stderr, stdout};

/// A world whose pods boot the services image, with that image's directory.
fn world() -> Option<(Host, PathBuf)> {
    let image = guest_services::image()?;
    let host = Host::new()?;
    configure(&host, &image, "");
    Some((host, image))
}

fn configure(host: &Host, image: &Path, more: &str) {
    host.configure(&format!("[hypervisor.qemu]\nimage = \"{}\"\n{more}\n", image.display()));
}

/// A copy of the image that may be spoilt. What it is made of is the same files where it can be.
fn copy_of(host: &Host, image: &Path) -> PathBuf {
    let copy = host.scratch("image");
    fs::create_dir_all(&copy).unwrap();
    for entry in fs::read_dir(image).unwrap().flatten() {
        fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    copy
}

fn flip(file: &Path, at: usize) {
    let mut bytes = fs::read(file).unwrap();
    bytes[at] ^= 1;
    fs::write(file, bytes).unwrap();
}

#[track_caller]
fn says(output: &Output, words: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(125), "{text}");
    for word in words {
        assert!(text.contains(word), "no `{word}` in: {text}");
    }
}

/// An extension with one process, a static busybox that says on the console that it runs.
fn extension(host: &Host) -> Extension {
    let components = r#"
schema_version = 1

[[process]]
id = "witness"
level = 1
path = "bin/busybox"
args = ["sh", "-c", "echo '<2>the witness runs' > /dev/kmsg; exec ${extension_root}/bin/busybox sleep 100000"]
"#;
    Extension::new(host, Path::new("/bin/busybox"), components)
}

#[test]
fn container_runs_beside_systemd() {
    let Some((host, _)) = world() else { return };
    let output = host.sh(&[], "echo out; echo err >&2; exit 7");
    assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
    assert_eq!((stdout(&output).as_str(), stderr(&output).as_str()), ("out\n", "err\n"));
}

#[test]
fn detached_container_is_entered_and_removed_and_has_a_cgroup_with_controllers() {
    let Some((host, _)) = world() else { return };
    let image = host.image();
    let output = host.output(["run", "-d", "--name", "box", &image, "sleep", "1000"]);
    assert!(output.status.success(), "{}", stderr(&output));
    // Its cgroup is below the agent's own, of which the container sees nothing.
    let output =
        host.output(["exec", "box", "cat", "/proc/self/cgroup", "/sys/fs/cgroup/cgroup.controllers"]);
    let text = stdout(&output);
    assert!(text.starts_with("0::/\n"), "{text}");
    assert!(["cpu", "memory", "pids"].iter().all(|name| text.contains(name)), "{text}");
    let output = host.output(["exec", "box", "sh", "-c", "exit 3"]);
    assert_eq!(output.status.code(), Some(3));
    let output = host.output(["rm", "-f", "box"]);
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn changed_root_disk_starts_no_pod_and_is_named() {
    let Some((host, image)) = world() else { return };
    let copy = copy_of(&host, &image);
    // The super block of the file system, which is read first of all.
    flip(&copy.join("root.img"), 1024);
    configure(&host, &copy, "");
    let path = copy.join("root.img");
    says(&host.sh(&[], "true"), &[path.to_str().unwrap(), "changed after the image was built"]);
}

#[test]
fn extension_brings_a_service_that_runs() {
    let Some((host, image)) = world() else { return };
    configure(&host, &image, &extension(&host).table());
    let output = host.output(["run", "-d", "--name", "box", &host.image(), "sleep", "1000"]);
    assert!(output.status.success(), "{}", stderr(&output));
    host.wait_for("the witness", || {
        stdout(&host.output(["console", "box"])).contains("the witness runs").then_some(())
    });
    let output = host.output(["rm", "-f", "box"]);
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn extension_that_is_not_the_measured_one_starts_no_pod_and_is_named() {
    let Some((host, image)) = world() else { return };
    let mut extension = extension(&host);
    let (_, rest) = extension.verity.split_once(',').unwrap();
    extension.verity = format!("root_hash={},{rest}", "0".repeat(64));
    configure(&host, &image, &extension.table());
    says(&host.sh(&[], "true"), &["tools"]);
}

#[test]
fn lean_image_that_is_asked_for_an_extension_is_refused_with_the_image_that_can() {
    let Some((host, _)) = world() else { return };
    configure(&host, &host.program("guest-image"), &extension(&host).table());
    says(&host.sh(&[], "true"), &["no extensions", "guest_extension_images", "--flavour services"]);
}

#[test]
fn services_image_starts_within_four_times_what_the_lean_one_takes() {
    let Some((host, image)) = world() else { return };
    let lean = host.program("guest-image");
    // Beside each other, so that what else the machine does counts for both.
    let took = |image: &Path| {
        configure(&host, image, "");
        let begin = Instant::now();
        let output = host.sh(&[], "true");
        assert!(output.status.success(), "{}", stderr(&output));
        begin.elapsed()
    };
    let mut ratios = [(); 3].map(|()| took(&image).as_secs_f64() / took(&lean).as_secs_f64());
    ratios.sort_by(f64::total_cmp);
    assert!(ratios[0] < 4.0, "{ratios:?}");
}
