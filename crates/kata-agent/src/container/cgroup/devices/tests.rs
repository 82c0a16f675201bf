use super::*;

/// Runs a program on one request, as the kernel would.
fn run(program: &[Instruction], kind: u32, major: u32, minor: u32, access: u8) -> bool {
    let context = [u32::from(access) << 16 | kind, major, minor];
    let mut registers = [0_u64; 7];
    let mut at = 0;
    loop {
        let Instruction { code, registers: pair, offset, immediate } = program[at];
        at += 1;
        let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
        let word = |register: u64| u32::try_from(register & 0xffff_ffff).unwrap();
        let value = immediate.cast_unsigned();
        let jump = |holds: bool| if holds { usize::try_from(offset).unwrap() } else { 0 };
        match code {
            LOAD_WORD => registers[to] = context[usize::try_from(offset).unwrap() / 4].into(),
            MOVE_REGISTER => registers[to] = word(registers[from]).into(),
            MOVE => registers[to] = value.into(),
            AND => registers[to] = (word(registers[to]) & value).into(),
            SHIFT_RIGHT => registers[to] = (word(registers[to]) >> value).into(),
            IF_NOT_EQUAL => at += jump(word(registers[to]) != value),
            IF_EQUAL => at += jump(word(registers[to]) == value),
            EXIT => return registers[0] == 1,
            other => panic!("instruction {other:#x}"),
        }
    }
}

/// What the rules mean, said in another way: each access by itself, the last rule that matches decides.
fn meant(rules: &[Rule], kind: Kind, major: u32, minor: u32, access: u8) -> bool {
    [READ, WRITE, MKNOD].into_iter().filter(|bit| access & bit != 0).all(|bit| {
        let matching = rules.iter().rev().find(|rule| {
            rule.kind.is_none_or(|one| one == kind)
                && rule.major.is_none_or(|one| one == major)
                && rule.minor.is_none_or(|one| one == minor)
                && rule.access & bit != 0
        });
        matching.is_some_and(|rule| rule.allow)
    })
}

fn parse(json: &str) -> Result<Vec<Rule>, EngineError> {
    let asked: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).expect("rules");
    rules(&asked, &[])
}

fn allows(rules: &[Rule], kind: Kind, major: u32, minor: u32, access: u8) -> bool {
    run(&program(rules), kind.number(), major, minor, access)
}

#[test]
fn what_no_rule_names_is_denied_and_harmless_devices_are_not() {
    let rules = parse("[]").unwrap();
    assert!(!allows(&rules, Kind::Block, 8, 0, READ));
    assert!(allows(&rules, Kind::Block, 8, 0, MKNOD), "making a node gives no access");
    for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (136, 7)] {
        assert!(allows(&rules, Kind::Char, major, minor, READ | WRITE), "{major}:{minor}");
    }
    assert!(!allows(&rules, Kind::Block, 1, 3, READ), "the number of null, but a block device");
}

#[test]
fn the_last_rule_that_matches_wins() {
    let rules = parse(
        r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"b","major":8,"access":"rw"},
            {"allow":false,"type":"b","major":8,"minor":1,"access":"w"}]"#,
    )
    .unwrap();
    assert!(allows(&rules, Kind::Block, 8, 0, READ | WRITE));
    assert!(allows(&rules, Kind::Block, 8, 1, READ));
    assert!(!allows(&rules, Kind::Block, 8, 1, WRITE));
    assert!(!allows(&rules, Kind::Block, 8, 1, READ | WRITE), "half allowed is denied");
    assert!(!allows(&rules, Kind::Char, 8, 0, READ));
}

#[test]
fn accesses_allowed_by_different_rules_add_up() {
    let rules = parse(
        r#"[{"allow":true,"type":"c","major":10,"minor":200,"access":"r"},
            {"allow":true,"type":"c","major":10,"minor":200,"access":"w"}]"#,
    )
    .unwrap();
    assert!(allows(&rules, Kind::Char, 10, 200, READ | WRITE));
    assert!(!allows(&rules, Kind::Char, 10, 201, READ));
}

#[test]
fn allow_all_allows_all_and_minus_one_is_a_wildcard() {
    let rules = parse(r#"[{"allow":true,"type":"a","major":-1,"minor":-1,"access":"rwm"}]"#).unwrap();
    assert!(allows(&rules, Kind::Block, 254, 3, READ | WRITE | MKNOD));
}

#[test]
fn without_rules_the_devices_of_the_spec_are_allowed() {
    let nodes: Vec<LinuxDevice> =
        serde_json::from_str(r#"[{"path":"/dev/x","type":"b","major":254,"minor":16}]"#).unwrap();
    let open = rules(&[], &nodes).unwrap();
    assert!(allows(&open, Kind::Block, 254, 16, READ | WRITE));
    assert!(!allows(&open, Kind::Block, 254, 17, READ));
    let asked: Vec<LinuxDeviceCgroup> = serde_json::from_str(r#"[{"allow":false,"access":"rwm"}]"#).unwrap();
    assert!(
        !allows(&rules(&asked, &nodes).unwrap(), Kind::Block, 254, 16, READ),
        "rules that are given decide alone"
    );
}

#[test]
fn nonsense_is_refused() {
    for json in [
        r#"[{"allow":true,"access":"rx"}]"#,
        r#"[{"allow":true,"type":"p"}]"#,
        r#"[{"allow":true,"major":-2}]"#,
        r#"[{"allow":true,"minor":4294967296}]"#,
    ] {
        assert!(parse(json).is_err(), "{json}");
    }
}

#[test]
fn the_kernels_verifier_accepts_programs() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: loading programs needs root");
        return;
    }
    let many = r#"{"allow":true,"type":"c","major":9,"minor":9,"access":"r"},"#.repeat(300);
    for json in [
        "[]".to_owned(),
        r#"[{"allow":true,"access":"rwm"}]"#.to_owned(),
        r#"[{"allow":false,"access":"rwm"}]"#.to_owned(),
        r#"[{"allow":false,"access":""}]"#.to_owned(),
        format!(r#"[{many}{{"allow":false,"type":"b"}}]"#),
    ] {
        load(&program(&parse(&json).unwrap())).unwrap_or_else(|error| panic!("{json:.60}: {error:?}"));
    }
}

proptest::proptest! {
    #[test]
    fn the_program_means_what_the_rules_mean(
        raw in proptest::collection::vec((proptest::bool::ANY, 0..3_u8, 0..4_u32, 0..4_u32, 0..8_u8), 0..12),
        block in proptest::bool::ANY, major in 0..4_u32, minor in 0..4_u32, access in 1..8_u8,
    ) {
        let rules: Vec<Rule> = raw.into_iter().map(|(allow, kind, major, minor, access)| Rule {
            allow,
            kind: [None, Some(Kind::Block), Some(Kind::Char)][usize::from(kind)],
            major: Some(major).filter(|major| *major != 3),
            minor: Some(minor).filter(|minor| *minor != 3),
            access,
        }).collect();
        let kind = if block { Kind::Block } else { Kind::Char };
        proptest::prop_assert_eq!(
            allows(&rules, kind, major, minor, access),
            meant(&rules, kind, major, minor, access)
        );
    }
}
