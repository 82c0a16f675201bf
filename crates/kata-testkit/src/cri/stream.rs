//! Streams of the CRI: what `kubectl exec`, `attach` and `port-forward` do, over a WebSocket.
//!
//! The runtime answers a request with a URL; each binary message there begins with the number of its channel:
//!
//! | channel | exec, attach | port-forward of one port |
//! |---|---|---|
//! | 0 | standard input | the connection's bytes, after two with the port's number |
//! | 1 | standard output | what went wrong, after the same |
//! | 2 | standard error | |
//! | 3 | how it ended, as JSON | |
//! | 4 | size of the terminal, as JSON | |

use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tungstenite::client::IntoClientRequest;
use tungstenite::http::HeaderValue;
use tungstenite::{Message, WebSocket};

use super::{Container, Cri, Pod, api};
use crate::host::patience;

/// With [`patience`].
const PATIENCE: Duration = Duration::from_secs(20);
const PROTOCOL: &str = "v4.channel.k8s.io";
const STATUS: usize = 3;
const RESIZE: u8 = 4;

/// A connection of a client to a process, or to a port of a pod.
pub struct Stream {
    socket: WebSocket<TcpStream>,
    received: [Vec<u8>; 5],
    /// Whether the other side has closed it.
    over: bool,
}

impl Stream {
    fn open(cri: &Cri, url: &str) -> Self {
        let address = url.trim_start_matches("http://").split('/').next().unwrap_or_default().to_owned();
        let tcp = cri.containerd().on_its_host(|| TcpStream::connect(address)).unwrap();
        tcp.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let mut request = url.replacen("http", "ws", 1).into_client_request().unwrap();
        request.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static(PROTOCOL));
        let mut shaking = tungstenite::client(request, tcp);
        let begin = Instant::now();
        loop {
            match shaking {
                Ok((socket, _)) => return Self { socket, received: Default::default(), over: false },
                Err(tungstenite::HandshakeError::Interrupted(again))
                    if begin.elapsed() < patience(PATIENCE) =>
                {
                    shaking = again.handshake();
                }
                Err(error) => panic!("{url}: {error}"),
            }
        }
    }

    /// Sends to a channel.
    pub fn send_to(&mut self, channel: u8, bytes: &[u8]) {
        self.socket.send(Message::binary([&[channel], bytes].concat())).unwrap();
    }

    /// Types into standard input, or sends to the port.
    pub fn send(&mut self, text: &str) {
        self.send_to(0, text.as_bytes());
    }

    /// Sets the size of the terminal.
    pub fn resize(&mut self, rows: u16, columns: u16) {
        self.send_to(RESIZE, json!({"Height": rows, "Width": columns}).to_string().as_bytes());
    }

    /// Takes one message, if one comes soon.
    fn receive(&mut self) {
        match self.socket.read() {
            Ok(Message::Binary(bytes)) => {
                let Some((channel, content)) = bytes.split_first() else { return };
                self.received[usize::from(*channel)].extend(content);
            }
            Ok(Message::Close(_)) => self.over = true,
            Ok(_) => {}
            Err(tungstenite::Error::Io(error))
                if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(_) => self.over = true,
        }
    }

    /// What has come on a channel so far.
    pub fn received(&self, channel: usize) -> String {
        String::from_utf8_lossy(&self.received[channel]).into_owned()
    }

    /// Waits until a channel has said `text`; answers all that it has said.
    #[track_caller]
    pub fn wait_for(&mut self, channel: usize, text: &str) -> String {
        let begin = Instant::now();
        while !self.received(channel).contains(text) {
            assert!(!self.over && begin.elapsed() < patience(PATIENCE), "no {text:?} in {:?}", self.texts());
            self.receive();
        }
        self.received(channel)
    }

    /// Types the same until a channel has said `answer`. What a process says in the moment between its input's connection and its
    /// output's goes to nobody.
    #[track_caller]
    pub fn repeat(&mut self, text: &str, channel: usize, answer: &str) {
        let begin = Instant::now();
        while !self.received(channel).contains(answer) {
            assert!(
                !self.over && begin.elapsed() < patience(PATIENCE),
                "no {answer:?} in {:?}",
                self.texts()
            );
            self.send(text);
            let sent = Instant::now();
            while !self.received(channel).contains(answer) && sent.elapsed() < Duration::from_secs(2) {
                self.receive();
            }
        }
    }

    fn texts(&self) -> Vec<String> {
        (0..self.received.len()).map(|channel| self.received(channel)).collect()
    }

    /// Waits for the end of the process; answers how it ended, as Kubernetes' `Status` (JSON).
    #[track_caller]
    pub fn wait(&mut self) -> Value {
        let begin = Instant::now();
        while !self.over {
            assert!(begin.elapsed() < patience(PATIENCE), "no end; {:?}", self.texts());
            self.receive();
        }
        serde_json::from_slice(&self.received[STATUS]).unwrap_or_default()
    }

    /// Goes away without a word.
    pub fn close(mut self) {
        let _ = self.socket.close(None);
        let _ = self.socket.flush();
    }
}

impl Container<'_> {
    /// Runs a command with all its streams, as `kubectl exec -i` does; with `tty` as `-it`.
    #[track_caller]
    pub fn exec_stream(&self, words: &[&str], tty: bool) -> Stream {
        let mut request = api::ExecRequest::new();
        self.id().clone_into(&mut request.container_id);
        request.cmd = words.iter().map(|word| (*word).to_owned()).collect();
        (request.tty, request.stdin, request.stdout, request.stderr) = (tty, true, true, !tty);
        let answer: api::ExecResponse = self.cri().client().runtime("Exec", request).unwrap();
        Stream::open(self.cri(), &answer.url)
    }

    /// Connects to the streams of its own process.
    #[track_caller]
    pub fn attach(&self, tty: bool) -> Stream {
        let mut request = api::AttachRequest::new();
        self.id().clone_into(&mut request.container_id);
        (request.tty, request.stdin, request.stdout, request.stderr) = (tty, true, true, !tty);
        let answer: api::AttachResponse = self.cri().client().runtime("Attach", request).unwrap();
        Stream::open(self.cri(), &answer.url)
    }
}

impl Pod<'_> {
    /// Connects to a port of the pod, as `kubectl port-forward` does.
    #[track_caller]
    pub fn forward(&self, port: u16) -> Stream {
        let mut request = api::PortForwardRequest::new();
        self.id().clone_into(&mut request.pod_sandbox_id);
        request.port = vec![port.into()];
        let answer: api::PortForwardResponse = self.cri().client().runtime("PortForward", request).unwrap();
        Stream::open(self.cri(), &answer.url)
    }
}
