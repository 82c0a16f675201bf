//! What the kernel and the hardware have to offer to virtual machines. `root` is `/`, or a test's.

use std::fs::File;
use std::path::Path;

use super::Finding;

pub fn findings(root: &Path) -> Vec<Finding> {
    vec![
        nested(root),
        network(root),
        vhost_net(root),
        hugepages(root),
        iommu(root),
        confidential(root),
        access_control(root),
    ]
}

fn text(root: &Path, path: &str) -> Option<String> {
    std::fs::read_to_string(root.join(path)).ok().map(|text| text.trim().to_owned())
}

/// A kernel module's switch: `Y`, `1` or a larger number is on.
fn parameter(root: &Path, module: &str, name: &str) -> bool {
    let value = text(root, &format!("sys/module/{module}/parameters/{name}")).unwrap_or_default();
    matches!(value.as_str(), "Y" | "y") || value.parse::<u32>().is_ok_and(|number| number > 0)
}

/// Whether a flag of the first processor is set.
fn flag(root: &Path, flag: &str) -> bool {
    let info = text(root, "proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|line| line.starts_with("flags") || line.starts_with("Features"));
    flags.is_some_and(|line| line.split_whitespace().any(|word| word == flag))
}

fn nested(root: &Path) -> Finding {
    let module = ["kvm_intel", "kvm_amd"].into_iter().find(|module| parameter(root, module, "nested"));
    let above = if flag(root, "hypervisor") {
        "this host is itself a virtual machine"
    } else {
        "this host is bare metal"
    };
    match module {
        Some(module) => Finding::ok(
            "nested",
            format!("{above}; {module} would let guests run virtual machines of their own"),
        ),
        None => Finding::ok("nested", format!("{above}; guests cannot run virtual machines of their own")),
    }
}

fn network(root: &Path) -> Finding {
    if root.join("dev/net/tun").exists() {
        return Finding::ok("tun", "/dev/net/tun");
    }
    Finding::warning(
        "tun",
        "no /dev/net/tun",
        "pods with a network interface cannot run",
        "modprobe tun; build the kernel with CONFIG_TUN if there is no such module",
    )
}

/// Nothing is missing without it, only slower. The node is there before its module, so it has to be opened.
fn vhost_net(root: &Path) -> Finding {
    let opened = File::options().read(true).write(true).open(root.join("dev/vhost-net"));
    Finding::ok(
        "vhost-net",
        match opened {
            Ok(_) => "yes: the host's kernel moves the packets of pods".to_owned(),
            Err(error) => format!(
                "no: /dev/vhost-net cannot be opened ({error}), so each machine monitor moves its pod's packets itself, which is \
                 slower; modprobe vhost_net"
            ),
        },
    )
}

fn hugepages(root: &Path) -> Finding {
    let sizes = std::fs::read_dir(root.join("sys/kernel/mm/hugepages")).into_iter().flatten().flatten();
    let mut reserved: Vec<String> = sizes
        .filter_map(|size| {
            let count = text(&size.path(), "nr_hugepages").and_then(|text| text.parse::<u64>().ok())?;
            let name = size.file_name().to_string_lossy().trim_start_matches("hugepages-").to_owned();
            (count > 0).then(|| format!("{count} of {name}"))
        })
        .collect();
    reserved.sort();
    let reserved = if reserved.is_empty() { "none reserved".to_owned() } else { reserved.join(", ") };
    let transparent = text(root, "sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let chosen = transparent.split(['[', ']']).nth(1).unwrap_or("not supported");
    Finding::ok("hugepages", format!("{reserved}; transparent: {chosen}"))
}

fn iommu(root: &Path) -> Finding {
    let groups = std::fs::read_dir(root.join("sys/kernel/iommu_groups")).map_or(0, Iterator::count);
    match groups {
        0 => Finding::ok("IOMMU", "none: no device can be passed through"),
        groups => Finding::ok("IOMMU", format!("{groups} groups")),
    }
}

/// Trusted execution environments, by what the processor shows and what KVM was told.
fn confidential(root: &Path) -> Finding {
    let mut there = Vec::new();
    let mut half = Vec::new();
    let mut judge = |name: &'static str, hardware: bool, used: bool| match (hardware, used) {
        (_, true) => there.push(name),
        (true, false) => half.push(name),
        (false, false) => {}
    };
    judge(
        "AMD SEV-SNP",
        flag(root, "sev_snp"),
        parameter(root, "kvm_amd", "sev_snp") && root.join("dev/sev").exists(),
    );
    judge("Intel TDX", flag(root, "tdx_host_platform"), parameter(root, "kvm_intel", "tdx"));
    let secure_execution = text(root, "sys/firmware/uv/prot_virt_host").is_some_and(|text| text == "1");
    judge("IBM Secure Execution", secure_execution, secure_execution);
    match (there.as_slice(), half.as_slice()) {
        ([], []) => Finding::ok("TEE", "none: guests cannot be kept from this host"),
        ([], half) => Finding::warning(
            "TEE",
            format!("{}: in the processor, and not in use", half.join(", ")),
            "no confidential guest can run",
            "switch it on in the firmware and in KVM (kvm_amd sev_snp=1, kvm_intel tdx=1)",
        ),
        (there, _) => Finding::ok("TEE", there.join(", ")),
    }
}

fn access_control(root: &Path) -> Finding {
    let selinux = text(root, "sys/fs/selinux/enforce");
    let apparmor = text(root, "sys/module/apparmor/parameters/enabled").is_some_and(|text| text == "Y");
    let found = match (selinux.as_deref(), apparmor) {
        (Some("1"), _) => "SELinux, enforcing",
        (Some(_), _) => "SELinux, permissive",
        (None, true) => "AppArmor",
        (None, false) => {
            "neither SELinux nor AppArmor; pods are confined by users, namespaces and filters in any case"
        }
    };
    Finding::ok("access control", found)
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        dir
    }

    #[test]
    fn an_empty_host_lacks_the_way_to_networks_and_nothing_else_that_counts() {
        let host = host(&[]);
        let bad: Vec<&str> = findings(host.path())
            .iter()
            .filter(|finding| finding.verdict != Verdict::Ok)
            .map(|finding| finding.what)
            .collect();
        assert_eq!(bad, ["tun"]);
    }

    #[test]
    fn confidential_computing_that_is_not_switched_on_is_told() {
        let half = host(&[("proc/cpuinfo", "flags\t: fpu sev_snp\n")]);
        assert_eq!(confidential(half.path()).verdict, Verdict::Warning);
        let whole = host(&[
            ("proc/cpuinfo", "flags\t: fpu sev_snp\n"),
            ("sys/module/kvm_amd/parameters/sev_snp", "Y\n"),
            ("dev/sev", ""),
        ]);
        assert_eq!(confidential(whole.path()).found, "AMD SEV-SNP");
        let tdx = host(&[("sys/module/kvm_intel/parameters/tdx", "Y\n")]);
        assert_eq!(confidential(tdx.path()).found, "Intel TDX");
    }

    #[test]
    fn who_moves_packets_is_told_and_nothing_is_missing_either_way() {
        let (with, without) = (host(&[("dev/vhost-net", "")]), host(&[]));
        let (yes, no) = (vhost_net(with.path()), vhost_net(without.path()));
        assert!(yes.found.starts_with("yes: the host's kernel"), "{}", yes.found);
        assert!(no.found.starts_with("no: ") && no.found.ends_with("modprobe vhost_net"), "{}", no.found);
        assert_eq!((yes.verdict, no.verdict), (Verdict::Ok, Verdict::Ok));
    }

    #[test]
    fn figures_are_read_as_the_kernel_writes_them() {
        let host = host(&[
            ("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "512\n"),
            ("sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "0\n"),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
            ("sys/kernel/iommu_groups/0/x", ""),
            ("sys/module/kvm_amd/parameters/nested", "1\n"),
            ("proc/cpuinfo", "flags : fpu hypervisor\n"),
            ("sys/fs/selinux/enforce", "1"),
        ]);
        assert_eq!(hugepages(host.path()).found, "512 of 2048kB; transparent: madvise");
        assert_eq!(iommu(host.path()).found, "1 groups");
        assert!(nested(host.path()).found.contains("itself a virtual machine; kvm_amd would"));
        assert_eq!(access_control(host.path()).found, "SELinux, enforcing");
    }
}
