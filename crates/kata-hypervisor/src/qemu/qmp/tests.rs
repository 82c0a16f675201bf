//! Against a peer that the test plays; [`pair`] and [`Peer`] serve the tests of what is above the protocol too.

use proptest::prelude::*;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::AsyncReadExt;

use super::*;

pub(in crate::qemu) const BOUND: Duration = Duration::from_secs(5);
const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}"#;

/// The other end of a connection, which the test plays.
pub(in crate::qemu) struct Peer(BufReader<UnixStream>);

impl Peer {
    pub(in crate::qemu) async fn say(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).await.unwrap();
    }

    async fn hear(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// Like [`Peer::hear`], with the descriptors that came along. Nothing else may be under way.
    pub(in crate::qemu) async fn hear_with_fds(&mut self) -> (Value, Vec<OwnedFd>) {
        let stream = self.0.get_ref();
        let mut line = vec![0; 4096];
        let receive = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let into = &mut [io::IoSliceMut::new(&mut line)];
            let length = recvmsg(stream, into, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
            let fds = control.drain().flat_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
                _ => Vec::new(),
            });
            Ok((length, fds.collect()))
        };
        let (length, fds) = stream.async_io(Interest::READABLE, receive).await.unwrap();
        assert!(line[..length].ends_with(b"\n"));
        (serde_json::from_slice(&line[..length]).unwrap(), fds)
    }

    /// Answers what was heard with an empty object.
    pub(in crate::qemu) async fn agree(&mut self, heard: &Value) {
        self.say(&format!("{{\"return\": {{}}, \"id\": {}}}\n", heard["id"])).await;
    }

    async fn accept(&mut self) {
        self.say(&format!("{GREETING}\n")).await;
        let id = self.hear().await["id"].clone();
        self.say(&format!("{{\"return\": {{}}, \"id\": {id}}}\n")).await;
    }
}

pub(in crate::qemu) async fn pair() -> (Qmp, broadcast::Receiver<Event>, Peer) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer(BufReader::new(theirs));
    let (connected, ()) = tokio::join!(Qmp::connect(ours, BOUND), peer.accept());
    let (qmp, events) = connected.unwrap();
    (qmp, events, peer)
}

#[tokio::test]
async fn answers_reach_their_callers_in_any_order() {
    let (qmp, _events, mut peer) = pair().await;
    let play = async {
        let (first, second) = (peer.hear().await, peer.hear().await);
        for command in [second, first] {
            peer.say(&format!("{{\"return\": {}, \"id\": {}}}\n", command["execute"], command["id"])).await;
        }
    };
    let (a, b, ()) =
        tokio::join!(qmp.execute("a", Value::Null, BOUND), qmp.execute("b", Value::Null, BOUND), play);
    assert_eq!((a.unwrap(), b.unwrap()), (json!("a"), json!("b")));
}

#[tokio::test]
async fn arguments_are_sent_as_given_and_absent_without() {
    let (qmp, _events, mut peer) = pair().await;
    let (_, heard) = tokio::join!(qmp.execute("a", json!({"x": 1}), Duration::from_millis(20)), peer.hear());
    assert_eq!(heard["arguments"], json!({"x": 1}));
    let (_, heard) = tokio::join!(qmp.execute("b", Value::Null, Duration::from_millis(20)), peer.hear());
    assert!(heard.get("arguments").is_none());
}

#[tokio::test]
async fn refusal_names_the_command_and_qemus_reason() {
    let (qmp, _events, mut peer) = pair().await;
    let play = async {
        let id = peer.hear().await["id"].clone();
        peer.say(&format!(
            "{{\"error\": {{\"class\": \"GenericError\", \"desc\": \"no such device\"}}, \"id\": {id}}}\n"
        ))
        .await;
    };
    let (answer, ()) = tokio::join!(qmp.execute("device_del", Value::Null, BOUND), play);
    assert_eq!(
        answer.unwrap_err().to_string(),
        r#"QEMU refused "device_del": no such device (GenericError)"#
    );
}

#[tokio::test]
async fn silence_is_a_timeout_and_the_late_answer_goes_to_nobody() {
    let (qmp, _events, mut peer) = pair().await;
    let (silent, late) =
        tokio::join!(qmp.execute("stop", Value::Null, Duration::from_millis(20)), peer.hear());
    assert!(matches!(silent.unwrap_err(), QmpError::Timeout { command, .. } if command == "stop"));
    peer.say(&format!("{{\"return\": \"late\", \"id\": {}}}\n", late["id"])).await;
    let play = async {
        let id = peer.hear().await["id"].clone();
        peer.say(&format!("{{\"return\": \"mine\", \"id\": {id}}}\n")).await;
    };
    let (answer, ()) = tokio::join!(qmp.execute("cont", Value::Null, BOUND), play);
    assert_eq!(answer.unwrap(), json!("mine"));
    assert!(qmp.0.waiting.lock().as_ref().unwrap().is_empty());
}

#[tokio::test]
async fn end_of_the_socket_answers_everybody_now_and_later() {
    let (qmp, mut events, peer) = pair().await;
    let (now, ()) = tokio::join!(qmp.execute("stop", Value::Null, BOUND), async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(peer);
    });
    assert!(matches!(now.unwrap_err(), QmpError::Closed { command } if command == "stop"));
    assert!(matches!(qmp.execute("cont", Value::Null, BOUND).await.unwrap_err(), QmpError::Closed { .. }));
    assert!(matches!(events.recv().await, Err(broadcast::error::RecvError::Closed)));
}

#[tokio::test]
async fn events_reach_every_subscriber_and_unknown_ones_nobody() {
    let (_qmp, mut first, mut peer) = pair().await;
    let mut second = first.resubscribe();
    peer.say("{\"timestamp\": {}, \"event\": \"RTC_CHANGE\", \"data\": {\"offset\": 1}}\n").await;
    peer.say("{\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true, \"reason\": \"guest-reset\"}}\n").await;
    peer.say("{\"event\": \"STOP\"}\n").await;
    for events in [&mut first, &mut second] {
        assert_eq!(events.recv().await.unwrap(), Event::Shutdown { reason: "guest-reset".to_owned() });
        assert_eq!(events.recv().await.unwrap(), Event::Stop);
    }
}

#[tokio::test]
async fn deleted_devices_are_told_by_name_and_their_parts_not_at_all() {
    let (qmp, mut events, mut peer) = pair().await;
    let mut later = qmp.subscribe();
    let part = "/machine/peripheral/disk1/virtio-backend";
    peer.say(&format!("{{\"event\": \"DEVICE_DELETED\", \"data\": {{\"path\": \"{part}\"}}}}\n")).await;
    peer.say("{\"event\": \"DEVICE_DELETED\", \"data\": {\"device\": \"disk1\", \"path\": \"/\"}}\n").await;
    for events in [&mut events, &mut later] {
        assert_eq!(events.recv().await.unwrap(), Event::DeviceDeleted { device: "disk1".to_owned() });
    }
}

#[tokio::test]
async fn who_subscribes_after_the_end_learns_of_it() {
    let (qmp, mut events, peer) = pair().await;
    drop(peer);
    assert!(matches!(events.recv().await, Err(broadcast::error::RecvError::Closed)));
    assert!(matches!(qmp.subscribe().recv().await, Err(broadcast::error::RecvError::Closed)));
}

#[tokio::test]
async fn descriptor_goes_along_with_its_own_command_and_is_closed_here() {
    let (qmp, _events, mut peer) = pair().await;
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let play = async {
        let (heard, fds) = peer.hear_with_fds().await;
        assert_eq!((heard["execute"].as_str(), fds.len()), (Some("getfd"), 1));
        peer.agree(&heard).await;
        let (heard, none) = peer.hear_with_fds().await;
        peer.agree(&heard).await;
        assert!(none.is_empty());
        fds
    };
    let ask = async {
        qmp.execute_with("getfd", json!({"fdname": "a"}), Some(theirs.into()), BOUND).await.unwrap();
        qmp.execute("stop", Value::Null, BOUND).await.unwrap();
    };
    let (fds, ()) = tokio::join!(play, ask);
    ours.set_read_timeout(Some(BOUND)).unwrap();
    drop(fds);
    // The last copy is gone: the other end says so.
    assert_eq!(std::io::Read::read(&mut &ours, &mut [0]).unwrap(), 0);
}

#[tokio::test]
async fn garbage_and_oversized_lines_are_skipped() {
    let (qmp, _events, mut peer) = pair().await;
    let play = async {
        let id = peer.hear().await["id"].clone();
        peer.say("no json\n\n{\"return\": 1}\n{\"return\": 1, \"id\": 99999}\n").await;
        peer.say(&format!("{{\"return\": \"{}\", \"id\": {id}}}\n", "x".repeat(LINE_LIMIT))).await;
        peer.say(&format!("{{\"return\": \"right\", \"id\": {id}}}\r\n")).await;
    };
    let (answer, ()) = tokio::join!(qmp.execute("query-status", Value::Null, BOUND), play);
    assert_eq!(answer.unwrap(), json!("right"));
}

#[tokio::test]
async fn peer_that_does_not_speak_qmp_is_told_apart_from_a_silent_and_a_closed_one() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"220 mail.example.org ESMTP\n").await.unwrap();
    let error = Qmp::connect(ours, BOUND).await.unwrap_err();
    assert!(matches!(error, QmpError::NotQmp { said } if said.starts_with("220 mail")));

    let (ours, _silent) = UnixStream::pair().unwrap();
    let error = Qmp::connect(ours, Duration::from_millis(20)).await.unwrap_err();
    assert!(matches!(error, QmpError::Timeout { command, .. } if command == "greeting"));

    let (ours, closed) = UnixStream::pair().unwrap();
    drop(closed);
    let error = Qmp::connect(ours, BOUND).await.unwrap_err();
    assert!(matches!(error, QmpError::Closed { command } if command == "greeting"));
}

#[tokio::test]
async fn dropping_the_client_closes_the_socket() {
    let (qmp, _events, mut peer) = pair().await;
    drop(qmp);
    // The write half goes with the last handle, and with it the peer's input ends.
    let mut rest = Vec::new();
    tokio::time::timeout(BOUND, peer.0.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert!(rest.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// However the bytes are cut up and whatever stands between, the answer arrives.
    #[test]
    fn answer_survives_any_noise_and_any_chunking(
        noise in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..8),
        cuts in proptest::collection::vec(1_usize..64, 1..32),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (qmp, _events, mut peer) = pair().await;
            let play = async {
                let id = peer.hear().await["id"].clone();
                let mut bytes = Vec::new();
                for line in noise {
                    bytes.extend(line.into_iter().filter(|byte| *byte != b'\n'));
                    bytes.push(b'\n');
                }
                bytes.extend(format!("{{\"return\": 42, \"id\": {id}}}\n").bytes());
                let mut rest = bytes.as_slice();
                for cut in cuts.iter().cycle() {
                    let (now, later) = rest.split_at((*cut).min(rest.len()));
                    peer.0.write_all(now).await.unwrap();
                    tokio::task::yield_now().await;
                    rest = later;
                    if rest.is_empty() { break }
                }
            };
            let (answer, ()) = tokio::join!(qmp.execute("query-status", Value::Null, BOUND), play);
            assert_eq!(answer.unwrap(), json!(42));
        });
    }
}
