//! The tests, all of them by default.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use crate::products::Profile;
use crate::shell::{self, ChoreError, at, cargo, tree};
use crate::unpacked::{NEWER_CONTAINERD, NEWER_DOCKER, NEWER_QEMU};
use crate::{Chores, demo, packages, products, say};

/// Runs the test suite; with `unit`, without booting machines.
pub fn run(unit: bool, filter: &[String]) -> Chores {
    packages::for_test()?;
    let mut nextest = cargo();
    nextest.args(["nextest", "run", "--workspace", "--cargo-profile", Profile::Quick.name()]);
    let profile = if unit { "unit" } else { "default" };
    nextest.args(["--profile", profile]);
    if !unit {
        let products = products::build(Profile::Quick, products::STOCK_KERNEL, true)?;
        nextest.env("KATA_TEST_PROGRAMS", &products.dir).env("KATA_TEST_IMAGE", demo::busybox_image()?);
        nextest.env("KATA_TEST_KERNEL", products.dir.join("guest-image/vmlinux"));
        nextest.env("KATA_TEST_INITRD", small_initrd()?);
        nextest.env("KATA_TEST_CONTAINERD", "/usr/bin/containerd");
        for (variable, unpacked) in [
            ("KATA_TEST_NEWER_QEMU", NEWER_QEMU),
            ("KATA_TEST_NEWER_CONTAINERD", NEWER_CONTAINERD),
            ("KATA_TEST_DOCKERD", NEWER_DOCKER),
        ] {
            match unpacked.program() {
                Ok(program) => drop(nextest.env(variable, program)),
                Err(error) => say(&format!("{variable} stays unset: {}", shell::chain(&error))),
            }
        }
    }
    say("running the tests");
    let outcome = shell::run(nextest.args(filter));
    let report = tree().join("target/nextest").join(profile).join("junit.xml");
    let skipped = skips(&std::fs::read_to_string(&report).map_err(at("read", &report))?);
    say(&format!("{} tests skipped something", skipped.len()));
    for skip in skipped {
        eprintln!("    {skip}");
    }
    outcome.and_then(|()| nothing_left())
}

/// An initramfs whose init says so and ends the machine, for tests of the VMM alone.
fn small_initrd() -> Chores<PathBuf> {
    let dir = tree().join("target/small-initrd");
    let (bin, init) = (dir.join("bin"), dir.join("init"));
    std::fs::create_dir_all(&bin).map_err(at("create", &bin))?;
    std::fs::copy("/bin/busybox", bin.join("busybox")).map_err(at("copy busybox to", &bin))?;
    let script = "#!/bin/busybox sh\n/bin/busybox echo INIT\n/bin/busybox reboot -f\n";
    std::fs::write(&init, script).map_err(at("write", &init))?;
    std::fs::set_permissions(&init, std::fs::Permissions::from_mode(0o755)).map_err(at("mark", &init))?;
    let pack = "find . | cpio --quiet -o -H newc > ../small-initrd.cpio";
    shell::run(Command::new("sh").current_dir(&dir).args(["-c", pack]))?;
    Ok(dir.with_extension("cpio"))
}

/// Tests that said `skipped: why`, from the runner's report: a skip that nobody sees hides everything.
fn skips(report: &str) -> Vec<String> {
    let mut test = "";
    let mut found = Vec::new();
    for line in report.lines() {
        if let Some((_, rest)) = line.split_once("<testcase name=\"") {
            test = rest.split('"').next().unwrap_or_default();
        }
        if let Some((_, reason)) = line.split_once("skipped: ") {
            found.push(format!("{test}: {}", reason.split("</").next().unwrap_or_default()));
        }
    }
    found
}

/// After the whole suite: no program under test may still run, and no test's mount be there.
fn nothing_left() -> Chores {
    let programs = tree().join("target").join(Profile::Quick.name());
    let mut left = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(program) = std::fs::read_link(entry.path().join("exe")) else { continue };
        let arguments = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let of_a_test = String::from_utf8_lossy(&arguments).contains("/run/kt-");
        if program.parent() == Some(&programs) || of_a_test {
            left.push(format!("process {} {}", entry.file_name().to_string_lossy(), program.display()));
        }
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    left.extend(mounts.lines().filter(|line| line.contains(" /run/kt-")).map(|line| format!("mount {line}")));
    if left.is_empty() {
        Ok(())
    } else {
        Err(ChoreError::Found(format!("the suite left behind:\n       {}", left.join("\n       "))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skips_are_found_with_their_tests_and_reasons() {
        let report =
            "<testcase name=\"a\" x>\n<system-err>skipped: no root</system-err>\n<testcase name=\"b\">\n";
        assert_eq!(skips(report), ["a: no root"]);
    }
}
