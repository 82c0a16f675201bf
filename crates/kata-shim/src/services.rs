//! What a pod's socket serves.

use std::sync::Arc;

use containerd_shim_protos::shim_async::create_task;
use kata_api::control_ttrpc::create_control;
use ttrpc::asynchronous::Server;

use crate::control::ControlService;
use crate::reins::Reins;
use crate::slot::Slot;
use crate::task::TaskService;

/// The name that containerd before 2.0 calls the Task service by. Messages and methods are those of v3.
const TASK_V2: &str = "containerd.task.v2.Task";

/// A server with all services of the pod in `slot`.
pub(crate) fn all(slot: Arc<Slot>, reins: &Reins) -> Server {
    let task = Arc::new(TaskService::new(slot.clone(), reins.clone()));
    let v3 = create_task(task.clone());
    let v2 = create_task(task).into_values().map(|service| (TASK_V2.to_owned(), service)).collect();
    let control = create_control(Arc::new(ControlService::new(slot, reins.clone())));
    Server::new().register_service(v3).register_service(v2).register_service(control)
}
