//! `delete`: containerd's last resort for a container whose owner it cannot reach any more.
//!
//! A pod's first container stands for the pod, and takes all of it along. A further container of a pod is deleted by the
//! pod's owner where that lives; where it died, the pod is over, and whoever is called first cleans up. An owner that lives and
//! does not answer is ended for the pod's sake alone, never for that of one container.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::{DeleteRequest, DeleteResponse, KillRequest, WaitRequest};
use containerd_shim_protos::shim_async::TaskClient;
use kata_sandbox::State;
use protobuf::Message;
use thiserror::Error;
use ttrpc::asynchronous::Client;

use super::bundle::{Bundle, BundleError};
use super::invocation::Invocation;
use crate::convert::timestamp;
use crate::delete::{self, DeleteError, Presence};
use crate::ground::Ground;

/// The exit code of a container whose owner died: as if killed by SIGKILL.
const KILLED: u32 = 128 + 9;
/// Bound on each request to an owner that answers.
const BOUND: Duration = Duration::from_secs(10);

#[derive(Debug, Error)]
pub(crate) enum CleanupError {
    #[error(transparent)]
    Bundle(BundleError),
    #[error("cannot clean up in pod {pod}")]
    Pod { pod: String, source: DeleteError },
    #[error("the owner of pod {pod} does not remove container {container}")]
    Container { pod: String, container: String, source: Box<ttrpc::Error> },
    #[error("cannot ask the owner of pod {pod}")]
    Ask { pod: String, source: io::Error },
    #[error("cannot answer containerd")]
    Answer(#[source] io::Error),
}

/// Cleans up and answers how the container ended.
pub(crate) fn run(call: &Invocation) -> Result<(), CleanupError> {
    let dir = call.bundle.clone().or_else(|| std::env::current_dir().ok()).unwrap_or_default();
    let pod = pod_of(&dir).map_err(CleanupError::Bundle)?.unwrap_or_else(|| call.id.clone());
    let ground = Ground::of(&pod);
    let owner = State::load(&ground.run_dir).ok().map_or(0, |state| state.owner_pid);
    if !ground.is_of(&call.namespace) {
        // Of another namespace, or of nobody who calls this way: a name in common is no reason to end it.
        tracing::debug!(pod, "not this namespace's");
    } else if pod == call.id {
        delete::delete(&ground).map_err(|source| CleanupError::Pod { pod, source })?;
    } else {
        match delete::presence(&ground) {
            Presence::Answers => remove_container(&ground, &pod, &call.id)?,
            Presence::Silent => return Err(CleanupError::Pod { pod, source: DeleteError::Silent }),
            Presence::Gone => delete::delete(&ground).map_err(|source| CleanupError::Pod { pod, source })?,
        }
    }
    let response = DeleteResponse {
        pid: owner,
        exit_status: KILLED,
        exited_at: timestamp(SystemTime::now()),
        ..DeleteResponse::default()
    };
    let bytes = response.write_to_bytes().map_err(io::Error::other);
    bytes.and_then(|bytes| io::stdout().write_all(&bytes)).map_err(CleanupError::Answer)
}

/// The pod that the bundle's container joined. A bundle that is gone or broken belongs to none; one that names a pod that
/// cannot be is nothing to clean up after.
fn pod_of(dir: &std::path::Path) -> Result<Option<String>, BundleError> {
    match Bundle::read(dir) {
        Ok(bundle) => Ok(bundle.pod()?.map(str::to_owned)),
        Err(_) => Ok(None),
    }
}

fn remove_container(ground: &Ground, pod: &str, container: &str) -> Result<(), CleanupError> {
    let ask = |source| CleanupError::Ask { pod: pod.to_owned(), source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ask)?;
    let socket: PathBuf = ground.socket();
    runtime.block_on(async {
        let client = Client::connect(&format!("unix://{}", socket.display())).await;
        let task = TaskClient::new(client.map_err(|error| ask(io::Error::other(error)))?);
        let refused = |source| CleanupError::Container {
            pod: pod.to_owned(),
            container: container.to_owned(),
            source: Box::new(source),
        };
        let bound = || ttrpc::context::with_duration(BOUND);
        let id = container.to_owned();
        let kill = KillRequest { id: id.clone(), signal: 9, all: true, ..KillRequest::default() };
        // What is not there, or has ended, needs no killing.
        if task.kill(bound(), &kill).await.is_ok() {
            let wait = WaitRequest { id: id.clone(), ..WaitRequest::default() };
            task.wait(bound(), &wait).await.map_err(refused)?;
        }
        match task.delete(bound(), &DeleteRequest { id, ..DeleteRequest::default() }).await {
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::NOT_FOUND => Ok(()),
            other => other.map(drop).map_err(refused),
        }
    })
}
