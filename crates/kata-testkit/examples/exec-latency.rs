//! How long the agent of a running pod takes from an exec request to the first byte of output, beside what the same
//! path costs with nothing in it: round trips over vsock, and fork and exec in the guest.
//!
//! `exec-latency RUN_DIR POD COUNT` prints one JSON object with microseconds: `exec`, `round_trip`, `fork_exec`.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_precision_loss,
    reason = "a measurement fails by panicking"
)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kata_api::agent::{ExecProcessRequest, WaitProcessRequest};
use kata_api::agent_ttrpc::AgentServiceClient;
use kata_api::{oci, ports};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use ttrpc::asynchronous::{Client, transport::Socket};
use ttrpc::context::{self, Context};

/// Programs that the shell starts one after the other to find what one costs.
const FORKS: u32 = 50;

struct Pod {
    socket: PathBuf,
    container: String,
    agent: AgentServiceClient,
    next: u32,
}

impl Pod {
    async fn connect(run_dir: &Path, container: &str) -> Self {
        let socket = run_dir.join(container).join("kata.hvsock");
        let (stream, _) = dial(&socket, ports::AGENT).await;
        let agent = AgentServiceClient::new(Client::new(Socket::new(stream)));
        Self { socket, container: container.to_owned(), agent, next: 0 }
    }

    /// Time from the request to the first byte, for a command that prints at once; the command's whole time is second.
    async fn exec(&mut self, args: &[&str]) -> (Duration, Duration) {
        let (mut output, port) = dial(&self.socket, ports::STREAM).await;
        self.next += 1;
        let mut process = oci::Process::new();
        process.args = args.iter().map(ToString::to_string).collect();
        process.env = vec!["PATH=/bin".to_owned()];
        process.cwd = "/".to_owned();
        process.user = Some(oci::User::new()).into();
        let mut request = ExecProcessRequest::new();
        request.container_id.clone_from(&self.container);
        request.exec_id = format!("latency-{}", self.next);
        request.process = Some(process).into();
        request.stdout_port = port;
        let mut wait = WaitProcessRequest::new();
        wait.container_id.clone_from(&request.container_id);
        wait.exec_id.clone_from(&request.exec_id);

        let begin = Instant::now();
        let answer = self.agent.exec_process(bound(), &request);
        let first = async {
            output.read_u8().await.unwrap();
            begin.elapsed()
        };
        let (answer, first) = tokio::join!(answer, first);
        answer.unwrap();
        self.agent.wait_process(bound(), &wait).await.unwrap();
        (first, begin.elapsed())
    }

    /// Round trip of a connection's handshake with the guest's kernel and agent.
    async fn round_trip(&self) -> Duration {
        let begin = Instant::now();
        drop(dial(&self.socket, ports::STREAM).await);
        begin.elapsed()
    }
}

fn bound() -> Context {
    context::with_timeout(Duration::from_secs(20).as_nanos().try_into().unwrap())
}

/// A stream to a guest port, and the port that the guest sees at its other end.
async fn dial(socket: &Path, port: u32) -> (UnixStream, u32) {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await.unwrap();
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        line.push(stream.read_u8().await.unwrap());
    }
    let text = String::from_utf8(line).unwrap();
    (stream, text.trim().strip_prefix("OK ").unwrap().parse().unwrap())
}

fn median(mut samples: Vec<Duration>) -> f64 {
    samples.sort();
    samples.get(samples.len() / 2).unwrap().as_secs_f64() * 1e6
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [run_dir, name, count] = words.as_slice() else { panic!("usage: exec-latency RUN_DIR POD COUNT") };
    let count: usize = count.parse().unwrap();
    let mut pod = Pod::connect(Path::new(run_dir), name).await;
    let none = "i=0; while [ $i -lt 50 ]; do :; i=$((i+1)); done; echo";
    let all = "i=0; while [ $i -lt 50 ]; do /bin/busybox true; i=$((i+1)); done; echo";
    let (mut exec, mut trips, mut forks) = (vec![], vec![], vec![]);
    for run in 0..=count {
        let (first, _) = pod.exec(&["echo"]).await;
        let trip = pod.round_trip().await;
        let (_, with) = pod.exec(&["sh", "-c", all]).await;
        let (_, without) = pod.exec(&["sh", "-c", none]).await;
        if run > 0 {
            exec.push(first);
            trips.push(trip);
            forks.push(with.saturating_sub(without) / FORKS);
        }
    }
    println!(
        "{}",
        serde_json::json!({ "exec": median(exec), "round_trip": median(trips), "fork_exec": median(forks) })
    );
}
