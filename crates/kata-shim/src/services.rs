//! What a pod's socket serves.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use kata_api::control_ttrpc::create_control;
use ttrpc::asynchronous::{MethodHandler, Server, Service, TtrpcContext};
use ttrpc::proto::{Request, Response};

use crate::containerd::sandboxer::SandboxService;
use crate::control::ControlService;
use crate::management::figures::CALLS;
use crate::reins::Reins;
use crate::slot::Slot;
use crate::spans;
use crate::task::TaskService;

/// The name that containerd before 2.0 calls the Task service by. Messages and methods are those of v3.
const TASK_V2: &str = "containerd.task.v2.Task";

/// The sandbox API, for a pod that it makes.
pub(crate) fn sandbox(service: SandboxService) -> HashMap<String, Service> {
    timed(create_sandbox(Arc::new(service)))
}

/// A server with the services that every pod in a `slot` has.
pub(crate) fn all(slot: Arc<Slot>, reins: &Reins) -> Server {
    let task = Arc::new(TaskService::new(slot.clone(), reins.clone()));
    let v3 = timed(create_task(task.clone()));
    let v2 = timed(create_task(task)).into_values().map(|service| (TASK_V2.to_owned(), service)).collect();
    let control = create_control(Arc::new(ControlService::new(slot, reins.clone())));
    Server::new().register_service(v3).register_service(v2).register_service(control)
}

/// Has each call counted with the time that it takes. Waiting for a process is none of this one's work.
fn timed(mut services: HashMap<String, Service>) -> HashMap<String, Service> {
    for service in services.values_mut() {
        let methods = std::mem::take(&mut service.methods);
        let timed = |(name, handler): (String, Handler)| {
            let handler: Handler = if name.starts_with("Wait") {
                handler
            } else {
                Box::new(Timed { name: name.clone(), handler })
            };
            (name, handler)
        };
        service.methods = methods.into_iter().map(timed).collect();
    }
    services
}

type Handler = Box<dyn MethodHandler + Send + Sync>;

struct Timed {
    name: String,
    handler: Handler,
}

#[async_trait]
impl MethodHandler for Timed {
    async fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let start = Instant::now();
        let tracer = spans::tracer();
        let parent = tracer.and_then(|_| context.metadata.get("traceparent")?.first().cloned());
        let answer = self.handler.handler(context, request).await;
        CALLS.record(&self.name, start.elapsed());
        if let Some(tracer) = tracer {
            let failed = answer.as_ref().map_or(true, |answer| answer.status().code() != ttrpc::Code::OK);
            tracer.call(&self.name, parent.as_deref(), start, failed);
        }
        answer
    }
}
