use serde_json::json;

use super::*;

fn answer() -> Value {
    json!({
        "host": { "kvm": { "state": "software-only" }, "cpus": 2, "memory_mib": 24000,
                  "qemu": { "path": "/usr/bin/qemu-system-x86_64", "version": { "major": 7, "minor": 2 } } },
        "qemu_error": null,
        "choice": { "driver": "qemu", "accelerator": "Tcg", "reason": "because" },
        "choice_error": null,
        "artefacts": { "qemu": "/q", "kata_vmm": "/v", "virtiofsd": "/f", "guest_image": null },
        "artefacts_error": null,
    })
}

fn verdicts(answer: &Value) -> Vec<(&'static str, Verdict)> {
    machine::findings(answer).into_iter().map(|finding| (finding.what, finding.verdict)).collect()
}

#[test]
fn software_kvm_is_a_warning_with_cost_and_remedy() {
    let findings = machine::findings(&answer());
    let kvm = findings.iter().find(|finding| finding.what == "/dev/kvm").unwrap();
    assert_eq!(kvm.verdict, Verdict::Warning);
    assert!(kvm.cost.as_ref().unwrap().contains("slower") && kvm.remedy.as_ref().unwrap().contains("svm"));
    assert!(verdicts(&answer()).iter().all(|(_, verdict)| *verdict != Verdict::Failed));
}

#[test]
fn missing_artefacts_are_a_failure_that_tells_where_was_looked() {
    let mut answer = answer();
    answer["artefacts"] = Value::Null;
    answer["artefacts_error"] = json!("kata-vmm not found; looked at /opt/kata/bin/kata-vmm (not there)");
    let findings = machine::findings(&answer);
    let missing = findings.iter().find(|finding| finding.what == "artefacts").unwrap();
    assert_eq!(missing.verdict, Verdict::Failed);
    assert!(missing.found.contains("/opt/kata/bin/kata-vmm"));
    assert!(verdicts(&answer).contains(&("guest image", Verdict::Failed)));
}

#[test]
fn every_finding_that_is_not_well_says_what_it_costs_and_how_to_mend_it() {
    let mut broken = answer();
    broken["qemu_error"] = json!("no such file");
    broken["choice"] = Value::Null;
    broken["choice_error"] = json!("KVM was asked for");
    for finding in machine::findings(&broken)
        .iter()
        .chain(&host::findings())
        .chain(&devices::findings(Path::new("/")))
        .chain(&jetson::findings(Path::new("/")))
    {
        let told = finding.cost.is_some() && finding.remedy.is_some();
        assert_eq!(told, finding.verdict != Verdict::Ok, "{finding:?}");
    }
}

#[test]
fn the_text_ends_with_the_verdict() {
    let text = Report::of(machine::findings(&answer())).as_text();
    assert!(text.contains("QEMU") && text.contains("7.2 at /usr/bin/qemu-system-x86_64"), "{text}");
    assert!(text.ends_with("Pods can run on this host; one thing could be better.\n"), "{text}");
}

#[test]
fn warnings_fail_only_where_they_are_asked_to() {
    let report = Report::of(machine::findings(&answer()));
    assert!(!report.has_failed(false) && report.has_failed(true));
    let fine = Report::of(vec![Finding::ok("x", "y")]);
    assert!(!fine.has_failed(true));
    assert!(Report::of(vec![Finding::failed("x", "y", "z")]).has_failed(false));
}

#[test]
fn program_of_another_driver_is_looked_for_in_the_place_of_qemu() {
    let mut other = answer();
    other["choice"]["driver"] = json!("firecracker");
    other["qemu_error"] = json!("QEMU is not installed");
    other["artefacts"]["vmm"] = json!("/no/such/firecracker");
    let of = |answer: &Value| {
        let findings = machine::findings(answer);
        assert!(findings.iter().all(|finding| finding.what != "QEMU"));
        findings.into_iter().find(|finding| finding.what == "Firecracker").unwrap()
    };
    assert_eq!(of(&other).found, "unknown version at /no/such/firecracker");
    other["artefacts"] = Value::Null;
    other["artefacts_error"] = json!("firecracker not found");
    let missing = of(&other);
    assert_eq!(missing.verdict, Verdict::Failed);
    assert!(missing.remedy.unwrap().contains("[hypervisor.firecracker]"));
}
