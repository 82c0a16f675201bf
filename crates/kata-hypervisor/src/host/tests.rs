use std::os::unix::fs::PermissionsExt;

use super::*;

const SVM: &str = "processor\t: 0\nflags\t\t: fpu vme svm npt\n";

fn host(kvm: Kvm) -> Host {
    let absent = || Support::Absent { reason: "it has none".to_owned() };
    Host { kvm, tees: Tees { sev_snp: absent(), tdx: absent() }, cpus: 2, memory_mib: 4096, qemu: None }
}

fn config(accelerator: AcceleratorChoice) -> Config {
    let mut config = Config::default();
    config.runtime.accelerator = accelerator;
    config
}

#[test]
fn absent_device_is_told_from_one_that_is_not_kvms() {
    assert_eq!(Kvm::probe(Path::new("/no/such/device"), SVM), Kvm::Absent);
    assert_eq!(Kvm::probe(Path::new("/dev/null"), SVM), Kvm::WrongVersion { version: -1 });
}

#[test]
fn device_that_opens_is_usable_only_with_the_cpu_flags() {
    let device = Path::new("/dev/kvm");
    if OpenOptions::new().read(true).write(true).open(device).is_err() {
        eprintln!("skipped: /dev/kvm cannot be opened here");
        return;
    }
    assert_eq!(Kvm::probe(device, SVM), Kvm::Usable);
    assert_eq!(Kvm::probe(device, "flags : fpu vme lahf_svm\nmodel name : vmx svm\n"), Kvm::SoftwareOnly);
}

#[test]
fn auto_takes_kvm_where_it_works_and_else_says_why_not() {
    let choice = choose(&config(AcceleratorChoice::Auto), &host(Kvm::Usable)).unwrap();
    assert_eq!((choice.driver, choice.accelerator), (DriverKind::Builtin, Accelerator::Kvm));
    for kvm in [
        Kvm::Absent,
        Kvm::NoAccess { reason: "Permission denied".to_owned() },
        Kvm::SoftwareOnly,
        Kvm::WrongVersion { version: 11 },
    ] {
        let choice = choose(&config(AcceleratorChoice::Auto), &host(kvm.clone())).unwrap();
        assert_eq!((choice.driver, choice.accelerator), (DriverKind::Qemu, Accelerator::Tcg));
        assert!(choice.reason.ends_with(&format!("because KVM {kvm}")), "{}", choice.reason);
    }
}

#[test]
fn whoever_asks_for_what_only_qemu_has_gets_qemu() {
    let takes_qemu = |change: fn(&mut Config)| {
        let mut config = config(AcceleratorChoice::Auto);
        change(&mut config);
        choose(&config, &host(Kvm::Usable)).unwrap().driver == DriverKind::Qemu
    };
    assert!(takes_qemu(|config| config.hypervisor.qemu.path = Some("/usr/bin/qemu-system-x86_64".into())));
    assert!(takes_qemu(|config| config.hypervisor.qemu.machine_type = MachineType::Microvm));
    assert!(takes_qemu(|config| config.runtime.accelerator = AcceleratorChoice::Tcg));
    assert!(takes_qemu(|config| config.runtime.hypervisor_name = HypervisorChoice::Qemu));
    assert!(!takes_qemu(|config| config.hypervisor.qemu.default_vcpus = 2.0));
}

#[test]
fn asking_for_kvm_without_any_is_an_error_with_the_next_step() {
    let error = choose(&config(AcceleratorChoice::Kvm), &host(Kvm::Absent)).unwrap_err().to_string();
    assert!(error.contains("there is no /dev/kvm; load the module kvm_intel or kvm_amd"), "{error}");
    assert!(error.ends_with("(or set runtime.accelerator to \"auto\")"), "{error}");
}

#[test]
fn asking_for_tcg_gives_tcg_even_with_kvm() {
    let choice = choose(&config(AcceleratorChoice::Tcg), &host(Kvm::Usable)).unwrap();
    assert_eq!(choice.accelerator, Accelerator::Tcg);
}

#[test]
fn builtin_is_taken_where_kvm_works_and_refused_with_the_reason_elsewhere() {
    let wanted = |accelerator| {
        let mut config = config(accelerator);
        config.runtime.hypervisor_name = HypervisorChoice::Builtin;
        config
    };
    let choice = choose(&wanted(AcceleratorChoice::Auto), &host(Kvm::Usable)).unwrap();
    assert_eq!((choice.driver, choice.accelerator), (DriverKind::Builtin, Accelerator::Kvm));
    let error = choose(&wanted(AcceleratorChoice::Auto), &host(Kvm::SoftwareOnly)).unwrap_err().to_string();
    assert!(error.contains("neither vmx nor svm") && error.contains("hypervisor_name"), "{error}");
    let error = choose(&wanted(AcceleratorChoice::Tcg), &host(Kvm::Usable)).unwrap_err();
    assert!(matches!(error, HostError::NoEmulation { .. }), "{error}");
}

#[test]
fn version_is_read_from_what_distributions_print() {
    for (text, version) in [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright", Some((7, 2))),
        ("QEMU emulator version 10.0.2", Some((10, 0))),
        ("QEMU emulator version 9.2.50 (v9.2.0-1)", Some((9, 2))),
        ("qemu-system-x86_64: unknown", None),
        ("", None),
    ] {
        assert_eq!(QemuVersion::parse(text).map(|v| (v.major, v.minor)), version, "{text}");
    }
    let [old, new] = [QemuVersion { major: 7, minor: 2 }, QemuVersion { major: 10, minor: 0 }];
    assert!(old < new);
}

#[test]
fn program_that_is_not_qemu_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("qemu");
    let error = Host::probe().with_qemu(&program).unwrap_err();
    assert!(matches!(error, HostError::Qemu { .. }));
    std::fs::write(&program, "#!/bin/sh\necho something else\n").unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let error = Host::probe().with_qemu(&program).unwrap_err();
    assert!(
        matches!(&error, HostError::NoVersion { said, .. } if said.contains("something else")),
        "{error}"
    );
}

#[test]
fn probe_serialises_for_people_and_machines() {
    let host = Host::probe();
    assert!(host.cpus >= 1 && host.memory_mib > 0);
    let json = serde_json::to_value(host_with(Kvm::NoAccess { reason: "x".to_owned() })).unwrap();
    assert_eq!(json["kvm"], serde_json::json!({"state": "no-access", "reason": "x"}));
    assert_eq!(
        json["qemu"],
        serde_json::json!({"path": "/usr/bin/qemu", "version": {"major": 7, "minor": 2}})
    );
}

fn host_with(kvm: Kvm) -> Host {
    let version = QemuVersion { major: 7, minor: 2 };
    Host { qemu: Some(Qemu { path: "/usr/bin/qemu".into(), version }), ..host(kvm) }
}

#[test]
fn drivers_that_cannot_emulate_are_chosen_by_name_alone_and_need_kvm() {
    for (name, driver) in [
        (HypervisorChoice::Clh, DriverKind::CloudHypervisor),
        (HypervisorChoice::CloudHypervisor, DriverKind::CloudHypervisor),
        (HypervisorChoice::Fc, DriverKind::Firecracker),
        (HypervisorChoice::Firecracker, DriverKind::Firecracker),
    ] {
        let mut config = config(AcceleratorChoice::Auto);
        config.runtime.hypervisor_name = name;
        let choice = choose(&config, &host(Kvm::Usable)).unwrap();
        assert_eq!((choice.driver, choice.accelerator), (driver, Accelerator::Kvm));
        assert!(choice.reason.contains(name.as_str()), "{}", choice.reason);
        let error = choose(&config, &host(Kvm::Absent)).unwrap_err().to_string();
        assert!(error.contains("needs KVM, and KVM is absent") && error.contains("\"qemu\""), "{error}");
        config.runtime.accelerator = AcceleratorChoice::Tcg;
        let error = choose(&config, &host(Kvm::Usable)).unwrap_err().to_string();
        assert!(error.contains("cannot emulate"), "{error}");
    }
}

#[test]
fn confidential_guest_is_run_by_qemu_on_hardware_that_has_it_or_not_at_all() {
    let mut config = config(AcceleratorChoice::Auto);
    config.hypervisor.qemu.confidential_guest = true;
    let mut there = host(Kvm::Usable);
    let refused = |config: &Config, host: &Host| choose(config, host).unwrap_err().to_string();
    assert_eq!(
        refused(&config, &there),
        "hypervisor.qemu.confidential_guest asks for TDX, which this host does not have: it has none"
    );
    config.hypervisor.qemu.sev_snp_guest = true;
    assert!(refused(&config, &there).contains("asks for SEV-SNP, which this host does not have"));
    there.tees.sev_snp = Support::Present;
    let choice = choose(&config, &there).unwrap();
    assert_eq!((choice.driver, choice.accelerator), (DriverKind::Qemu, Accelerator::Kvm));
    assert!(choice.reason.contains("(SEV-SNP)"), "{}", choice.reason);

    assert!(
        refused(&config, &Host { kvm: Kvm::Absent, ..there.clone() })
            .contains("SEV-SNP, which needs KVM, and KVM is absent")
    );
    config.runtime.hypervisor_name = HypervisorChoice::Builtin;
    assert!(
        refused(&config, &there)
            .contains("which builtin does not give; set runtime.hypervisor_name to \"qemu\"")
    );
    config.runtime.hypervisor_name = HypervisorChoice::Qemu;
    config.runtime.accelerator = AcceleratorChoice::Tcg;
    assert!(refused(&config, &there).contains("cannot be emulated"));
}

#[test]
fn host_without_the_hardware_refuses_a_confidential_guest() {
    let here = Host::probe();
    for (snp, tee) in [(true, Tee::SevSnp), (false, Tee::Tdx)] {
        if *here.tees.of(tee) == Support::Present {
            println!("skipped: this host has {tee}");
            continue;
        }
        let mut config = config(AcceleratorChoice::Auto);
        (config.hypervisor.qemu.confidential_guest, config.hypervisor.qemu.sev_snp_guest) = (true, snp);
        let error = choose(&config, &here).unwrap_err();
        assert!(matches!(error, HostError::NoTee { .. } | HostError::TeeNeedsKvm { .. }), "{error}");
    }
}
