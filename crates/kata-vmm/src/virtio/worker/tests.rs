use std::sync::Mutex;
use std::time::{Duration, Instant};

use virtio_queue::QueueT;
use vm_memory::GuestAddress;

use super::*;

/// Counts what a driver is told.
#[derive(Default)]
struct Told(Mutex<Vec<String>>);

impl Told {
    fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

impl Interrupt for Told {
    fn used(&self, queue: usize) {
        self.0.lock().unwrap().push(format!("used {queue}"));
    }
    fn configuration_changed(&self) {}
    fn needs_reset(&self) {
        self.0.lock().unwrap().push("needs reset".to_owned());
    }
    fn descriptor(&self, _queue: usize) -> Option<EventFd> {
        None
    }
}

/// Writes down its turns; each serves queue 0 as `serve` says.
struct Diary {
    turns: mpsc::Sender<Wake>,
    then: Then,
    serve: Result<Served, Broken>,
    own: EventFd,
}

#[derive(Clone, Copy, Debug, Error)]
#[error("no rule is kept")]
struct Broken;

impl Work for Diary {
    const NAME: &'static str = "diary";

    fn sources(&self) -> Vec<(BorrowedFd<'_>, EventFlags)> {
        vec![(descriptor(&self.own), EventFlags::IN | EventFlags::ET)]
    }

    fn turn(&mut self, wake: Wake, rings: &mut Rings) -> Then {
        let serve = self.serve;
        let served = rings.serve(0, |_, queue| {
            queue.set_next_avail(queue.next_avail() + 1);
            serve
        });
        let _ = self.turns.send(wake);
        self.then.or(served)
    }
}

struct Fixture {
    worker: Worker<Diary>,
    turns: mpsc::Receiver<Wake>,
    told: Arc<Told>,
    kick: EventFd,
    own: EventFd,
}

fn event() -> EventFd {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap()
}

impl Fixture {
    fn new(then: Then, serve: Result<Served, Broken>) -> Fixture {
        let (sender, turns) = mpsc::channel();
        let own = event();
        let work = Diary { turns: sender, then, serve, own: own.try_clone().unwrap() };
        let worker = Worker::new(work).unwrap();
        Fixture { worker, turns, told: Arc::new(Told::default()), kick: event(), own }
    }

    fn start(&mut self, queue: Queue) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let queues = vec![ActiveQueue { index: 0, queue, kick: self.kick.try_clone().unwrap() }];
        let interrupt: Arc<dyn Interrupt> = self.told.clone();
        self.worker
            .start(Activation { memory: Arc::new(memory).into(), features: 0, queues, interrupt })
            .unwrap();
    }

    fn turn(&self) -> Wake {
        self.turns.recv_timeout(Duration::from_secs(20)).expect("a turn")
    }
}

#[test]
fn each_cause_wakes_the_worker_and_is_told_apart() {
    let mut fixture = Fixture::new(Then::Wait, Ok(Served::default()));
    fixture.start(Queue::new(16).unwrap());
    assert_eq!(fixture.turn(), Wake::default());
    fixture.kick.write(1).unwrap();
    let wake = fixture.turn();
    assert!(wake.kicked(0) && !wake.own(0));
    // The second kick finds the first one unread.
    fixture.kick.write(1).unwrap();
    assert!(fixture.turn().kicked(0));
    fixture.own.write(1).unwrap();
    let wake = fixture.turn();
    assert!(wake.own(0) && !wake.kicked(0));
    assert!(fixture.turns.recv_timeout(Duration::from_millis(20)).is_err(), "a turn without a cause");
}

#[test]
fn busy_worker_stops_and_its_queues_go_on_where_they_were() {
    let mut fixture = Fixture::new(Then::Again, Ok(Served { interrupt: true, more: false }));
    fixture.start(Queue::new(16).unwrap());
    for _ in 0..3 {
        fixture.turn();
    }
    let begun = Instant::now();
    let states = fixture.worker.stop();
    assert!(begun.elapsed() < Duration::from_secs(10));
    let [(0, state)] = states[..] else { panic!("{states:?}") };
    assert!(state.next_avail >= 3);
    assert_eq!(fixture.told.all().len(), usize::from(state.next_avail));
    assert!(fixture.worker.stop().is_empty(), "it stands already");

    fixture.start(Queue::try_from(state).unwrap());
    let [(0, later)] = fixture.worker.stop()[..] else { panic!("one queue") };
    assert!(later.next_avail > state.next_avail);
}

#[test]
fn kick_while_it_stands_is_seen_when_it_works() {
    let mut fixture = Fixture::new(Then::Wait, Ok(Served::default()));
    fixture.kick.write(1).unwrap();
    fixture.start(Queue::new(16).unwrap());
    assert_eq!(fixture.turn(), Wake::default());
    assert!(fixture.turn().kicked(0));
}

#[test]
fn broken_queue_is_left_alone_and_the_driver_told_once() {
    let mut fixture = Fixture::new(Then::Wait, Err(Broken));
    fixture.start(Queue::new(16).unwrap());
    fixture.turn();
    fixture.kick.write(1).unwrap();
    fixture.turn();
    assert_eq!(fixture.told.all(), ["needs reset"]);
    let [(0, state)] = fixture.worker.stop()[..] else { panic!("one queue") };
    assert_eq!(state.next_avail, 1);
}

#[test]
fn work_is_reached_only_while_it_stands() {
    let mut fixture = Fixture::new(Then::Wait, Ok(Served::default()));
    assert!(fixture.worker.standing().is_some());
    fixture.start(Queue::new(16).unwrap());
    assert!(fixture.worker.standing().is_none());
    fixture.worker.stop();
    assert!(fixture.worker.standing().is_some());
}
