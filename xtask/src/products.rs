//! The binaries and the guest image that a pod needs.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::shell::{self, at, cargo, tree};
use crate::{Chores, say};

/// Guest binaries are static, for the target named outright: build scripts and macros must not be.
const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";

/// The kernel that needs no building: a distribution's, unpacked.
pub const STOCK_KERNEL: &str = "debian";

/// How the host's binaries are built.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Soon built: for a first look and for tests.
    Quick,
    /// As shipped.
    Release,
}

impl Profile {
    /// Name of the cargo profile and of its directory.
    pub fn name(self) -> &'static str {
        match self {
            Self::Quick => "quick",
            Self::Release => "release",
        }
    }
}

/// Where the products are.
pub struct Products {
    /// Directory of the host's binaries, with the guest image beside them.
    pub dir: PathBuf,
}

impl Products {
    /// Those that were built before.
    pub fn built(profile: Profile) -> Self {
        Self { dir: tree().join("target").join(profile.name()) }
    }

    /// The runtime's programs and both agents, which have to name no component of a guest image, see [`crate::names`].
    pub fn nameless(&self) -> Vec<PathBuf> {
        let host = ["containerd-shim-kata-v2", "kata-ctl", "kata-vmm", "kata-virtiofsd"];
        let mut programs = host.map(|name| self.program(name)).to_vec();
        // The lean image's initrd is not compressed and has the agent of that image in it.
        programs.extend([self.program("guest-image/initrd.cpio"), services_parts().join("kata-agent")]);
        programs
    }

    /// A binary among the products.
    pub fn program(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

/// What every build of the tests has on: it is in no product that they drive, and is tested all the same. Another set of
/// features would be another build of nearly every dependency.
pub const TESTED_FEATURES: [&str; 2] = ["--features", "kata-agent/policy,kata-initdata/guest"];

/// Builds the host's binaries, the agent and the guest image with a kernel from `kernel`. Pulling images from registries and asking
/// policies are left out.
pub fn build(profile: Profile, kernel: &str) -> Chores<Products> {
    say(&format!("building the host's binaries ({})", profile.name()));
    let mut host = cargo();
    host.args(["build", "--profile", profile.name(), "--no-default-features"]);
    for package in ["kata-ctl", "kata-shim", "kata-vmm", "kata-virtiofsd"] {
        host.args(["-p", package]);
    }
    shell::run(&mut host)?;
    with_guest(Products::built(profile), kernel)
}

/// The same for tests, which are built in the same go: by themselves the binaries would be another build of most of their
/// dependencies.
pub fn build_with_tests(kernel: &str) -> Chores<Products> {
    let profile = Profile::Quick;
    say("building the host's binaries and the tests");
    let targets = ["--lib", "--bins", "--tests", "--examples"];
    shell::run(
        cargo()
            .args(["build", "--workspace", "--profile", profile.name()])
            .args(targets)
            .args(TESTED_FEATURES),
    )?;
    with_guest(Products::built(profile), kernel)
}

fn with_guest(products: Products, kernel: &str) -> Chores<Products> {
    let agent = build_agent()?;
    say(&format!("making the guest image, kernel: {kernel} (the first time it is downloaded)"));
    let image = products.dir.join("guest-image");
    shell::run(image_build(&products, kernel, &image).arg("--agent").arg(agent))?;
    Ok(products)
}

/// Builds the static guest agent.
pub fn build_agent() -> Chores<PathBuf> {
    say("building the guest agent");
    build_guest(&["-p", "kata-agent", "--bin", "kata-agent"])?;
    Ok(guest_dir().join("kata-agent"))
}

/// Builds the services image beside the lean one that `products` has, with a kernel from `kernel`.
pub fn build_services_image(products: &Products, kernel: &str) -> Chores<PathBuf> {
    let parts = build_services()?;
    let image = products.dir.join("services-image");
    say(&format!("making the services image, kernel: {kernel} (the first time its packages are downloaded)"));
    shell::run(
        image_build(products, kernel, &image)
            .args(["--flavour", "services", "--agent"])
            .arg(parts.join("kata-agent"))
            .arg("--guest-init")
            .arg(parts.join("kata-guest-init"))
            .arg("--initdata")
            .arg(parts.join("kata-initdata"))
            .arg("--image-pull")
            .arg(parts.join("kata-image-pull"))
            .arg("--units")
            .arg(tree().join("guest/services")),
    )?;
    Ok(image)
}

/// Builds the static programs of the services image in one go, for they share most of what they depend on, and sees those
/// that can tell their versions start without anything beside them. The agent is another one than the lean image's: it has a
/// policy. So they are copied to a directory of their own, which is the answer.
fn build_services() -> Chores<PathBuf> {
    say("building the guest's services");
    const PROGRAMS: [&str; 4] = ["kata-agent", "kata-guest-init", "kata-initdata", "kata-image-pull"];
    let mut arguments = Vec::from(TESTED_FEATURES);
    for program in PROGRAMS {
        arguments.extend(["-p", program, "--bin", program]);
    }
    build_guest(&arguments)?;
    let parts = services_parts();
    std::fs::create_dir_all(&parts).map_err(at("create", &parts))?;
    for program in PROGRAMS {
        let copy = parts.join(program);
        std::fs::copy(guest_dir().join(program), &copy).map_err(at("copy to", &copy))?;
    }
    shell::run(Command::new(parts.join("kata-image-pull")).arg("--version").env_clear())?;
    Ok(parts)
}

/// `kata-ctl image build` as far as it is the same for every image.
fn image_build(products: &Products, kernel: &str, output: &Path) -> Command {
    let mut command = Command::new(products.program("kata-ctl"));
    command.args(["image", "build", "--kernel", kernel, "--output"]).arg(output);
    command.arg("--cache").arg(tree().join("target/kernel-cache"));
    command
}

/// Builds the static init that does nothing but end the machine.
pub fn build_bare_init() -> Chores<PathBuf> {
    build_guest(&["-p", "kata-agent", "--example", "bare-init"])?;
    Ok(guest_dir().join("examples/bare-init"))
}

/// Builds the static services of guests that tests make. They are in no image: an extension of a test's own brings them.
pub fn build_fake_services() -> Chores<PathBuf> {
    say("building services for the guests of tests");
    build_guest(&["-p", "fake-guest-services", "--bin", "fake-guest-services"])?;
    Ok(guest_dir().join("fake-guest-services"))
}

/// Builds the static init of the lab's machine.
pub fn build_lab_init() -> Chores<PathBuf> {
    build_guest(&["--quiet", "-p", "lab-init", "--bin", "lab-init"])?;
    Ok(guest_dir().join("lab-init"))
}

/// Builds the server of shared directories alone.
pub fn build_file_server() -> Chores<PathBuf> {
    let profile = Profile::Quick.name();
    shell::run(cargo().args(["build", "--quiet", "--profile", profile, "-p", "kata-virtiofsd"]))?;
    Ok(tree().join("target").join(profile).join("kata-virtiofsd"))
}

fn build_guest(what: &[&str]) -> Chores {
    shell::run(
        cargo()
            .args(["build", "--profile", "guest", "--target", GUEST_TARGET])
            .args(what)
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .env("LIBSECCOMP_LINK_TYPE", "static")
            .env("LIBSECCOMP_LIB_PATH", "/usr/lib/x86_64-linux-gnu"),
    )
}

fn services_parts() -> PathBuf {
    tree().join("target/services-parts")
}

fn guest_dir() -> PathBuf {
    tree().join("target").join(GUEST_TARGET).join("guest")
}
