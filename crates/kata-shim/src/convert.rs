//! Between containerd's messages and the sandbox's nouns.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api::{CreateTaskRequest, Mount, StateResponse, Status as TaskStatus};
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use kata_sandbox::{ProcessId, ProcessState, RootfsMount, Status, Stdio};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;

use crate::fault;

pub(crate) fn process_id(container: String, exec: String) -> ProcessId {
    ProcessId { container, exec: Some(exec).filter(|exec| !exec.is_empty()) }
}

pub(crate) fn stdio(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> Stdio {
    let path = |text: &str| (!text.is_empty()).then(|| PathBuf::from(text));
    Stdio { stdin: path(stdin), stdout: path(stdout), stderr: path(stderr), terminal, lasting: false }
}

pub(crate) fn rootfs_mount(mount: Mount) -> RootfsMount {
    RootfsMount { fs_type: mount.type_, source: mount.source, target: mount.target, options: mount.options }
}

/// What is published once the container is there.
pub(crate) fn create_event(request: &CreateTaskRequest) -> TaskCreate {
    let io = TaskIO {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
        ..TaskIO::default()
    };
    TaskCreate {
        container_id: request.id.clone(),
        bundle: request.bundle.clone(),
        rootfs: request.rootfs.clone(),
        io: MessageField::some(io),
        pid: std::process::id(),
        ..TaskCreate::default()
    }
}

/// Part of an OCI spec, which containerd sends as JSON (typeurl, "application/json").
pub(crate) fn from_json<T: serde::de::DeserializeOwned>(what: &str, any: Option<&Any>) -> ttrpc::Result<T> {
    let any = any.ok_or_else(|| fault::invalid(format!("no {what} given")))?;
    serde_json::from_slice(&any.value)
        .map_err(|error| fault::invalid(format!("{what} ({}) is not valid: {error}", any.type_url)))
}

pub(crate) fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    MessageField::some(Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
        ..Timestamp::default()
    })
}

pub(crate) fn state_response(id: String, exec_id: String, state: ProcessState) -> StateResponse {
    let text = |path: Option<PathBuf>| {
        path.as_deref().map(Path::display).map(|path| path.to_string()).unwrap_or_default()
    };
    let status = match state.status {
        Status::Created => TaskStatus::CREATED,
        Status::Running => TaskStatus::RUNNING,
        Status::Paused => TaskStatus::PAUSED,
        Status::Stopped => TaskStatus::STOPPED,
    };
    StateResponse {
        id,
        exec_id,
        bundle: state.bundle.display().to_string(),
        pid: state.pid,
        status: status.into(),
        stdin: text(state.stdio.stdin),
        stdout: text(state.stdio.stdout),
        stderr: text(state.stdio.stderr),
        terminal: state.stdio.terminal,
        exit_status: state.exit.map_or(0, |exit| exit.code),
        exited_at: state.exit.map_or_else(MessageField::none, |exit| timestamp(exit.at)),
        ..StateResponse::default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use oci_spec::runtime::Process;

    use super::*;

    #[test]
    fn an_empty_exec_id_is_the_container_itself() {
        assert_eq!(process_id("c".into(), String::new()), ProcessId::init("c"));
        assert_eq!(process_id("c".into(), "e".into()), ProcessId::exec("c", "e"));
    }

    #[test]
    fn an_empty_path_is_no_stream() {
        let stdio = stdio("", "/run/out", "", true);
        assert_eq!((stdio.stdin, stdio.stdout, stdio.stderr), (None, Some("/run/out".into()), None));
    }

    #[test]
    fn times_keep_their_nanoseconds_and_never_wrap() {
        let time = timestamp(UNIX_EPOCH + Duration::new(5, 7));
        assert_eq!((time.seconds, time.nanos), (5, 7));
        assert_eq!(timestamp(UNIX_EPOCH - Duration::from_secs(1)).seconds, 0);
    }

    #[test]
    fn a_process_is_read_from_json_and_a_broken_one_is_refused() {
        let any = |value: &str| Any { value: value.into(), type_url: "u".into(), ..Any::default() };
        let json = r#"{"cwd":"/","user":{"uid":0,"gid":0},"args":["id"]}"#;
        let process: Process = from_json("process", Some(&any(json))).unwrap();
        assert_eq!(process.args().as_deref(), Some(["id".to_owned()].as_slice()));
        for refused in [None, Some(&any("{")), Some(&any(""))] {
            let ttrpc::Error::RpcStatus(status) = from_json::<Process>("process", refused).unwrap_err()
            else {
                panic!("not a status");
            };
            assert_eq!(status.code(), ttrpc::Code::INVALID_ARGUMENT);
            assert!(status.message().contains("process"), "{}", status.message());
        }
    }

    #[test]
    fn a_stopped_process_tells_how_it_ended() {
        let at = UNIX_EPOCH + Duration::from_secs(9);
        let state = ProcessState {
            status: Status::Stopped,
            pid: 3,
            stdio: Stdio::default(),
            exit: Some(kata_sandbox::Exit { code: 7, at }),
            bundle: "/b".into(),
        };
        let response = state_response("c".into(), "e".into(), state);
        assert_eq!(response.status.enum_value(), Ok(TaskStatus::STOPPED));
        assert_eq!(
            (response.exit_status, response.exited_at.seconds, response.bundle.as_str()),
            (7, 9, "/b")
        );
    }
}
