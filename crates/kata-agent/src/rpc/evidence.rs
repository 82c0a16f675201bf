//! What the hardware says of the machine, for whoever asks the host for it.

use std::path::PathBuf;
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
    root: PathBuf,
    turn: Arc<Mutex<()>>,
    request: GetEvidenceRequest,
) -> Result<GetEvidenceResponse, RpcError> {
    let turn = turn.lock_owned().await;
    let asked = aside::within(aside::BOUND, "the report of the hardware", move || {
        let _turn = turn;
        ask(&root, &request.report_data)
    });
    let found = asked.await??;
    Ok(GetEvidenceResponse {
        provider: found.provider,
        report: found.report,
        certificates: found.certificates,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use ttrpc::Code;

    use super::*;

    /// The answer of a guest with this device of the platform, whose processor has these flags, and a kernel without reports.
    async fn refusal(device: &str, flags: &str) -> (Code, String) {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("sys/devices/platform").join(device)).unwrap();
        std::fs::create_dir(root.path().join("proc")).unwrap();
        std::fs::write(root.path().join("proc/cpuinfo"), format!("flags\t: {flags}\n")).unwrap();
        let error = get(root.path().into(), Arc::default(), GetEvidenceRequest::new()).await.unwrap_err();
        (error.code(), crate::chain(&error))
    }

    #[tokio::test]
    async fn guest_that_cannot_report_says_what_it_lacks() {
        let (code, text) = refusal("", "fpu").await;
        assert!(code == Code::UNIMPLEMENTED && text.contains("no hardware that reports"), "{code:?} {text}");
        for (device, flags) in [("", "fpu tdx_guest"), ("sev-guest", "fpu")] {
            let (code, text) = refusal(device, flags).await;
            assert!(code == Code::UNIMPLEMENTED && text.contains("configfs-tsm"), "{code:?} {text}");
        }
    }

    #[tokio::test]
    async fn who_asks_waits_for_who_asked_before() {
        let turn = Arc::<Mutex<()>>::default();
        let held = turn.clone().lock_owned().await;
        let asked = tokio::spawn(get("/none".into(), turn, GetEvidenceRequest::new()));
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        assert!(!asked.is_finished());
        drop(held);
        assert_eq!(asked.await.unwrap().unwrap_err().code(), Code::INTERNAL);
    }
}
