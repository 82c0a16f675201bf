//! Calls of the CRI over gRPC, for callers that wait: messages are rust-protobuf's, the transport is tonic's.

use std::marker::PhantomData;
use std::path::Path;
use std::time::Duration;

use bytes::{Buf, BufMut};
use protobuf::Message;
use tokio::runtime::Runtime;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::api;
use crate::host::patience;

/// A call that is not answered by then never will be.
const PATIENCE: Duration = Duration::from_secs(60);
/// The output of a command may come in one message: 16 MiB each of two streams.
const MAX_MESSAGE: usize = 33 << 20;

/// A connection to a runtime's CRI socket.
pub struct Client {
    runtime: Runtime,
    channel: Channel,
}

impl Client {
    /// Connects to the unix socket when the first call is made.
    pub fn new(socket: &Path) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
        let channel = {
            let _entered = runtime.enter();
            endpoint.timeout(patience(PATIENCE)).connect_lazy()
        };
        Self { runtime, channel }
    }

    /// `RuntimeService/<method>`.
    pub fn runtime<Q: Message, A: Message>(&self, method: &'static str, request: Q) -> Result<A, Status> {
        self.unary(&format!("/runtime.v1.RuntimeService/{method}"), request)
    }

    /// `ImageService/<method>`.
    pub fn image<Q: Message, A: Message>(&self, method: &'static str, request: Q) -> Result<A, Status> {
        self.unary(&format!("/runtime.v1.ImageService/{method}"), request)
    }

    fn grpc(&self) -> Grpc<Channel> {
        Grpc::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    fn unary<Q: Message, A: Message>(&self, path: &str, request: Q) -> Result<A, Status> {
        let path = PathAndQuery::try_from(path).unwrap();
        let mut grpc = self.grpc();
        self.runtime.block_on(async {
            grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
            Ok(grpc.unary(Request::new(request), path, Wire::default()).await?.into_inner())
        })
    }

    /// Hands each event of a container from now on to `take`, on a thread of the client's own, until it answers no.
    pub fn events(&self, mut take: impl FnMut(api::ContainerEventResponse) -> bool + Send + 'static) {
        let path = PathAndQuery::from_static("/runtime.v1.RuntimeService/GetContainerEvents");
        let mut grpc = self.grpc();
        self.runtime.spawn(async move {
            grpc.ready().await.unwrap();
            let request = Request::new(api::GetEventsRequest::new());
            let mut events =
                grpc.server_streaming(request, path, Wire::default()).await.unwrap().into_inner();
            while let Ok(Some(event)) = events.message().await {
                if !take(event) {
                    break;
                }
            }
        });
    }

    /// Runs a future of the caller's to its end beside the client's connection.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }
}

/// Messages as bytes.
struct Wire<Q, A>(PhantomData<(Q, A)>);

impl<Q, A> Default for Wire<Q, A> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<Q: Message, A: Message> Codec for Wire<Q, A> {
    type Encode = Q;
    type Decode = A;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self::default()
    }

    fn decoder(&mut self) -> Self {
        Self::default()
    }
}

impl<Q: Message, A: Message> Encoder for Wire<Q, A> {
    type Item = Q;
    type Error = Status;

    fn encode(&mut self, message: Q, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let bytes = message.write_to_bytes().map_err(|error| Status::internal(error.to_string()))?;
        into.put_slice(&bytes);
        Ok(())
    }
}

impl<Q: Message, A: Message> Decoder for Wire<Q, A> {
    type Item = A;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<A>, Status> {
        let bytes = from.copy_to_bytes(from.remaining());
        A::parse_from_bytes(&bytes).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}
