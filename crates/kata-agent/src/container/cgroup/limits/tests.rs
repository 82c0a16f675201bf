use super::*;

fn parse(json: &str) -> Result<Vec<(String, String)>, String> {
    let resources: LinuxResources = serde_json::from_str(json).expect("resources");
    let settings = settings(&resources).map_err(|error| error.to_string())?;
    Ok(settings.into_iter().map(|setting| setting.writes.first().unwrap().clone()).collect())
}

fn writes(json: &str) -> Vec<(String, String)> {
    parse(json).unwrap()
}

fn pair(file: &str, value: &str) -> (String, String) {
    (file.to_owned(), value.to_owned())
}

#[test]
fn shares_map_onto_weights_through_both_defaults_and_both_ends() {
    for (shares, weight) in
        [(0, 1), (2, 1), (3, 2), (1024, 100), (2048, 174), (262_144, 10_000), (u64::MAX, 10_000)]
    {
        assert_eq!(weight_of_shares(shares), weight, "{shares}");
    }
    let weights: Vec<u64> = (2..5000).map(weight_of_shares).collect();
    assert!(weights.is_sorted(), "more shares never weigh less");
}

#[test]
fn swap_is_what_is_left_above_memory() {
    let swap = |both, limit| swap(both, limit).map_err(|_| ());
    assert_eq!(swap(Some(300), Some(100)), Ok(Some(200)));
    assert_eq!(swap(Some(100), Some(100)), Ok(Some(0)));
    assert_eq!(swap(Some(-1), Some(100)), Ok(Some(-1)));
    assert_eq!(swap(None, Some(-1)), Ok(Some(-1)));
    assert_eq!(swap(None, Some(100)), Ok(None));
    assert_eq!(swap(Some(50), Some(100)), Err(()));
    assert_eq!(swap(Some(50), None), Err(()));
}

#[test]
fn memory_limits_become_their_files() {
    let got = writes(r#"{"memory":{"limit":1048576,"reservation":4096,"swap":2097152}}"#);
    let wanted =
        [pair("memory.swap.max", "1048576"), pair("memory.max", "1048576"), pair("memory.low", "4096")];
    assert_eq!(got, wanted);
}

#[test]
fn a_period_alone_keeps_the_quota() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cpu.max");
    fs::write(&file, "25000 100000\n").unwrap();
    let resources: LinuxResources = serde_json::from_str(r#"{"cpu":{"period":50000}}"#).unwrap();
    settings(&resources).unwrap()[0].apply(directory.path()).unwrap();
    assert!(fs::read_to_string(&file).unwrap().starts_with("25000 50000"));
}

#[test]
fn cpu_limits_become_their_files() {
    let got = writes(r#"{"cpu":{"shares":1024,"quota":50000,"period":100000,"cpus":"0-1","mems":"0"}}"#);
    let wanted = [
        pair("cpu.weight", "100"),
        pair("cpu.max", "50000 100000"),
        pair("cpuset.cpus", "0-1"),
        pair("cpuset.mems", "0"),
    ];
    assert_eq!(got, wanted);
    assert_eq!(writes(r#"{"cpu":{"quota":-1}}"#), [pair("cpu.max", "max")]);
}

#[test]
fn pids_io_and_huge_pages_become_their_files() {
    assert_eq!(writes(r#"{"pids":{"limit":64}}"#), [pair("pids.max", "64")]);
    assert_eq!(writes(r#"{"pids":{"limit":-1}}"#), [pair("pids.max", "max")]);
    let got =
        writes(r#"{"blockIO":{"weight":500,"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1000}]}}"#);
    assert_eq!(got, [pair("io.bfq.weight", "500"), pair("io.max", "8:0 rbps=1000")]);
    let got = writes(r#"{"hugepageLimits":[{"pageSize":"2MB","limit":4194304}]}"#);
    assert_eq!(got, [pair("hugetlb.2MB.max", "4194304"), pair("hugetlb.2MB.rsvd.max", "4194304")]);
    assert_eq!(writes(r#"{"unified":{"memory.high":"1000"}}"#), [pair("memory.high", "1000")]);
}

#[test]
fn io_weight_falls_back_to_the_other_scheduler() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("io.weight"), "").unwrap();
    let resources: LinuxResources = serde_json::from_str(r#"{"blockIO":{"weight":1000}}"#).unwrap();
    settings(&resources).unwrap()[0].apply(directory.path()).unwrap();
    assert_eq!(fs::read_to_string(directory.path().join("io.weight")).unwrap(), "default 10000");
}

#[test]
fn a_limit_without_its_controller_names_key_and_file() {
    let directory = tempfile::tempdir().unwrap();
    let resources: LinuxResources = serde_json::from_str(r#"{"pids":{"limit":5}}"#).unwrap();
    let error = settings(&resources).unwrap()[0].apply(directory.path()).unwrap_err();
    assert!(
        error.to_string().contains("linux.resources.pids.limit") && error.to_string().contains("pids.max")
    );
}

#[test]
fn no_swap_is_given_by_a_kernel_without_swap() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("memory.max"), "").unwrap();
    let resources: LinuxResources = serde_json::from_str(r#"{"memory":{"limit":4096,"swap":4096}}"#).unwrap();
    for setting in settings(&resources).unwrap() {
        setting.apply(directory.path()).unwrap();
    }
    let more: LinuxResources = serde_json::from_str(r#"{"memory":{"limit":4096,"swap":8192}}"#).unwrap();
    let applied: Result<Vec<()>, _> =
        settings(&more).unwrap().iter().map(|setting| setting.apply(directory.path())).collect();
    assert!(applied.is_err(), "swap that was asked for is missed");
}

#[test]
fn limits_of_cgroup_v1_are_refused_by_key() {
    for (json, key) in [
        (r#"{"memory":{"kernel":1}}"#, "memory.kernel"),
        (r#"{"memory":{"swappiness":60}}"#, "memory.swappiness"),
        (r#"{"memory":{"disableOOMKiller":true}}"#, "memory.disableOOMKiller"),
        (r#"{"cpu":{"realtimeRuntime":1}}"#, "cpu.realtimeRuntime"),
        (r#"{"blockIO":{"leafWeight":10}}"#, "blockIO.leafWeight"),
        (r#"{"network":{"classID":1}}"#, "network"),
        (r#"{"unified":{"cgroup.procs":"1"}}"#, "unified"),
    ] {
        let error = parse(json).unwrap_err();
        assert!(error.contains(key) && error.contains("not supported"), "{json}: {error}");
    }
}

#[test]
fn names_that_are_no_file_of_a_controller_are_refused() {
    for json in [
        r#"{"unified":{"../memory.max":"1"}}"#,
        r#"{"unified":{"memory":"1"}}"#,
        r#"{"hugepageLimits":[{"pageSize":"../2MB","limit":1}]}"#,
        r#"{"hugepageLimits":[{"pageSize":"MB","limit":1}]}"#,
        r#"{"cpu":{"cpus":"0\n1"}}"#,
    ] {
        assert!(parse(json).is_err(), "{json}");
    }
}

#[test]
fn a_limit_below_usage_is_refused_only_if_asked() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("memory.current"), "5000\n").unwrap();
    let check = |json: &str| check_usage(directory.path(), &serde_json::from_str(json).unwrap());
    assert!(check(r#"{"memory":{"limit":4096,"checkBeforeUpdate":true}}"#).is_err());
    assert!(check(r#"{"memory":{"limit":4096}}"#).is_ok());
    assert!(check(r#"{"memory":{"limit":8192,"checkBeforeUpdate":true}}"#).is_ok());
}
