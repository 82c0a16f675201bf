use std::fmt::Write as _;

use kata_config::deprecation::{Selector, Surface, all};
use serde_json::json;

use super::scan;

/// What each surface is written as, where `check` looks for it. A new surface comes with its own place.
fn uses_of(selector: &Selector, name: &str) -> Vec<super::check::Use> {
    let name = name.replace('*', "qemu");
    let value = selector.values.first().map_or("asked-for", |value| value).to_owned();
    match selector.surface {
        Surface::ConfigKey => scan::command_line(&[
            "kata-ctl".to_owned(),
            "run".to_owned(),
            "--set".to_owned(),
            format!("{name}={value}"),
        ]),
        Surface::HelmValue => {
            let nested = name.rsplit('.').fold(json!(value), |inner, key| json!({ key: inner }));
            scan::values("values.yaml", &[nested])
        }
        Surface::Annotation => {
            let pod = json!({ "metadata": { "annotations": { name: value } } });
            let deployment = json!({ "kind": "Deployment", "spec": { "template": pod } });
            scan::manifests("pod.yaml", &[deployment])
        }
        Surface::RuntimeClass => {
            scan::manifests("pod.yaml", &[json!({ "kind": "Pod", "spec": { "runtimeClassName": name } })])
        }
        Surface::Cli => {
            let containers = json!([{ "command": ["sudo", format!("/opt/kata/bin/{name}")], "args": ["x"] }]);
            scan::manifests("pod.yaml", &[json!({ "spec": { "containers": containers } })])
        }
        Surface::Artifact => {
            let source =
                format!("github.com/kata-containers/kata-containers//tools/packaging/{name}?ref=main");
            scan::manifests("k.yaml", &[json!({ "kind": "Kustomization", "resources": [source] })])
        }
        surface @ (Surface::Api | Surface::Metric | Surface::HostSupport | Surface::CrateApi) => {
            panic!("teach `deprecations check` where {surface} is used")
        }
    }
}

#[test]
fn every_id_is_found_where_users_write_it() {
    for item in all() {
        for selector in item.selectors.iter() {
            for name in selector.names.iter() {
                let uses = uses_of(selector, name);
                let ids: Vec<_> = uses.iter().map(|one| (one.deprecation.id.to_string(), one.asks)).collect();
                assert_eq!(ids, [(item.id.to_string(), true)], "{} {name}", selector.surface);
            }
        }
    }
}

#[test]
fn every_id_can_be_shown_with_its_replacement() {
    for item in all() {
        let text = super::as_text(item);
        for part in [&item.id, &item.title, &item.reason, &item.replacement, &item.last_release, &item.issue]
        {
            assert!(text.contains(&**part), "{part} is not in {text}");
        }
    }
}

#[test]
fn the_table_has_a_line_for_each() {
    let items: Vec<_> = all().collect();
    let table = super::as_table(&items);
    assert_eq!(table.lines().count(), items.len() + 1);
    assert!(table.lines().next().unwrap().starts_with("ID     STAGE    WHAT"), "{table}");
    assert_eq!(super::as_table(&[]), "Nothing is in this stage.\n");
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

fn found(line: &str) -> String {
    let mut text = String::new();
    for one in scan::command_line(&words(line)) {
        let _ = write!(text, "{} {}; ", one.deprecation.id, one.what);
    }
    text
}

#[test]
fn commands_are_looked_through_for_programs_settings_files_and_runtimes() {
    assert_eq!(found("sudo kata-runtime check --verbose"), "D0027 sudo kata-runtime check --verbose; ");
    assert_eq!(
        found("kata-ctl run --set=hypervisor.qemu.shared_fs=virtio-9p oci:x"),
        "D0004 hypervisor.qemu.shared_fs = virtio-9p; "
    );
    assert_eq!(found("ctr run --runtime io.containerd.kata-stratovirt.v2 x y"), "D0001 kata-stratovirt; ");
    assert_eq!(
        found("nerdctl run --annotation io.katacontainers.config_path=/x y"),
        "D0025 io.katacontainers.config_path; "
    );
    let link = "https://github.com/kata-containers/kata-containers//tools/packaging/kata-deploy/kata-deploy/overlays/k3s/?ref=3.20.0";
    assert_eq!(found(&format!("kubectl apply -k {link}")), format!("D0026 {link}; "));
    assert_eq!(found("kata-ctl run --set hypervisor.qemu.shared_fs=none oci:runk-like ls"), "");
}

#[test]
fn values_that_are_objects_are_found_once() {
    let values = json!({ "shims": { "disableAll": false, "qemu-sev": { "enabled": true, "supportedArches": ["amd64"] } } });
    let uses = scan::values("values.yaml", &[values]);
    let found: Vec<_> = uses.iter().map(|one| (&*one.what, &*one.place)).collect();
    assert_eq!(found, [("shims.qemu-sev", "values.yaml")]);
}

#[test]
fn a_runtime_class_is_known_by_its_name_or_its_handler() {
    let class = |name: &str, handler: &str| {
        let class = json!({ "kind": "RuntimeClass", "metadata": { "name": name }, "handler": handler });
        scan::manifests("c.yaml", &[class]).len()
    };
    assert_eq!(class("kata-acrn", "kata-acrn"), 1);
    assert_eq!(class("mine", "kata-acrn"), 1);
    assert_eq!(class("mine", "kata-qemu"), 0);
}

#[test]
fn odd_documents_have_no_uses() {
    for odd in
        [json!(null), json!([]), json!("x"), json!({ "annotations": 3, "command": "x", "resources": {} })]
    {
        assert_eq!(scan::manifests("x", std::slice::from_ref(&odd)).len(), 0);
        assert_eq!(scan::values("x", &[odd]).len(), 0);
    }
}
