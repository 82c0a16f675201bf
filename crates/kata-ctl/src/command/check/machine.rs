//! What the owner's program found: KVM, QEMU, the artefacts, and the choice that follows. The shape is that of
//! `containerd-shim-kata-v2 host --json`.

use std::path::Path;

use kata_image::manifest::Manifest;
use serde_json::Value;

use super::Finding;
use crate::command::version;

/// Less leaves no room for a virtual machine beside the host.
const LITTLE_MEMORY_MIB: u64 = 512;

pub fn findings(answer: &Value) -> Vec<Finding> {
    let always =
        [kvm(answer), choice(answer), vmm(answer), artefacts(answer), guest_image(answer), memory(answer)];
    always.into_iter().chain(jail(answer)).collect()
}

fn text<'a>(answer: &'a Value, pointer: &str) -> Option<&'a str> {
    answer.pointer(pointer).and_then(Value::as_str)
}

fn kvm(answer: &Value) -> Finding {
    const COST: &str = "virtual machines are emulated (TCG): several times slower";
    let warning = |found: &str, remedy| Finding::warning("/dev/kvm", found, COST, remedy);
    match text(answer, "/host/kvm/state") {
        Some("usable") => Finding::ok("/dev/kvm", "hardware virtualisation"),
        Some("absent") => warning(
            "absent",
            "load kvm_intel or kvm_amd; switch virtualisation on in the firmware, or nested virtualisation where this is a virtual machine",
        ),
        Some("no-access") => {
            let reason = text(answer, "/host/kvm/reason").unwrap_or("denied");
            warning(
                &format!("cannot be opened: {reason}"),
                "run as root, or join the group that owns /dev/kvm",
            )
        }
        Some("software-only") => warning(
            "opens, but is emulated in software (the CPU shows neither vmx nor svm), and does not boot stock kernels",
            "use a machine with hardware virtualisation, or nested virtualisation that shows vmx or svm",
        ),
        Some("wrong-version") => warning(
            "does not speak KVM's stable interface",
            "see whether /dev/kvm is really KVM's device (character device 10:232)",
        ),
        other => warning(other.unwrap_or("unknown"), "see `containerd-shim-kata-v2 host`"),
    }
}

fn choice(answer: &Value) -> Finding {
    let (driver, accelerator) = (text(answer, "/choice/driver"), text(answer, "/choice/accelerator"));
    match (driver, accelerator, text(answer, "/choice_error")) {
        (Some(driver), Some(accelerator), None) => {
            let reason = text(answer, "/choice/reason").unwrap_or_default();
            Finding::ok("choice", format!("{driver} with {}: {reason}", accelerator.to_lowercase()))
        }
        (_, _, why) => {
            Finding::failed("choice", why.unwrap_or("none"), "change the configuration as it says")
        }
    }
}

/// The chosen driver's program.
fn vmm(answer: &Value) -> Finding {
    let (name, section) = match text(answer, "/choice/driver") {
        Some("cloud-hypervisor") => ("Cloud Hypervisor", "[hypervisor.cloud-hypervisor]"),
        Some("firecracker") => ("Firecracker", "[hypervisor.firecracker]"),
        _ => return qemu(answer),
    };
    match text(answer, "/artefacts/vmm") {
        Some(path) => {
            let version = version::of_program(path).unwrap_or_else(|| "unknown version".to_owned());
            Finding::ok(name, format!("{version} at {path}"))
        }
        None => {
            let why = text(answer, "/artefacts_error").unwrap_or("not found");
            Finding::failed(name, why, &format!("install it, or set path in {section}"))
        }
    }
}

fn qemu(answer: &Value) -> Finding {
    match (text(answer, "/host/qemu/path"), text(answer, "/qemu_error")) {
        (Some(path), None) => {
            let number = |name: &str| answer.pointer(name).and_then(Value::as_u64).unwrap_or(0);
            let (major, minor) = (number("/host/qemu/version/major"), number("/host/qemu/version/minor"));
            Finding::ok("QEMU", format!("{major}.{minor} at {path}"))
        }
        (_, _) if text(answer, "/choice/driver") == Some("builtin") => {
            Finding::ok("QEMU", "not found, and not needed: the built-in monitor runs pods")
        }
        (_, why) => {
            let remedy =
                "install QEMU's system emulator (Debian: qemu-system-x86), or set hypervisor.qemu.path";
            Finding::failed("QEMU", why.unwrap_or("not found"), remedy)
        }
    }
}

/// Nothing where the built-in monitor does not run pods.
fn jail(answer: &Value) -> Option<Finding> {
    let confined = answer.pointer("/jail").and_then(Value::as_bool)?;
    Some(match confined {
        true => Finding::ok("jail", "the built-in monitor can be confined"),
        false => {
            let why = text(answer, "/jail_error").unwrap_or("it cannot be confined");
            Finding::failed(
                "jail",
                why,
                "change the host as it says, or set runtime.hypervisor_name = \"qemu\"",
            )
        }
    })
}

fn artefacts(answer: &Value) -> Finding {
    const REMEDY: &str =
        "install them beside kata-ctl, or below /opt/kata; the guest image is made by `kata-ctl image build`";
    match text(answer, "/artefacts_error") {
        Some(why) => Finding::failed("artefacts", why, REMEDY),
        None => {
            let path = |name: &str| text(answer, &format!("/artefacts/{name}")).unwrap_or("none").to_owned();
            Finding::ok("artefacts", format!("{}, {}", path("kata_vmm"), path("virtiofsd")))
        }
    }
}

fn guest_image(answer: &Value) -> Finding {
    let Some(dir) = text(answer, "/artefacts/guest_image") else {
        return match text(answer, "/artefacts_error") {
            Some(_) => Finding::failed("guest image", "not found", "make it with `kata-ctl image build`"),
            None => {
                Finding::ok("guest image", "none: the configuration names kernel and root file system itself")
            }
        };
    };
    match Manifest::load(Path::new(dir)) {
        Ok(manifest) => {
            let agent = match manifest.agent.version.as_str() {
                "" => "agent of unknown version".to_owned(),
                version => format!("agent {version}"),
            };
            Finding::ok("guest image", format!("{dir}: kernel {}, {agent}", manifest.kernel.release))
        }
        Err(error) => {
            let found = crate::failure::chain(&error);
            Finding::failed("guest image", found, "make it anew with `kata-ctl image build`")
        }
    }
}

fn memory(answer: &Value) -> Finding {
    let number = |name: &str| answer.pointer(name).and_then(Value::as_u64).unwrap_or(0);
    let found = format!("{} MiB, {} CPUs", number("/host/memory_mib"), number("/host/cpus"));
    if number("/host/memory_mib") < LITTLE_MEMORY_MIB {
        let cost = "few pods, and small ones";
        return Finding::warning("machine", found, cost, "give pods less memory with --memory");
    }
    Finding::ok("machine", found)
}
