use super::*;

/// What an extension for confidential guests declares, after the published schema.
pub(crate) const COCO: &str = r#"
schema_version = 1

[paths]
"ocicrypt-config" = "etc/ocicrypt_config.json"
"pause-bundle" = "pause_bundle"

[[process]]
id = "attestation-agent"
level = 1
args = ["--attestation_sock", "${aa_attestation_uri}"]
optional_args = [{ when = "initdata_toml_path", args = ["--initdata-toml", "${initdata_toml_path}"] }]
config = "${aa_config_path}"
wait_socket = "${aa_attestation_socket}"
timeout_secs = "${launch_process_timeout}"
select = "${attester_variant}"

[process.variants.default]
path = "usr/local/bin/attestation-agent"

[process.variants.nvidia]
path = "usr/local/bin/attestation-agent-nv"
env = { LD_LIBRARY_PATH = "${extension_root}/usr/local/lib:/run/kata-extensions/gpu/usr/lib" }

[[process]]
id = "confidential-data-hub"
level = 2
path = "usr/local/bin/confidential-data-hub"
config = "${cdh_config_path}"
env = { OCICRYPT_KEYPROVIDER_CONFIG = "${ocicrypt_config_path}", PATH = "${extension_root}/usr/sbin:/usr/bin" }
wait_socket = "${cdh_socket}"

[[process]]
id = "api-server-rest"
level = 3
path = "usr/local/bin/api-server-rest"
args = ["--features", "${rest_api_features}"]
"#;

pub(crate) fn plan_of(text: &str, attached: &[&str]) -> Result<Vec<Process>, PlanError> {
    let manifest = Manifest::parse(text.as_bytes()).unwrap();
    let table = Table::built_in().unwrap();
    let attached: Vec<String> = attached.iter().map(|name| (*name).to_owned()).collect();
    let variables = table.variables("/run/kata-extensions/coco", &manifest.paths, &attached);
    plan(&manifest, &variables, &table)
}

fn one(lines: &str) -> Result<Process, PlanError> {
    let text = format!("schema_version = 1\n[[process]]\nid = \"a\"\nlevel = 1\npath = \"bin/a\"\n{lines}");
    plan_of(&text, &[]).map(|mut processes| processes.remove(0))
}

#[test]
fn the_published_schema_becomes_processes_with_all_values() {
    let processes = plan_of(COCO, &["coco"]).unwrap();
    let [agent, hub, server] = processes.as_slice() else { panic!("{processes:?}") };
    assert_eq!((agent.program.as_str(), agent.level), ("usr/local/bin/attestation-agent", 1));
    let socket = "/run/confidential-containers/attestation-agent/attestation-agent.sock";
    assert_eq!(agent.socket.as_deref(), Some(socket));
    let group = |condition: Option<&str>, words: &[&str]| Arguments {
        condition: condition.map(str::to_owned),
        words: words.iter().map(|word| (*word).to_owned()).collect(),
    };
    let initdata = "/run/measured-cfg/initdata.toml";
    let config = "/run/measured-cfg/aa.toml";
    assert_eq!(
        agent.arguments,
        [
            group(None, &["--attestation_sock", &format!("unix://{socket}")]),
            group(Some(initdata), &["--initdata-toml", initdata]),
            group(Some(config), &["-c", config]),
        ]
    );
    assert_eq!(agent.timeout, 30);
    assert_eq!(hub.guest_services, ["get-resource", "image-pull", "sealed-secrets", "secure-mount"]);
    let keyprovider = "/run/kata-extensions/coco/etc/ocicrypt_config.json";
    assert_eq!(hub.environment["OCICRYPT_KEYPROVIDER_CONFIG"], keyprovider);
    assert_eq!(server.arguments, [group(None, &["--features", "resource"])]);
    assert!(server.socket.is_none() && server.guest_services.is_empty());
}

#[test]
fn another_extension_selects_another_build() {
    let agent = plan_of(COCO, &["coco", "gpu"]).unwrap().remove(0);
    assert_eq!(agent.program, "usr/local/bin/attestation-agent-nv");
    assert!(agent.environment["LD_LIBRARY_PATH"].starts_with("/run/kata-extensions/coco/usr/local/lib:"));
}

#[test]
fn a_process_of_level_0_is_not_started() {
    assert_eq!(plan_of("schema_version = 1\n[[process]]\nid = \"a\"\npath = \"bin/a\"", &[]), Ok(vec![]));
}

#[test]
fn a_program_outside_of_the_extension_is_refused() {
    for path in ["/bin/sh", "../bin/sh", "bin/../../x", "", ".", "bin//sh", "bin/"] {
        let text = format!("schema_version = 1\n[[process]]\nid = \"a\"\nlevel = 1\npath = \"{path}\"");
        assert!(matches!(plan_of(&text, &[]), Err(PlanError::Value { key: "path", .. })), "{path}");
    }
    let variable = "schema_version = 1\n[[process]]\nid = \"a\"\nlevel = 1\npath = \"${extension_root}/a\"";
    assert!(matches!(plan_of(variable, &[]), Err(PlanError::Value { key: "path", .. })));
}

#[test]
fn a_value_that_would_end_a_line_of_a_unit_is_refused_wherever_it_stands() {
    for (key, line) in [
        ("args", "args = [\"a\\nExecStartPre=/bin/evil\"]"),
        ("args", "args = [\"a\\u0000\"]"),
        ("args", "args = [\"a\\r\"]"),
        ("optional_args", "optional_args = [{ when = \"cdh_socket\", args = [\"\\n\"] }]"),
        ("config", "config = \"/a\\n\""),
        ("env", "env = { A = \"b\\nUser=x\" }"),
        ("env", "env = { \"A=1 B\" = \"x\" }"),
        ("env", "env = { \"A\\n\" = \"x\" }"),
        ("wait_socket", "wait_socket = \"/run/a\\n\""),
        ("select", "select = \"\\n\""),
        ("timeout_secs", "timeout_secs = \"1\\n\""),
        ("guest_services", "wait_socket = \"/run/a\"\nguest_services = [\"a\\n\"]"),
        ("network_namespace", "network_namespace = \"/run/netns/a\\n\""),
    ] {
        let error = one(line).unwrap_err();
        assert!(matches!(&error, PlanError::Value { key: at, .. } if *at == key), "{line}: {error}");
    }
    let id = "schema_version = 1\n[[process]]\nid = \"a\\n\"\nlevel = 1\npath = \"a\"";
    assert!(matches!(plan_of(id, &[]), Err(PlanError::Value { key: "id", .. })));
}

#[test]
fn sockets_and_namespaces_are_where_they_may_be() {
    let long = format!("/run/{}", "s".repeat(103));
    for socket in ["/etc/passwd", "/run/../etc/passwd", "run/a", "/run/", "", "/run//a", &long] {
        let error = one(&format!("wait_socket = \"{socket}\"")).unwrap_err();
        assert!(matches!(error, PlanError::Value { key: "wait_socket", .. }), "{socket}");
    }
    for space in ["/proc/1/ns/net", "/run/netns/", "/run/netns/../x", "/run/netns/a/b"] {
        assert!(one(&format!("network_namespace = \"{space}\"")).is_err(), "{space}");
    }
    let services = "wait_socket = \"/run/a.sock\"\nguest_services = [\"../x\"]";
    assert!(matches!(one(services), Err(PlanError::Value { key: "guest_services", .. })));
    assert_eq!(one("guest_services = [\"x\"]"), Err(PlanError::NoSocket("a".to_owned())));
}

#[test]
fn variables_without_a_value_are_refused_with_the_key() {
    for (key, line) in [
        ("args", "args = [\"${nobody}\"]"),
        ("optional_args", "optional_args = [{ when = \"nobody\", args = [\"x\"] }]"),
        ("env", "env = { A = \"${nobody}\" }"),
        ("config", "config = \"${nobody\""),
        ("select", "select = \"${nobody}\""),
    ] {
        let error = one(line).unwrap_err();
        assert!(matches!(&error, PlanError::Variable { key: at, .. } if *at == key), "{line}: {error}");
    }
}

#[test]
fn a_process_without_its_program_or_twice_is_refused() {
    let head = "schema_version = 1\n[[process]]\nid = \"a\"\nlevel = 1\n";
    assert!(matches!(plan_of(head, &[]), Err(PlanError::NoProgram { .. })));
    let variants = format!("{head}select = \"x\"\npath = \"bin/a\"\nvariants.y.path = \"bin/b\"");
    assert!(matches!(plan_of(&variants, &[]), Err(PlanError::NoProgram { variant, .. }) if variant == "x"));
    let twice = format!("{head}path = \"a\"\n{}", head.replace("schema_version = 1", ""));
    assert_eq!(plan_of(&twice, &[]), Err(PlanError::Twice("a".to_owned())));
}

#[test]
fn numbers_and_lists_have_bounds() {
    for seconds in ["0", "-1", "3601", "1.5", ""] {
        assert!(one(&format!("timeout_secs = \"{seconds}\"")).is_err(), "{seconds}");
    }
    assert_eq!(one("timeout_secs = \"3600\"").unwrap().timeout, 3600);
    assert!(one(&format!("args = [{}]", "\"x\",".repeat(257))).is_err());
    assert!(one(&format!("args = [\"{}\"]", "x".repeat(4097))).is_err());
}
