//! What is deprecated or removed, as users meet it: through containerd, in `kata-ctl run`, in `kata-ctl deprecations`.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::io::Write;
use std::process::{Output, Stdio};

use kata_testkit::containerd::Containerd;
use kata_testkit::host::{Host, stderr, stdout};
use kata_testkit::with_each_containerd;

with_each_containerd!(
    removed_key_is_explained_to_the_client_of_containerd,
    removed_annotation_is_explained_to_the_client_of_containerd,
);

/// All of the one line that a user needs.
const REMOVED: [&str; 5] = [
    "hypervisor.qemu.msize_9p: removed [D0004 virtio-9p]: ",
    "9p does not keep POSIX semantics",
    "Instead, use shared_fs = \"virtio-fs\"",
    "Last release with it: Kata Containers 3.28.0",
    "More: kata-ctl deprecations show D0004",
];

const WITH_REMOVED: &str = "[hypervisor.qemu]\nmsize_9p = 4096\n";

#[track_caller]
fn explains(text: &str) {
    for part in REMOVED {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
}

fn removed_key_is_explained_to_the_client_of_containerd(rig: &mut Containerd) {
    if !rig.has_machines() {
        return;
    }
    rig.host().configure(WITH_REMOVED);
    let output = rig.sh(&[], "box", "true");
    assert!(!output.status.success());
    // The client prints the text of the error that containerd got, and that the kubelet would get.
    explains(&stderr(&output).replace("\\\"", "\""));
    assert_eq!(rig.status("box"), None);
    rig.host().configure("");
    assert_eq!(stdout(&rig.sh(&[], "box", "echo mended")), "mended\n");
}

fn removed_annotation_is_explained_to_the_client_of_containerd(rig: &mut Containerd) {
    if !rig.has_machines() {
        return;
    }
    let output = rig.sh(&["--annotation", "io.katacontainers.config_path=/x.toml"], "box", "true");
    assert!(!output.status.success());
    let told = "annotation io.katacontainers.config_path: removed [D0025 io.katacontainers.config_path]: ";
    assert!(stderr(&output).contains(told), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("Instead, give each configuration a RuntimeClass"),
        "{}",
        stderr(&output)
    );
    assert_eq!(rig.status("box"), None);
}

#[test]
fn removed_key_is_explained_by_run_and_starts_nothing() {
    let Some(host) = Host::new() else { return };
    host.configure(WITH_REMOVED);
    let output = host.sh(&[], "true");
    assert_eq!(output.status.code(), Some(125), "{}", stderr(&output));
    explains(&stderr(&output));
    assert!(stderr(&output).contains(&format!("{}:", host.config().display())), "{}", stderr(&output));
}

#[test]
fn a_pod_runs_under_each_policy_where_nothing_is_deprecated() {
    let Some(host) = Host::new() else { return };
    for policy in ["warn", "reject", "off"] {
        let output = host.sh(&["--deprecated", policy], "echo fine");
        assert_eq!(stdout(&output), "fine\n", "{policy}: {}", stderr(&output));
    }
}

#[test]
fn a_policy_that_there_is_not_is_refused_whoever_asks_for_it() {
    let Some(host) = Host::new() else { return };
    let image = host.image();
    let run = ["run", "--rm", &image, "true"];
    let output = host.ctl(run).env("KATA_DEPRECATED", "never").output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    let told = "KATA_DEPRECATED: runtime.deprecated: \"never\" is not one of warn, reject, off";
    assert!(stderr(&output).contains(told), "{}", stderr(&output));
    // The command line wins over the environment.
    let words = ["run", "--rm", "--deprecated", "reject", &image, "true"];
    let output = host.ctl(words).env("KATA_DEPRECATED", "warn").output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    host.configure("[runtime]\ndeprecated_opt_in = [\"D9999\"]\n");
    let output = host.output(run);
    assert!(stderr(&output).contains("no deprecation has the id \"D9999\""), "{}", stderr(&output));
}

fn check(host: &Host, what: &str, input: &str) -> Output {
    let mut child = host
        .ctl(["deprecations", "check", what, "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn check_finds_uses_in_a_configuration_and_the_drop_ins_beside_it() {
    let Some(host) = Host::new() else { return };
    let config = host.config().display().to_string();
    let clean = host.output(["deprecations", "check", "config", &config]);
    assert_eq!(clean.status.code(), Some(0), "{}", stderr(&clean));
    assert_eq!(stdout(&clean), "Nothing of it is deprecated or removed.\n");
    let drop_in = host.config().with_file_name("config.d").join("10.toml");
    std::fs::create_dir_all(drop_in.parent().unwrap()).unwrap();
    std::fs::write(&drop_in, "[hypervisor.stratovirt]\npath = \"/x\"\n[factory]\nvm_cache_number = 0\n")
        .unwrap();
    let output = host.output(["deprecations", "check", "config", "--json", &config]);
    assert_eq!(output.status.code(), Some(12));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["policy"], "warn");
    let findings = report["findings"].as_array().unwrap();
    let of = |finding: &serde_json::Value| {
        ["id", "verdict", "place", "what"].map(|key| finding[key].as_str().unwrap().to_owned())
    };
    let place = |line: u32| format!("{}:{line}", drop_in.display());
    assert_eq!(
        findings.iter().map(of).collect::<Vec<_>>(),
        [
            ["D0001", "removed", &place(1), "hypervisor.stratovirt"],
            ["D0007", "note", &place(4), "factory.vm_cache_number"],
        ]
    );
    let absent = host.output(["deprecations", "check", "config", "/nonexistent"]);
    assert_eq!(absent.status.code(), Some(1));
    assert!(stderr(&absent).starts_with("kata-ctl: /nonexistent: cannot be read: "), "{}", stderr(&absent));
}

#[test]
fn check_reads_values_manifests_and_commands() {
    let Some(host) = Host::new() else { return };
    let values = check(&host, "values", "shims:\n  stratovirt:\n    enabled: true\n");
    assert_eq!(values.status.code(), Some(12));
    assert!(
        stdout(&values).starts_with("removed  D0001  shims.stratovirt (standard input)\n"),
        "{}",
        stdout(&values)
    );
    let manifests = "kind: Pod\nmetadata:\n  name: a\n---\nkind: Pod\nmetadata:\n  name: b\n  annotations:\n    \
                     io.katacontainers.config_path: /x\n";
    let manifests = check(&host, "manifest", manifests);
    assert_eq!(manifests.status.code(), Some(12));
    let told = "removed  D0025  io.katacontainers.config_path (standard input, Pod b)\n";
    assert!(stdout(&manifests).starts_with(told), "{}", stdout(&manifests));
    let command = host.output(["deprecations", "check", "command-line", "runk", "run", "x"]);
    assert_eq!(command.status.code(), Some(12));
    let command = host.output(["deprecations", "check", "command-line", "kata-ctl", "run", "--rm", "x"]);
    assert_eq!(command.status.code(), Some(0));
    let broken = check(&host, "values", "a: [1\nb: 2\n");
    assert_eq!(broken.status.code(), Some(1));
    assert_eq!(stderr(&broken).lines().count(), 1, "{}", stderr(&broken));
}

#[test]
fn list_and_show_tell_what_there_is() {
    let Some(host) = Host::new() else { return };
    let listed = stdout(&host.output(["deprecations", "list", "--stage", "removed"]));
    assert!(listed.lines().any(|line| line.starts_with("D0002  removed  runk ")), "{listed}");
    let listed = host.output(["deprecations", "list", "--json"]);
    let entries: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(entries[0]["remove_in"]["date"], "2026-11-25");
    let shown = stdout(&host.output(["deprecations", "show", "d0002"]));
    assert!(shown.starts_with("D0002 runk\n"), "{shown}");
    let none = host.output(["deprecations", "show", "D9999"]);
    assert_eq!(none.status.code(), Some(3));
    assert!(stderr(&none).contains("kata-ctl deprecations list has all of them"), "{}", stderr(&none));
}

#[test]
fn what_is_said_to_migrate_by_itself_does() {
    let Some(host) = Host::new() else { return };
    let listed = host.output(["deprecations", "list", "--json"]);
    let entries: Vec<serde_json::Value> = serde_json::from_slice(&listed.stdout).unwrap();
    let (old, new) = (host.scratch("old.toml"), host.scratch("new.toml"));
    let (old, new) = (old.to_str().unwrap(), new.to_str().unwrap());
    let mut migrated = 0;
    for entry in entries.iter().filter(|entry| entry["automatic_migration"] == true) {
        let selectors = entry["selectors"].as_array().unwrap().iter();
        for name in selectors
            .filter(|one| one["surface"] == "config-key")
            .flat_map(|one| one["names"].as_array().unwrap())
        {
            let key = name.as_str().unwrap().replace('*', "qemu");
            let value = if key.ends_with("seccompsandbox") { "\"on\"" } else { "90" };
            std::fs::write(old, format!("{key} = {value}\n")).unwrap();
            let output = host.output(["config", "migrate", "--output", new, old]);
            assert!(output.status.success(), "{}: {}", entry["id"], stderr(&output));
            assert!(std::fs::read_to_string(new).unwrap().contains(value.trim_matches('"')), "{key} is lost");
            let check = host.output(["deprecations", "check", "config", new]);
            assert_eq!(check.status.code(), Some(0), "{}: {}", entry["id"], stdout(&check));
            migrated += 1;
        }
    }
    assert!(migrated > 0);
}
