//! The services beside that of the agent.

use async_trait::async_trait;
use kata_api::evidence::{GetEvidenceRequest, GetEvidenceResponse};
use kata_api::evidence_ttrpc::Evidence;
use kata_api::files::{RemoveRequest, RemoveResponse};
use kata_api::files_ttrpc::Files;
use kata_api::health::{CheckRequest, HealthCheckResponse, VersionCheckResponse};
use kata_api::health_ttrpc::Health;
use ttrpc::r#async::TtrpcContext;

use super::Service;

#[async_trait]
impl Files for Service {
    async fn remove(&self, _: &TtrpcContext, request: RemoveRequest) -> ttrpc::Result<RemoveResponse> {
        self.enter("Remove")?.removed.lock().unwrap().push(request.path);
        Ok(RemoveResponse::new())
    }
}

#[async_trait]
impl Evidence for Service {
    /// A report with nothing in it but what was to be in it.
    async fn get_evidence(
        &self,
        _: &TtrpcContext,
        request: GetEvidenceRequest,
    ) -> ttrpc::Result<GetEvidenceResponse> {
        self.enter("GetEvidence")?;
        let (provider, report) = ("sev_\u{1b}guest".to_owned(), request.report_data);
        Ok(GetEvidenceResponse { provider, report, certificates: b"certs".to_vec(), ..Default::default() })
    }
}

#[async_trait]
impl Health for Service {
    async fn check(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<HealthCheckResponse> {
        let hangs = self.enter("Check")?.script.lock().unwrap().hang_check;
        if hangs {
            std::future::pending::<()>().await;
        }
        Ok(HealthCheckResponse::new())
    }

    async fn version(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<VersionCheckResponse> {
        self.enter("Version")?;
        Ok(VersionCheckResponse { agent_version: "0.0.0-fake".to_owned(), ..Default::default() })
    }
}
