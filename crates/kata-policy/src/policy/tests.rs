use serde_json::json;

use super::*;

fn policy(rules: &str) -> Policy {
    Policy::parse("test.rego", &format!("package agent_policy\n{rules}\n")).unwrap()
}

fn request(name: &str, input: serde_json::Value) -> Request {
    Request { name: name.to_owned(), input }
}

fn verdict(policy: &mut Policy, name: &str, input: serde_json::Value) -> String {
    policy.check(&request(name, input)).map_or_else(|denied| denied.to_string(), |()| "allowed".to_owned())
}

#[test]
fn request_is_allowed_by_the_rule_of_its_name() {
    let mut policy = policy(
        "default ExecProcessRequest := false\nExecProcessRequest if input.process.Args == [\"true\"]\nStatsContainerRequest := true",
    );
    let exec = |program: &str| json!({"process": {"Args": [program]}});
    assert_eq!(verdict(&mut policy, "ExecProcessRequest", exec("true")), "allowed");
    assert_eq!(verdict(&mut policy, "StatsContainerRequest", json!({})), "allowed");
    assert_eq!(
        verdict(&mut policy, "ExecProcessRequest", exec("sh")),
        "the policy denies ExecProcessRequest: rule agent_policy.ExecProcessRequest does not allow it"
    );
    assert_eq!(
        verdict(&mut policy, "CreateContainerRequest", json!({})),
        "the policy denies CreateContainerRequest: it has no rule agent_policy.CreateContainerRequest"
    );
}

#[test]
fn line_may_be_as_long_as_a_script_that_a_container_runs() {
    let script = "x".repeat(64 << 10);
    let mut policy = policy(&format!("ExecProcessRequest if input.process.Args == [\"{script}\"]"));
    assert_eq!(verdict(&mut policy, "ExecProcessRequest", json!({"process": {"Args": [script]}})), "allowed");
}

#[test]
fn rule_that_is_undefined_allows_nothing() {
    let mut policy = policy("CopyFileRequest if startswith(input.path, \"/run/\")");
    assert_eq!(verdict(&mut policy, "CopyFileRequest", json!({"path": "/run/x"})), "allowed");
    assert!(
        verdict(&mut policy, "CopyFileRequest", json!({"path": "/etc/x"})).ends_with("does not allow it")
    );
    assert!(verdict(&mut policy, "CopyFileRequest", json!({})).ends_with("does not allow it"));
}

#[test]
fn denial_does_not_show_what_the_request_holds() {
    let mut policy = policy(
        "CreateContainerRequest := input\n\
         ExecProcessRequest if input.a.b > to_number(input.secret)\n\
         SetPolicyRequest if startswith(1, input.secret)\n\
         WriteStreamRequest if startswith(input.list, \"a\")\n\
         CopyFileRequest := {input.secret: true, \"allowed\": true, \"ops\": [input.secret]}\n\
         SignalProcessRequest := {\"allowed\": true, \"ops\": [{\"op\": \"remove\", \"path\": input.secret}]}\n\
         StartContainerRequest if object.get(input.list, 1, 2)\n\
         ReadStreamRequest := input.secret\n\
         ReadStreamRequest := input.list",
    );
    let rules = [
        "CreateContainerRequest",
        "ExecProcessRequest",
        "SetPolicyRequest",
        "WriteStreamRequest",
        "CopyFileRequest",
        "SignalProcessRequest",
        "StartContainerRequest",
        "ReadStreamRequest",
    ];
    for name in rules {
        let input = json!({"secret": "hunter2", "list": ["hunter2"], "a": {"b": 1}});
        let text = verdict(&mut policy, name, input);
        assert!(text.starts_with("the policy denies") && !text.contains("hunter2"), "{text}");
    }
}

#[test]
fn a_rule_that_goes_wrong_is_told_with_its_line() {
    let mut policy = policy("\nExecProcessRequest if startswith(input.list, \"a\")");
    let text = verdict(&mut policy, "ExecProcessRequest", json!({"list": ["hunter2"]}));
    assert!(
        text.contains("agent_policy.ExecProcessRequest gives no answer: ") && text.contains("line "),
        "{text}"
    );
}

#[test]
fn what_an_allowed_request_wants_to_remember_is_seen_by_later_rules() {
    let mut policy = policy(
        r#"
default CreateSandboxRequest := {"allowed": false}
CreateSandboxRequest := {"allowed": true, "ops": [{"op": "add", "path": "/pstate/name", "value": input.id}]} if {
    not data.pstate.name
}
default ExecProcessRequest := false
ExecProcessRequest if data.pstate.name == input.id
"#,
    );
    assert!(verdict(&mut policy, "ExecProcessRequest", json!({"id": "a"})).contains("does not allow"));
    assert_eq!(verdict(&mut policy, "CreateSandboxRequest", json!({"id": "a"})), "allowed");
    assert!(verdict(&mut policy, "CreateSandboxRequest", json!({"id": "b"})).contains("does not allow"));
    assert_eq!(verdict(&mut policy, "ExecProcessRequest", json!({"id": "a"})), "allowed");
    assert!(verdict(&mut policy, "ExecProcessRequest", json!({"id": "b"})).contains("does not allow"));
}

#[test]
fn patch_that_does_not_fit_denies_and_changes_nothing() {
    let mut policy = policy(
        "CreateSandboxRequest := {\"allowed\": true, \"ops\": [{\"op\": \"remove\", \"path\": \"/pstate/none\"}]}\n\
         StatsContainerRequest if count(data.pstate) == 0",
    );
    assert!(verdict(&mut policy, "CreateSandboxRequest", json!({})).contains("gives no answer"));
    assert_eq!(verdict(&mut policy, "StatsContainerRequest", json!({})), "allowed");
}

#[test]
fn answer_that_is_none_denies() {
    let mut policy =
        policy("A := 1\nB := \"true\"\nC := {\"allow\": true}\nD := {\"allowed\": \"yes\"}\nE := [true]");
    for name in ["A", "B", "C", "D", "E"] {
        let text = verdict(&mut policy, name, json!({}));
        assert!(text.contains("gives no answer"), "{name}: {text}");
    }
}

#[test]
fn policy_that_does_not_parse_is_refused_with_the_line() {
    let error = Policy::parse("here.rego", "package agent_policy\nallow if {").unwrap_err().to_string();
    assert!(
        error.starts_with("the policy \"here.rego\" is not valid Rego: ") && error.contains("here.rego:2"),
        "{error}"
    );
    let error = Policy::parse("here.rego", "").unwrap_err().to_string();
    assert!(error.contains("is not valid Rego"), "{error}");
    let error = Policy::parse("here.rego", "package other\na := true").unwrap_err().to_string();
    assert_eq!(error, "the policy \"here.rego\" is package \"other\", and has to be \"agent_policy\"");
}

#[test]
fn policies_of_the_older_language_are_read_too() {
    let mut policy = policy("default ExecProcessRequest = false\nExecProcessRequest { input.a == 1 }");
    assert_eq!(verdict(&mut policy, "ExecProcessRequest", json!({"a": 1})), "allowed");
    assert!(verdict(&mut policy, "ExecProcessRequest", json!({"a": 2})).contains("does not allow"));
}

#[test]
fn lenient_policy_says_so_and_denies_all_the_same() {
    let mut policy = policy("default AllowRequestsFailingPolicy := true\nA := false");
    assert!(policy.is_lenient());
    assert!(policy.check(&request("A", json!({}))).is_err());
    assert!(!super::Policy::parse("x", "package agent_policy\nA := true").unwrap().is_lenient());
}

#[test]
fn reason_of_a_guest_that_trusts_nothing_is_what_every_request_is_told() {
    let mut policy = policy("reason := \"the initdata is another\"\nA := true");
    assert_eq!(verdict(&mut policy, "A", json!({})), "the policy denies A: the initdata is another");
    assert_eq!(verdict(&mut Policy::denial("why"), "A", json!({})), "the policy denies A: why");
}

#[test]
fn rule_that_does_not_come_to_an_end_denies_in_time() {
    let mut policy = policy(
        "A if { some i in numbers.range(1, 3000000); some j in numbers.range(1, 3000000); i + j < 0 }",
    );
    let since = std::time::Instant::now();
    let text = verdict(&mut policy, "A", json!({}));
    assert!(text.contains("gives no answer"), "{text}");
    assert!(since.elapsed() < Duration::from_secs(20), "{:?}", since.elapsed());
    assert!(verdict(&mut policy, "B", json!({})).contains("has no rule"));
}
