use proptest::prelude::*;
use tokio::io::AsyncReadExt;

use super::*;

const BOUND: Duration = Duration::from_secs(5);
const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}"#;

/// The other end of a connection, which the test plays.
struct Peer(BufReader<UnixStream>);

impl Peer {
    async fn say(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).await.unwrap();
    }

    async fn hear(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap()
    }

    async fn accept(&mut self) {
        self.say(&format!("{GREETING}\n")).await;
        let id = self.hear().await["id"].clone();
        self.say(&format!("{{\"return\": {{}}, \"id\": {id}}}\n")).await;
    }
}

async fn pair() -> (Qmp, broadcast::Receiver<Event>, Peer) {
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
