//! A registry that lies: an HTTP server whose answers a test writes.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::Made;
use kata_oci::Digest;

/// What is answered to a request.
pub enum Answer {
    /// These bytes.
    Bytes(Vec<u8>),
    /// A status with a line of headers, and nothing else.
    Status(&'static str, String),
    /// As many bytes as promised, but for the second half.
    Half(Vec<u8>),
    /// A promise, and then nothing.
    Stall,
    /// A byte now and then.
    Trickle,
}

type Answers = dyn Fn(&str) -> Answer + Send + Sync;

/// The server. Its threads end with the test.
pub struct Liar {
    pub port: u16,
    /// First lines and headers of all requests.
    pub seen: Arc<Mutex<String>>,
}

impl Liar {
    /// Answers each request by its path.
    pub fn start(answers: impl Fn(&str) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::new(Mutex::new(String::new()));
        let (answers, seen_by): (Arc<Answers>, _) = (Arc::new(answers), Arc::clone(&seen));
        thread::spawn(move || {
            for peer in listener.incoming() {
                let (answers, seen) = (Arc::clone(&answers), Arc::clone(&seen_by));
                // A peer that went away is none of the test's business.
                thread::spawn(move || drop(serve(peer.unwrap(), &*answers, &seen)));
            }
        });
        Self { port, seen }
    }

    pub fn name(&self, image: &str) -> String {
        format!("127.0.0.1:{}/{image}", self.port)
    }

    pub fn insecure(&self) -> String {
        format!("[registries.\"127.0.0.1:{}\"]\ninsecure = true\n", self.port)
    }
}

fn serve(peer: TcpStream, answers: &Answers, seen: &Mutex<String>) -> std::io::Result<()> {
    let mut requests = BufReader::new(peer.try_clone()?);
    let mut peer = peer;
    let mut request = String::new();
    while requests.read_line(&mut request)? > 2 {}
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    seen.lock().unwrap().push_str(&request);
    let ok =
        |length: usize| format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
    match answers(&path) {
        Answer::Bytes(bytes) => {
            peer.write_all(ok(bytes.len()).as_bytes())?;
            peer.write_all(&bytes)
        }
        Answer::Half(bytes) => {
            peer.write_all(ok(bytes.len()).as_bytes())?;
            peer.write_all(&bytes[..bytes.len() / 2])
        }
        Answer::Status(status, header) => {
            let text =
                format!("HTTP/1.1 {status}\r\nConnection: close\r\n{header}\r\nContent-Length: 0\r\n\r\n");
            peer.write_all(text.as_bytes())
        }
        Answer::Stall => {
            peer.write_all(ok(1000).as_bytes())?;
            thread::sleep(Duration::from_secs(60));
            Ok(())
        }
        Answer::Trickle => {
            peer.write_all(ok(1000).as_bytes())?;
            for _ in 0..600 {
                peer.write_all(b"x")?;
                thread::sleep(Duration::from_millis(100));
            }
            Ok(())
        }
    }
}

/// Serves `made` faithfully, but for blobs whose number `lie` has an answer for: layers from 0 up, then the configuration.
pub fn image(made: Made, lie: impl Fn(usize) -> Option<Answer> + Send + Sync + 'static) -> Liar {
    Liar::start(move |path| {
        if path == "/v2/" {
            return Answer::Bytes(b"{}".to_vec());
        }
        if path.contains("/manifests/") {
            return Answer::Bytes(made.manifest.clone());
        }
        let found = made.blobs.iter().position(|blob| path.ends_with(Digest::of(blob).hex()));
        match found {
            Some(index) => lie(index).unwrap_or_else(|| Answer::Bytes(made.blobs[index].clone())),
            None => Answer::Status("404 Not Found", "X: y".to_owned()),
        }
    })
}
