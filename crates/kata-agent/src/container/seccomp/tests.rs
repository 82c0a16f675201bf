use super::*;

/// Runs a program of the classic BPF that seccomp uses on a system call.
fn run(filter: &Filter, arch: u32, number: u32, args: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend(number.to_ne_bytes());
    data.extend(arch.to_ne_bytes());
    data.extend(0_u64.to_ne_bytes());
    data.extend(args.iter().flat_map(|arg| arg.to_ne_bytes()));
    let program: Vec<(u16, u8, u8, u32)> = filter.as_bytes()[FLAGS..]
        .chunks_exact(INSTRUCTION)
        .map(|i| (u16::from_ne_bytes([i[0], i[1]]), i[2], i[3], u32::from_ne_bytes([i[4], i[5], i[6], i[7]])))
        .collect();
    let (mut at, mut a) = (0, 0_u32);
    loop {
        let (code, yes, no, k) = program[at];
        at += 1;
        let jump = |holds: bool| usize::from(if holds { yes } else { no });
        match code {
            0x20 => {
                let offset = usize::try_from(k).unwrap();
                a = u32::from_ne_bytes(data[offset..offset + 4].try_into().unwrap());
            }
            0x54 => a &= k,
            0x05 => at += usize::try_from(k).unwrap(),
            0x15 => at += jump(a == k),
            0x25 => at += jump(a > k),
            0x35 => at += jump(a >= k),
            0x45 => at += jump(a & k != 0),
            0x06 => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
const ALLOW: u32 = 0x7fff_0000;
const NONE: [u64; 6] = [0; 6];

fn errno(number: i32) -> u32 {
    0x0005_0000 | number.cast_unsigned()
}

fn compile(json: &str) -> Result<Filter, Failure> {
    Filter::compile(&serde_json::from_str(json).expect("a profile"))
}

fn number(name: &str) -> u32 {
    ScmpSyscall::from_name(name).unwrap().as_raw_syscall().cast_unsigned()
}

#[test]
fn the_default_action_and_its_errno_hold_for_what_is_not_named() {
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"architectures":["SCMP_ARCH_X86_64"],
            "syscalls":[{"names":["read","write"],"action":"SCMP_ACT_ALLOW"}]}"#,
    )
    .unwrap();
    assert_eq!(run(&filter, X86_64, number("read"), NONE), ALLOW);
    assert_eq!(run(&filter, X86_64, number("mkdir"), NONE), errno(38));
}

#[test]
fn every_operator_compares_the_argument_it_names() {
    let cases = [
        ("SCMP_CMP_EQ", 5_u64, None, 5_u64, 6),
        ("SCMP_CMP_NE", 5, None, 6, 5),
        ("SCMP_CMP_LT", 5, None, 4, 5),
        ("SCMP_CMP_LE", 5, None, 5, 6),
        ("SCMP_CMP_GT", 5, None, 6, 5),
        ("SCMP_CMP_GE", 5, None, 5, 4),
        ("SCMP_CMP_MASKED_EQ", 0xf0, Some(0x10), 0x1f, 0x2f),
        ("SCMP_CMP_EQ", 0x1_0000_0005_u64, None, 0x1_0000_0005_u64, 5),
    ];
    for (operator, value, second, hit, miss) in cases {
        let second = second.map_or_else(String::new, |second| format!(r#","valueTwo":{second}"#));
        let filter = compile(&format!(
            r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["socket"],"action":"SCMP_ACT_ERRNO",
                "errnoRet":97,"args":[{{"index":2,"op":"{operator}","value":{value}{second}}}]}}]}}"#,
        ))
        .unwrap();
        let call = |third| run(&filter, X86_64, number("socket"), [0, 0, third, 0, 0, 0]);
        assert_eq!(call(hit), errno(97), "{operator} of {hit}");
        assert_eq!(call(miss), ALLOW, "{operator} of {miss}");
    }
}

#[test]
fn conditions_on_different_arguments_are_all_needed_and_on_one_argument_any_is_enough() {
    let profile = |args: &str| {
        compile(&format!(
            r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":["personality"],"action":"SCMP_ACT_ALLOW",
                "args":[{args}]}}]}}"#,
        ))
        .unwrap()
    };
    let call = |filter: &Filter, first, second| {
        run(filter, X86_64, number("personality"), [first, second, 0, 0, 0, 0])
    };
    let all = profile(r#"{"index":0,"value":1,"op":"SCMP_CMP_EQ"},{"index":1,"value":2,"op":"SCMP_CMP_EQ"}"#);
    assert_eq!(call(&all, 1, 2), ALLOW);
    assert_eq!(call(&all, 1, 3), errno(libc::EPERM));
    let any = profile(r#"{"index":0,"value":1,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}"#);
    assert_eq!(call(&any, 1, 0), ALLOW);
    assert_eq!(call(&any, 8, 0), ALLOW);
    assert_eq!(call(&any, 9, 0), errno(libc::EPERM));
}

#[test]
fn other_architectures_are_filtered_only_when_listed() {
    let rule = r#""syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]"#;
    let with = compile(&format!(
        r#"{{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],{rule}}}"#
    ))
    .unwrap();
    assert_eq!(run(&with, I386, 3, NONE), ALLOW, "read is 3 there");
    let without = compile(&format!(r#"{{"defaultAction":"SCMP_ACT_ERRNO",{rule}}}"#)).unwrap();
    assert_ne!(run(&without, I386, 3, NONE), ALLOW);
}

#[test]
fn a_call_newer_than_the_profile_is_enosys_and_an_older_one_is_the_default() {
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["openat2"],"action":"SCMP_ACT_ALLOW"}]}"#,
    )
    .unwrap();
    assert_eq!(run(&filter, X86_64, 600, NONE), errno(libc::ENOSYS));
    assert_eq!(run(&filter, X86_64, number("openat2") + 1, NONE), errno(libc::ENOSYS));
    assert_eq!(run(&filter, X86_64, number("mkdir"), NONE), errno(libc::EPERM));
    assert_eq!(run(&filter, X86_64, number("openat2"), NONE), ALLOW);
}

#[test]
fn a_call_unknown_to_libseccomp_is_allowed_by_number_on_the_native_architecture_alone() {
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],
            "syscalls":[{"names":["mseal"],"action":"SCMP_ACT_ALLOW"}]}"#,
    )
    .unwrap();
    assert_eq!(run(&filter, X86_64, 462, NONE), ALLOW);
    assert_ne!(run(&filter, I386, 462, NONE), ALLOW);
    assert_ne!(run(&filter, X86_64, 462 | 0x4000_0000, NONE), ALLOW);
}

#[test]
fn a_restriction_of_a_call_unknown_to_libseccomp_holds_on_every_architecture() {
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],
            "syscalls":[{"names":["mseal"],"action":"SCMP_ACT_ERRNO"}]}"#,
    )
    .unwrap();
    for (arch, number) in [(X86_64, 462), (I386, 462), (X86_64, 462 | 0x4000_0000)] {
        assert_eq!(run(&filter, arch, number, NONE), errno(libc::EPERM));
    }
    assert_eq!(run(&filter, X86_64, 461, NONE), ALLOW);
}

#[test]
fn an_unknown_name_is_left_out_of_an_allow_list_and_refused_in_a_deny_list() {
    let rule = |default, action| {
        compile(&format!(
            r#"{{"defaultAction":"{default}","syscalls":[{{"names":["warp_drive"],"action":"{action}"}}]}}"#
        ))
    };
    assert!(rule("SCMP_ACT_ERRNO", "SCMP_ACT_ALLOW").is_ok());
    assert!(matches!(rule("SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"), Err(Failure::Unsupported { .. })));
    assert!(matches!(rule("SCMP_ACT_ALLOW", "SCMP_ACT_KILL"), Err(Failure::Unsupported { .. })));
}

#[test]
fn a_rule_that_repeats_the_default_is_accepted() {
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["mount"],"action":"SCMP_ACT_ERRNO","errnoRet":1},
            {"names":["read"],"action":"SCMP_ACT_ALLOW"}]}"#,
    );
    assert_eq!(run(&filter.unwrap(), X86_64, number("mount"), NONE), errno(libc::EPERM));
}

#[test]
fn notify_and_listeners_are_refused() {
    for json in [
        r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mount"],"action":"SCMP_ACT_NOTIFY"}]}"#,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/run/seccomp.sock"}"#,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}"#,
    ] {
        assert!(matches!(compile(json), Err(Failure::Unsupported { .. })), "{json}");
    }
}

#[test]
fn bad_values_are_refused() {
    for json in [
        r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":5000}"#,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","defaultErrnoRet":1}"#,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":[],"action":"SCMP_ACT_ERRNO"}]}"#,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_ERRNO",
            "args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#,
    ] {
        assert!(matches!(compile(json), Err(Failure::Invalid { .. })), "{json}");
    }
}

#[test]
fn every_architecture_of_the_specification_is_known_or_refused_by_name() {
    for name in ["X86", "X86_64", "X32", "ARM", "AARCH64", "MIPS64N32", "PPC64LE", "S390X", "RISCV64"] {
        let arch: Arch = serde_json::from_str(&format!("\"SCMP_ARCH_{name}\"")).unwrap();
        assert!(architecture(arch).is_ok(), "{name}");
    }
}

#[test]
fn flags_are_kept_with_the_program() {
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_LOG","SECCOMP_FILTER_FLAG_SPEC_ALLOW"]}"#,
    );
    assert_eq!(filter.unwrap().as_bytes()[..FLAGS], 6_u32.to_ne_bytes());
}
