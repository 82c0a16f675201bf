//! The profile of an NVIDIA Jetson: its stock kernel (L4T) is built without what virtual machines need.

use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;

use super::Finding;

/// What a kernel for pods is built with, and what is lost without.
const OPTIONS: [(&str, &str); 2] = [
    ("CONFIG_KVM", "virtual machines are emulated: several times slower"),
    ("CONFIG_TUN", "pods with a network interface cannot run"),
];

pub fn findings(root: &Path) -> Vec<Finding> {
    let model = model(root);
    let mut findings = vec![board(model.as_deref())];
    findings.extend(interrupts(model.as_deref()));
    findings.push(kernel(configuration(root).as_deref()));
    findings
}

/// The device tree's strings end in a zero byte.
fn model(root: &Path) -> Option<String> {
    let text = std::fs::read_to_string(root.join("proc/device-tree/model")).ok()?;
    Some(text.trim_end_matches('\0').to_owned())
}

fn board(model: Option<&str>) -> Finding {
    match model {
        Some(model) if model.contains("Jetson") => Finding::ok(
            "Jetson",
            format!("{model}; its GPU is no PCI device, so it cannot be passed through"),
        ),
        other => Finding::warning(
            "Jetson",
            format!("this is none: {}", other.unwrap_or("the device tree names no model")),
            "what this profile looks for may not matter here",
            "leave out --profile jetson",
        ),
    }
}

/// The first Nano has a GICv2, which monitors built on rust-vmm do not drive; QEMU does.
fn interrupts(model: Option<&str>) -> Option<Finding> {
    let old = model.is_some_and(|model| model.contains("Nano") && !model.contains("Orin"));
    old.then(|| {
        Finding::warning(
            "interrupts",
            "GICv2",
            "of the virtual machine monitors only QEMU runs here",
            "set runtime.hypervisor_name = \"qemu\"",
        )
    })
}

fn configuration(root: &Path) -> Option<String> {
    let packed = std::fs::File::open(root.join("proc/config.gz")).ok()?;
    let mut text = String::new();
    // A kernel's configuration is a few hundred kilobytes.
    GzDecoder::new(packed).take(8 << 20).read_to_string(&mut text).ok()?;
    Some(text)
}

fn kernel(configuration: Option<&str>) -> Finding {
    const REMEDY: &str =
        "build the L4T kernel with CONFIG_KVM=y and CONFIG_TUN=m (vhost is not needed), and boot it";
    let Some(configuration) = configuration else {
        return Finding::warning(
            "L4T kernel",
            "keeps no /proc/config.gz",
            "what it lacks shows only when a pod fails",
            REMEDY,
        );
    };
    let has = |option: &str| {
        ["=y", "=m"].iter().any(|value| configuration.lines().any(|line| line == format!("{option}{value}")))
    };
    let lacks: Vec<(&str, &str)> = OPTIONS.into_iter().filter(|(option, _)| !has(option)).collect();
    if lacks.is_empty() {
        return Finding::ok("L4T kernel", "has KVM and TUN");
    }
    let names: Vec<&str> = lacks.iter().map(|(option, _)| *option).collect();
    let costs: Vec<&str> = lacks.iter().map(|(_, cost)| *cost).collect();
    Finding::warning("L4T kernel", format!("without {}", names.join(", ")), &costs.join("; "), REMEDY)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::Verdict;
    use super::*;

    fn board_with(model: &str, configuration: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("proc/device-tree")).unwrap();
        std::fs::write(dir.path().join("proc/device-tree/model"), format!("{model}\0")).unwrap();
        let file = std::fs::File::create(dir.path().join("proc/config.gz")).unwrap();
        let mut packed = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
        packed.write_all(configuration.as_bytes()).unwrap();
        packed.finish().unwrap();
        dir
    }

    #[test]
    fn a_stock_kernel_lacks_kvm_and_is_told_what_to_build() {
        let host =
            board_with("NVIDIA Jetson Orin Nano Developer Kit", "# CONFIG_KVM is not set\nCONFIG_TUN=m\n");
        let findings = findings(host.path());
        assert_eq!(findings.len(), 2);
        assert_eq!((findings[0].verdict, findings[1].verdict), (Verdict::Ok, Verdict::Warning));
        assert_eq!(findings[1].found, "without CONFIG_KVM");
    }

    #[test]
    fn the_first_nano_has_old_interrupts() {
        let host = board_with("NVIDIA Jetson Nano Developer Kit", "CONFIG_KVM=y\nCONFIG_TUN=y\n");
        let findings = findings(host.path());
        assert_eq!(findings[1].found, "GICv2");
        assert_eq!(findings[2].verdict, Verdict::Ok);
    }

    #[test]
    fn another_board_is_told_apart() {
        assert_eq!(board(Some("Raspberry Pi 5")).verdict, Verdict::Warning);
        assert_eq!(kernel(None).verdict, Verdict::Warning);
    }
}
