//! What the hardware says of the machine, for whoever asks the host for it.

use std::path::Path;
use std::sync::Arc;

use kata_api::evidence::{GetEvidenceRequest, GetEvidenceResponse};
use kata_evidence::ask;
use tokio::sync::Mutex;

use super::error::RpcError;
use crate::aside;

/// Has the hardware of the guest whose root is `root` report. One waits for it at a time, also where a caller no longer does.
///
/// # Errors
/// What the guest lacks, and what the hardware refuses.
pub async fn get(
    root: &'static Path,
    turn: Arc<Mutex<()>>,
    request: GetEvidenceRequest,
) -> Result<GetEvidenceResponse, RpcError> {
    let turn = turn.lock_owned().await;
    let asked = aside::within(aside::BOUND, "the report of the hardware", move || {
        let _turn = turn;
        ask(root, &request.report_data)
    });
    let found = asked.await??;
    Ok(GetEvidenceResponse {
        provider: found.provider,
        report: found.report,
        certificates: found.certificates,
        ..Default::default()
    })
}
