use std::io::{IoSlice, Read, Write};
use std::thread::{JoinHandle, spawn};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, sendmsg};
use vmm_sys_util::eventfd::EventFd;

use super::*;

/// Carries nothing out, and keeps what it was told.
struct Recorder {
    told: Vec<(Command, usize)>,
    event: EventFd,
    end: Option<(EndReason, String)>,
}

impl Recorder {
    fn new() -> Self {
        Self { told: Vec::new(), event: EventFd::new(0).unwrap(), end: None }
    }
}

impl Monitor for Recorder {
    fn execute(
        &mut self,
        command: Command,
        descriptors: Vec<OwnedFd>,
        client: Client<'_>,
    ) -> Result<Answer, Failure> {
        self.told.push((command.clone(), descriptors.len()));
        match command {
            // As one that waits for the guest.
            Command::Resize(_) => {
                while !client.is_gone() {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                Ok(Answer::Nothing)
            }
            Command::Pause => {
                Err(Failure { kind: FailureKind::WrongState, message: "there is no machine".to_owned() })
            }
            Command::Boot => {
                self.end = Some((EndReason::Reset, "as told".to_owned()));
                self.event.write(1).unwrap();
                Ok(Answer::Nothing)
            }
            _ => Ok(Answer::Nothing),
        }
    }

    fn ended(&self) -> Option<BorrowedFd<'_>> {
        Some(crate::virtio::worker::descriptor(&self.event))
    }

    fn end(&self) -> Option<(EndReason, String)> {
        self.end.clone()
    }
}

type Outcome = (Result<Served, ServeError>, Recorder);

fn served() -> (UnixStream, JoinHandle<Outcome>) {
    let (client, server) = UnixStream::pair().unwrap();
    let thread = spawn(move || {
        let mut monitor = Recorder::new();
        (serve(&server, &mut monitor), monitor)
    });
    (client, thread)
}

/// Says a line with so many descriptors and reads a line.
fn ask(client: &UnixStream, line: &str, descriptors: usize) -> String {
    let null = std::fs::File::open("/dev/null").unwrap();
    let fds = vec![null.as_fd(); descriptors];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(descriptors))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(descriptors == 0 || control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(client, &[IoSlice::new(format!("{line}\n").as_bytes())], &mut control, SendFlags::empty())
        .unwrap();
    read_line(client)
}

/// Byte by byte: what comes behind the line stays there.
fn read_line(mut client: &UnixStream) -> String {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while client.read(&mut byte).unwrap() == 1 {
        line.push(byte[0]);
        if byte == *b"\n" {
            break;
        }
    }
    String::from_utf8(line).unwrap()
}

#[test]
fn command_is_answered_and_its_descriptors_arrive_with_it() {
    let (client, server) = served();
    assert_eq!(ask(&client, r#"{"id":7,"command":"info"}"#, 0), "{\"id\":7,\"done\":\"nothing\"}\n");
    assert_eq!(ask(&client, r#"{"id":8,"command":"resume"}"#, 64), "{\"id\":8,\"done\":\"nothing\"}\n");
    assert_eq!(
        ask(&client, r#"{"id":9,"command":"pause"}"#, 1),
        "{\"id\":9,\"error\":{\"kind\":\"wrong-state\",\"message\":\"there is no machine\"}}\n"
    );
    drop(client);
    let (outcome, monitor) = server.join().unwrap();
    assert_eq!(outcome.unwrap(), Served::Closed);
    assert_eq!(monitor.told, [(Command::Info, 0), (Command::Resume, 64), (Command::Pause, 1)]);
}

#[test]
fn command_that_takes_its_time_ends_with_its_client() {
    let (mut client, server) = served();
    client.write_all(b"{\"id\":1,\"command\":{\"resize\":{\"cpus\":1,\"memory-mib\":64}}}\n").unwrap();
    drop(client);
    let (outcome, monitor) = server.join().unwrap();
    assert_eq!(outcome.unwrap(), Served::Closed);
    assert_eq!(monitor.told.len(), 1);
}

#[test]
fn line_that_is_no_request_is_told_so_and_the_next_one_is_served() {
    let (client, server) = served();
    for line in ["", "{}", "\u{1}", r#"{"id":1,"command":"boot","x":1}"#, r#"{"id":1,"command":"dance"}"#] {
        let answer = ask(&client, line, 1);
        assert!(answer.starts_with(r#"{"id":0,"error":{"kind":"invalid""#), "{line}: {answer}");
    }
    assert_eq!(ask(&client, r#"{"id":2,"command":"shutdown"}"#, 0), "{\"id\":2,\"done\":\"nothing\"}\n");
    let (outcome, monitor) = server.join().unwrap();
    assert_eq!(outcome.unwrap(), Served::Shutdown);
    assert_eq!(monitor.told, [(Command::Shutdown, 0)]);
}

#[test]
fn line_in_pieces_is_one_line() {
    let (mut client, server) = served();
    for piece in [r#"{"id":1,"com"#, r#"mand":"info""#] {
        client.write_all(piece.as_bytes()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(ask(&client, "}", 0), "{\"id\":1,\"done\":\"nothing\"}\n");
    drop(client);
    assert_eq!(server.join().unwrap().1.told, [(Command::Info, 0)]);
}

/// What comes of bytes that end the connection.
fn broken(bytes: &[u8]) -> ServeError {
    let (mut client, server) = served();
    let _ = client.write_all(bytes);
    let (outcome, monitor) = server.join().unwrap();
    assert_eq!(monitor.told, []);
    let mut rest = Vec::new();
    // Closed with something unread, the connection is reset.
    let _ = client.read_to_end(&mut rest);
    assert_eq!(rest, b"");
    outcome.unwrap_err()
}

#[test]
fn line_without_end_and_a_client_that_does_not_wait_end_the_connection() {
    assert!(matches!(broken(&[b'x'; MAX_LINE + 1]), ServeError::LongLine));
    let two = b"{\"id\":1,\"command\":\"info\"}\n{\"id\":2,\"command\":\"info\"}\n";
    assert!(matches!(broken(two), ServeError::Ahead));
}

#[test]
fn more_descriptors_than_allowed_end_the_connection() {
    let (client, server) = served();
    assert_eq!(ask(&client, r#"{"id":1,"command":"info"}"#, MAX_DESCRIPTORS + 1), "");
    assert!(matches!(server.join().unwrap().0, Err(ServeError::Descriptors)));
}

#[test]
fn end_of_the_machine_is_told_without_being_asked_for() {
    let (client, server) = served();
    assert_eq!(ask(&client, r#"{"id":1,"command":"boot"}"#, 0), "{\"id\":1,\"done\":\"nothing\"}\n");
    assert_eq!(read_line(&client), "{\"event\":{\"ended\":{\"reason\":\"reset\",\"detail\":\"as told\"}}}\n");
    assert_eq!(server.join().unwrap().0.unwrap(), Served::Ended(EndReason::Reset, "as told".to_owned()));
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(64))]
    /// Whatever a client sends ends in answers or in the end of the connection.
    #[test]
    fn any_bytes_are_survived(bytes: Vec<u8>) {
        let (mut client, server) = served();
        let _ = client.write_all(&bytes);
        let _ = client.shutdown(std::net::Shutdown::Write);
        let _ = client.read_to_end(&mut Vec::new());
        drop(server.join().unwrap());
    }
}
