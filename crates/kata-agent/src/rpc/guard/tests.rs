//! The guard before the services, over a real connection.

use super::super::tests::{Guest, code, context, sh};
use super::*;

const ALLOWS: &str = "package agent_policy\ndefault CreateContainerRequest := false\n\
    CreateContainerRequest if input.OCI.Process.Args[2] == \"sleep 60\"\nStatsContainerRequest := true\n\
    ReadStreamRequest := false\nWriteStreamRequest := true\n";

/// Where the guest's policies would be.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn measured(self, text: &str) -> Self {
        std::fs::write(self.0.path().join("measured"), text).unwrap();
        self
    }

    fn images(self, text: &str) -> Self {
        std::fs::write(self.0.path().join("images"), text).unwrap();
        self
    }

    async fn guest(&self) -> Guest {
        let guard = Arc::new(Guard::with(&self.0.path().join("measured"), &self.0.path().join("images")));
        Guest::behind(|services| guard.before(services)).await
    }
}

async fn set(guest: &Guest, policy: &str) -> ttrpc::Result<Empty> {
    let request = SetPolicyRequest { policy: policy.to_owned(), ..SetPolicyRequest::new() };
    guest.client.set_policy(context(), &request).await
}

#[tokio::test]
async fn container_that_the_policy_knows_is_made_and_another_is_not() {
    let guest = Files::new().measured(ALLOWS).guest().await;
    guest.create("c1", "sleep 60").await.unwrap();
    let (code, text) = code(guest.create("c2", "sleep 61").await);
    assert_eq!(code, Code::PERMISSION_DENIED);
    assert_eq!(
        text,
        "the policy denies CreateContainerRequest: rule agent_policy.CreateContainerRequest does not allow it"
    );
}

#[tokio::test]
async fn request_without_a_rule_is_denied_and_health_is_told_all_the_same() {
    let guest = Files::new().measured(ALLOWS).guest().await;
    guest.create("c1", "sleep 60").await.unwrap();
    let (code, text) = code(guest.exec("c1", "e", sh("true")).await);
    assert!(
        code == Code::PERMISSION_DENIED && text.contains("no rule agent_policy.ExecProcessRequest"),
        "{text}"
    );
    guest.health.version(context(), &kata_api::health::CheckRequest::new()).await.unwrap();
}

#[tokio::test]
async fn container_whose_output_the_policy_keeps_from_the_host_runs_and_says_nothing() {
    let text = "package agent_policy\nCreateContainerRequest := true\nWaitProcessRequest := true\n\
        ReadStreamRequest if input.container_id == \"c2\"\n";
    let guest = Files::new().measured(text).guest().await;
    for (id, port, heard) in [("c1", 7, ""), ("c2", 8, "secret\n")] {
        let mut output = guest.connect(port);
        let mut request = CreateContainerRequest { container_id: id.into(), ..CreateContainerRequest::new() };
        request.stdout_port = port;
        let spec = request.oci.mut_or_insert_default();
        spec.process = Some(sh("echo secret; exit 3")).into();
        spec.root = Some(kata_api::oci::Root { path: "/".into(), ..Default::default() }).into();
        guest.client.create_container(context(), &request).await.unwrap();
        let wait = kata_api::agent::WaitProcessRequest { container_id: id.into(), ..Default::default() };
        assert_eq!(guest.client.wait_process(context(), &wait).await.unwrap().status, 3);
        let read = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            std::io::Read::read_to_string(&mut output, &mut text).map(|_| text)
        });
        assert_eq!(read.await.unwrap().unwrap(), heard);
    }
}

#[tokio::test]
async fn stream_that_the_host_writes_to_needs_its_rule() {
    let guest = Files::new().measured(ALLOWS).guest().await;
    let mut request = CreateContainerRequest { container_id: "c1".into(), ..CreateContainerRequest::new() };
    request.stdin_port = 7;
    request.oci.mut_or_insert_default().process = Some(sh("sleep 60")).into();
    // The rule lets it through; nobody offers the stream.
    let (other, text) = code(guest.client.create_container(context(), &request).await);
    assert!(other != Code::PERMISSION_DENIED, "{text}");
}

#[tokio::test]
async fn measured_policy_is_final() {
    let guest = Files::new().measured(&format!("{ALLOWS}SetPolicyRequest := true\n")).guest().await;
    let (code, text) = code(set(&guest, "package agent_policy\nExecProcessRequest := true").await);
    assert!(code == Code::FAILED_PRECONDITION && text.contains("set once"), "{text}");
}

#[tokio::test]
async fn policy_of_the_image_gives_way_where_it_says_so_and_once() {
    let guest = Files::new().images(ALLOWS).guest().await;
    assert_eq!(code(set(&guest, "package agent_policy").await).0, Code::PERMISSION_DENIED);

    let guest = Files::new().images("package agent_policy\nSetPolicyRequest := true").guest().await;
    assert_eq!(code(set(&guest, "package agent_policy\na if {").await).0, Code::INVALID_ARGUMENT);
    assert_eq!(code(guest.create("c1", "sleep 60").await).0, Code::PERMISSION_DENIED);
    set(&guest, &format!("{ALLOWS}SetPolicyRequest := true\n")).await.unwrap();
    guest.create("c1", "sleep 60").await.unwrap();
    assert_eq!(code(set(&guest, ALLOWS).await).0, Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn guest_without_a_policy_serves_everything_until_the_host_sets_one() {
    let guest = Files::new().guest().await;
    guest.create("c1", "sleep 60").await.unwrap();
    set(&guest, "package agent_policy").await.unwrap();
    assert_eq!(code(guest.create("c2", "sleep 60").await).0, Code::PERMISSION_DENIED);
    assert_eq!(code(set(&guest, ALLOWS).await).0, Code::PERMISSION_DENIED);
}

#[tokio::test]
async fn policy_that_cannot_be_used_denies_everything_and_says_why() {
    for files in [
        Files::new().measured("package agent_policy\na if {"),
        Files::new().images("package other\na := true"),
    ] {
        let guest = files.guest().await;
        let (code, text) = code(guest.create("c1", "sleep 60").await);
        assert!(code == Code::PERMISSION_DENIED && text.contains("the policy \"/"), "{text}");
    }
    let guard = Guard::with(Path::new("/proc/self/mem"), Path::new("/none"));
    assert!(guard.is_active() && guard.allows("ForwardRequest").is_err());
}

#[tokio::test]
async fn lenient_policy_denies_nothing() {
    let text = format!("{ALLOWS}default AllowRequestsFailingPolicy := true\n");
    let guest = Files::new().measured(&text).guest().await;
    guest.create("c1", "sleep 61").await.unwrap();
}

#[tokio::test]
async fn evidence_needs_its_rule_which_may_ask_for_a_form_of_the_nonce() {
    /// With so many bytes the request is refused once it is let through, whatever machine this is.
    async fn ask(guest: &Guest, begin: &[u8]) -> (Code, String) {
        let report_data = begin.iter().copied().chain([0; 64]).collect();
        let request = kata_api::evidence::GetEvidenceRequest { report_data, ..Default::default() };
        code(guest.evidence.get_evidence(context(), &request).await)
    }
    let guest = Files::new().measured(ALLOWS).guest().await;
    let (denied, text) = ask(&guest, b"evidence").await;
    assert!(denied == Code::PERMISSION_DENIED && text.contains("agent_policy.GetEvidenceRequest"), "{text}");
    let rule = "GetEvidenceRequest if array.slice(input.report_data, 0, 8) == [101, 118, 105, 100, 101, 110, 99, 101]";
    let guest = Files::new().measured(&format!("{ALLOWS}{rule}\n")).guest().await;
    assert_eq!(ask(&guest, b"evidence").await.0, Code::INVALID_ARGUMENT);
    assert_eq!(ask(&guest, b"evidencf").await.0, Code::PERMISSION_DENIED);
}
