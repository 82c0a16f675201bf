use oci_spec::runtime::{LinuxCpuBuilder, LinuxMemoryBuilder, LinuxResourcesBuilder};
use proptest::prelude::*;

use super::*;

fn spec(annotations: &str, resources: &str) -> Spec {
    let text = format!(
        r#"{{"ociVersion":"1.1.0","annotations":{{{annotations}}},
            "linux":{{"cgroupsPath":"/kubepods/pod1/web","resources":{{{resources}}}}}}}"#
    );
    serde_json::from_str(&text).unwrap()
}

const POD: &str = r#""io.kubernetes.cri.container-type":"sandbox""#;

fn of(annotations: &str, resources: &str) -> ResourceSpec {
    ResourceSpec::of(&spec(annotations, resources)).unwrap()
}

fn resources(quota: i64, memory: i64, cpus: &str) -> LinuxResources {
    let cpu = LinuxCpuBuilder::default().quota(quota).period(50_000_u64).cpus(cpus).build().unwrap();
    let memory = LinuxMemoryBuilder::default().limit(memory).build().unwrap();
    LinuxResourcesBuilder::default().cpu(cpu).memory(memory).build().unwrap()
}

#[test]
fn a_pod_is_promised_what_the_annotations_say_and_not_what_its_pause_container_has() {
    let annotations =
        format!(r#"{POD},"{QUOTA}":"150000","{PERIOD}":"100000","{SHARES}":"2048","{MEMORY}":"67108864""#);
    let spec = of(&annotations, r#""memory":{"limit":1},"cpu":{"quota":1,"cpus":"0-1"}"#);
    let expected = Demand {
        cpu_limit: Some(1500),
        cpu_request: Some(2000),
        memory_limit: Some(64 << 20),
        ..Demand::default()
    };
    assert_eq!((spec.demand, spec.is_pod), (expected, true));
    assert_eq!((spec.cgroups_path, spec.cpus), (Some("/kubepods/pod1/web".into()), Some("0-1".to_owned())));
}

#[test]
fn none_is_said_with_nothing_zero_or_a_negative_number() {
    for none in ["0", "-1"] {
        let annotations = format!(r#"{POD},"{QUOTA}":"{none}","{SHARES}":"{none}","{MEMORY}":"{none}""#);
        assert_eq!(of(&annotations, "").demand, Demand::default());
    }
    assert_eq!(of(POD, "").demand, Demand::default());
}

#[test]
fn an_annotation_that_is_no_number_is_named() {
    let refused = ResourceSpec::of(&spec(&format!(r#"{POD},"{MEMORY}":"64Mi""#), "")).unwrap_err();
    assert_eq!(
        refused.to_string(),
        format!("the annotation {MEMORY} is \"64Mi\", which is not a whole number")
    );
}

#[test]
fn a_single_container_is_promised_its_own_limits() {
    let spec = of("", r#""memory":{"limit":67108864},"cpu":{"quota":200000,"period":100000,"shares":5}"#);
    let expected = Demand { cpu_limit: Some(2000), memory_limit: Some(64 << 20), ..Demand::default() };
    assert_eq!((spec.demand, spec.is_pod), (expected, false));
}

#[test]
fn containers_add_up_and_those_without_a_limit_are_known() {
    let mut tally = Tally::default();
    tally.set("a", Share::of(Some(&resources(50_000, 100, "0-1"))).unwrap());
    tally.set("b", Share::of(Some(&resources(25_000, 50, "3"))).unwrap());
    let demand = tally.demand();
    assert_eq!((demand.cpu_limit, demand.memory_limit), (Some(1500), Some(150)));
    assert!(!demand.cpu_open && !demand.memory_open);
    assert_eq!(tally.cpus().unwrap().text(), "0,1,3");
    tally.set("c", Share::of(None).unwrap());
    assert!(tally.demand().cpu_open && tally.cpus().is_none());
    tally.remove("c");
    assert_eq!(tally.demand(), demand);
}

#[test]
fn an_update_changes_what_it_names_and_can_lift_a_limit() {
    let mut share = Share::of(Some(&resources(50_000, 100, "1"))).unwrap();
    let memory = LinuxMemoryBuilder::default().limit(200).build().unwrap();
    share.change(&LinuxResourcesBuilder::default().memory(memory).build().unwrap()).unwrap();
    assert_eq!((share.cpu_limit, share.memory_limit), (Some(1000), Some(200)));
    share.change(&resources(-1, -1, "")).unwrap();
    assert_eq!((share.cpu_limit, share.memory_limit), (None, None));
    assert_eq!(share.cpus.unwrap().text(), "1");
}

#[test]
fn sets_of_cpus_are_read_as_the_kernel_writes_them() {
    assert_eq!(CpuSet::parse("0-2,7\n").unwrap().text(), "0,1,2,7");
    for wrong in ["a", "3-1", "0-99999", "-1", "1-"] {
        assert!(CpuSet::parse(wrong).is_err(), "{wrong}");
    }
}

proptest! {
    #[test]
    fn no_text_of_an_annotation_is_too_much(text in "\\PC*", cpus in "[-0-9, a]*") {
        let annotations = HashMap::from([(QUOTA.to_owned(), text.clone()), (MEMORY.to_owned(), text)]);
        let _ = of_annotations(&annotations);
        let _ = CpuSet::parse(&cpus);
    }
}
