//! The tests, all of them by default.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use crate::products::{Products, Profile};
use crate::shell::{self, ChoreError, at, cargo, tree};
use crate::unpacked::{NEWER_CONTAINERD, NEWER_DOCKER, NEWER_QEMU};
use crate::{Chores, demo, lab, names, packages, products, say};

/// Names containerd 2 to tests.
pub const NEWER_CONTAINERD_VARIABLE: &str = "KATA_TEST_NEWER_CONTAINERD";

/// As many tests may pass only when tried again; of more the cause is not the host.
const TRIED_AGAIN_LIMIT: usize = 3;

/// Runs the test suite, and at the end of all of it the lab's; with `unit`, without booting machines.
pub fn run(unit: bool, filter: &[String]) -> Chores {
    packages::for_test()?;
    let mut environment = Vec::new();
    environment.extend(named("KATA_SEV_SNP_MEASURE", packages::sev_snp_measure()));
    if !unit {
        // One waits for the network, the other for the processors.
        let (debian, prepared) = std::thread::scope(|scope| {
            let debian = scope.spawn(lab::make_debian);
            let prepared = prepare();
            (debian.join(), prepared)
        });
        environment.extend(prepared?);
        debian.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        lab::make(&file_server())?;
        environment.push(("KATA_TEST_FILE_SERVER", file_server()));
        environment.extend(newer_programs());
    }
    say("running the tests");
    run_profile(if unit { "unit" } else { "default" }, &environment, filter)?;
    if unit || !filter.is_empty() {
        return Ok(());
    }
    say("running some of them with pods in guests of the services image");
    environment.push(("KATA_TEST_GUEST", "services".into()));
    run_profile("services", &environment, filter)?;
    lab::test()
}

/// Runs what a profile of the runner chooses.
fn run_profile(profile: &str, environment: &[(&str, PathBuf)], filter: &[String]) -> Chores {
    let mut nextest = cargo();
    nextest.args(["nextest", "run", "--workspace", "--cargo-profile", Profile::Quick.name()]);
    nextest.args(products::TESTED_FEATURES).args(["--profile", profile]);
    nextest.envs(environment.iter().map(|(name, value)| (name, value)));
    let outcome = shell::run(nextest.args(filter));
    let tried_again = tell_report(profile)?;
    outcome?;
    if tried_again > TRIED_AGAIN_LIMIT {
        return Err(ChoreError::Found(format!(
            "{tried_again} tests passed only when tried again, and at most {TRIED_AGAIN_LIMIT} may"
        )));
    }
    nothing_left()
}

/// Builds what tests that boot machines are given, and answers the variables that say where it is.
pub fn prepare() -> Chores<Vec<(&'static str, PathBuf)>> {
    let products = products::build_with_tests(products::STOCK_KERNEL)?;
    let services = products::build_services_image(&products, products::STOCK_KERNEL)?;
    names::check(&products.nameless())?;
    Ok(vec![
        ("KATA_TEST_KERNEL", products.dir.join("guest-image/vmlinux")),
        ("KATA_TEST_PROGRAMS", products.dir),
        ("KATA_TEST_SERVICES", services),
        ("KATA_TEST_FAKE_SERVICES", products::build_fake_services()?),
        ("KATA_TEST_IMAGE", demo::busybox_image()?),
        ("KATA_TEST_INITRD", small_initrd()?),
        ("KATA_TEST_CONTAINERD", PathBuf::from("/usr/bin/containerd")),
    ])
}

/// The file server among what [`prepare`] builds.
pub fn file_server() -> PathBuf {
    Products::built(Profile::Quick).program("kata-virtiofsd")
}

/// Where newer programs than the host's are, as far as they can be had.
pub fn newer_programs() -> Vec<(&'static str, PathBuf)> {
    let programs = [
        ("KATA_TEST_NEWER_QEMU", NEWER_QEMU),
        (NEWER_CONTAINERD_VARIABLE, NEWER_CONTAINERD),
        ("KATA_TEST_DOCKERD", NEWER_DOCKER),
    ];
    programs.into_iter().filter_map(|(variable, unpacked)| named(variable, unpacked.program())).collect()
}

/// A program for tests by its variable; where it cannot be had, that is said, and they have to do without.
fn named(variable: &'static str, program: Chores<PathBuf>) -> Option<(&'static str, PathBuf)> {
    program
        .inspect_err(|error| say(&format!("{variable} stays unset: {}", shell::chain(error))))
        .ok()
        .map(|program| (variable, program))
}

/// Where the runner reports what it did under a profile.
pub fn report(profile: &str) -> PathBuf {
    tree().join("target/nextest").join(profile).join("junit.xml")
}

/// Prints what of a run's report is easily overlooked: tests that skipped something, and that passed only when tried
/// again. Answers how many of the latter there are.
pub fn tell_report(profile: &str) -> Chores<usize> {
    let report = report(profile);
    let text = std::fs::read_to_string(&report).map_err(at("read", &report))?;
    let (skipped, repeated) = (skips(&text), repeated(&text));
    say(&format!(
        "{} tests skipped something, {} passed only when tried again",
        skipped.len(),
        repeated.len()
    ));
    for line in skipped.iter().chain(&repeated) {
        eprintln!("    {line}");
    }
    Ok(repeated.len())
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
    lines_of_tests(report, |test, line| {
        let (_, reason) = line.split_once("skipped: ")?;
        Some(format!("{test}: {}", reason.split("</").next().unwrap_or_default()))
    })
}

/// Tests that failed at first.
fn repeated(report: &str) -> Vec<String> {
    lines_of_tests(report, |test, line| {
        line.contains("<flakyFailure").then(|| format!("{test}: failed at first, then passed"))
    })
}

/// What `find` makes of the report's lines, each with the test that it belongs to.
fn lines_of_tests(report: &str, find: impl Fn(&str, &str) -> Option<String>) -> Vec<String> {
    let mut test = "";
    let mut found = Vec::new();
    for line in report.lines() {
        if let Some((_, rest)) = line.split_once("<testcase name=\"") {
            test = rest.split('"').next().unwrap_or_default();
        }
        found.extend(find(test, line));
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
        assert!(repeated(report).is_empty());
    }

    #[test]
    fn test_that_passed_only_the_second_time_is_found() {
        let report =
            "<testcase name=\"a\">\n</testcase>\n<testcase name=\"b\">\n  <flakyFailure type=\"x\">\n";
        assert_eq!(repeated(report), ["b: failed at first, then passed"]);
    }
}
