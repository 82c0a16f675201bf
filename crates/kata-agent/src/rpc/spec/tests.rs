use protobuf::Message;

use super::*;

fn minimal() -> wire::Spec {
    let mut spec = wire::Spec::new();
    spec.version = "1.2.0".into();
    spec.root.mut_or_insert_default().path = "/rootfs".into();
    spec.process.mut_or_insert_default().args = vec!["/bin/true".into()];
    spec
}

fn named(field: &str, result: Result<oci::Spec>) {
    let text = result.unwrap_err().to_string();
    assert!(text.contains(field), "{text} does not name {field}");
}

#[test]
fn a_minimal_spec_gets_nothing_that_was_not_sent() {
    let spec = spec(minimal()).unwrap();
    let process = spec.process().as_ref().unwrap();
    assert_eq!(process.args().as_deref(), Some(&["/bin/true".to_owned()][..]));
    assert_eq!(process.env().as_deref(), Some(&[][..]), "no environment of a default");
    assert_eq!(process.cwd(), std::path::Path::new("/"));
    assert!(process.capabilities().is_none());
    assert_eq!(spec.mounts().as_deref(), Some(&[][..]), "no mounts of a default");
    assert!(spec.linux().is_none());
}

#[test]
fn a_spec_without_process_or_root_is_refused() {
    named("process", spec(wire::Spec { process: None.into(), ..minimal() }));
    named("root", spec(wire::Spec { root: None.into(), ..minimal() }));
}

#[test]
fn capabilities_are_read_with_and_without_prefix_and_unknown_ones_named() {
    let mut wire = minimal();
    wire.process.mut_or_insert_default().capabilities.mut_or_insert_default().bounding =
        vec!["CAP_SYS_ADMIN".into(), "CHOWN".into()];
    let spec_ = spec(wire.clone()).unwrap();
    let set = spec_.process().as_ref().unwrap().capabilities().as_ref().unwrap().bounding().clone().unwrap();
    assert_eq!(set, [oci::Capability::SysAdmin, oci::Capability::Chown].into());
    wire.process.mut_or_insert_default().capabilities.mut_or_insert_default().bounding = vec!["CAP_X".into()];
    named("CAP_X", spec(wire));
}

#[test]
fn device_rules_know_the_wildcard_from_minor_zero() {
    let rule = |major, minor| {
        let wire = wire::LinuxDeviceCgroup { major, minor, type_: "c".into(), ..Default::default() };
        let rule = device_rule(wire).unwrap();
        (rule.major(), rule.minor())
    };
    assert_eq!(rule(5, 0), (Some(5), Some(0)));
    assert_eq!(rule(136, -1), (Some(136), None));
    assert_eq!(rule(0, 0), (None, None));
    assert_eq!(rule(-1, -1), (None, None));
}

#[test]
fn every_seccomp_word_of_the_default_profile_is_understood() {
    let mut wire = minimal();
    let seccomp = wire.linux.mut_or_insert_default().seccomp.mut_or_insert_default();
    seccomp.default_action = "SCMP_ACT_ERRNO".into();
    seccomp.architectures =
        ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_AARCH64"].map(str::to_owned).into();
    seccomp.flags = vec!["SECCOMP_FILTER_FLAG_LOG".into()];
    seccomp.syscalls.push(wire::LinuxSyscall {
        names: vec!["clone".into()],
        action: "SCMP_ACT_ALLOW".into(),
        args: vec![wire::LinuxSeccompArg {
            value: 0x7e02_0000,
            op: "SCMP_CMP_MASKED_EQ".into(),
            ..Default::default()
        }],
        ..Default::default()
    });
    let spec = spec(wire).unwrap();
    let seccomp = spec.linux().as_ref().unwrap().seccomp().as_ref().unwrap().clone();
    assert_eq!(seccomp.architectures().as_ref().unwrap()[0], oci::Arch::ScmpArchX86_64);
    let syscall = &seccomp.syscalls().as_ref().unwrap()[0];
    assert_eq!(syscall.args().as_ref().unwrap()[0].value_two(), Some(0), "the masked value stays");
}

#[test]
fn zero_limits_are_no_limits_and_a_pids_limit_is_kept_as_sent() {
    let mut wire = wire::LinuxResources::new();
    wire.memory.mut_or_insert_default().limit = 64 << 20;
    wire.pids.mut_or_insert_default().limit = -1;
    let resources = resources(wire).unwrap();
    let memory = resources.memory().as_ref().unwrap();
    assert_eq!((memory.limit(), memory.swap()), (Some(64 << 20), None));
    assert_eq!(resources.pids().as_ref().unwrap().limit(), -1);
}

proptest::proptest! {
    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..512)) {
        if let Ok(wire) = wire::Spec::parse_from_bytes(&bytes) {
            let _ = spec(wire);
        }
    }

    #[test]
    fn odd_words_and_numbers_never_panic(word in "\\PC{0,12}", number in proptest::prelude::any::<i64>()) {
        let mut wire = minimal();
        let unsigned = number.unsigned_abs();
        let narrow = u32::try_from(unsigned & 0xffff_ffff).unwrap();
        let process = wire.process.mut_or_insert_default();
        process.oom_score_adj = number;
        process.cwd.clone_from(&word);
        process.rlimits.push(wire::POSIXRlimit { type_: word.clone(), hard: unsigned, ..Default::default() });
        let linux = wire.linux.mut_or_insert_default();
        linux.namespaces.push(wire::LinuxNamespace { type_: word.clone(), ..Default::default() });
        linux.seccomp.mut_or_insert_default().default_action.clone_from(&word);
        let limits = linux.resources.mut_or_insert_default();
        limits.block_io.mut_or_insert_default().weight = narrow;
        limits.hugepage_limits.push(wire::LinuxHugepageLimit { pagesize: word, limit: unsigned, ..Default::default() });
        let limits = limits.clone();
        let _ = spec(wire);
        let _ = resources(limits);
    }
}
