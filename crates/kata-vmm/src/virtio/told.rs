//! A driver's ear, for tests of devices.

#![allow(clippy::unwrap_used, dead_code, reason = "only tests and fuzz targets have it, each a part of it")]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Activation, ActiveQueue, Interrupt};

/// Writes down what a driver is told.
#[derive(Default)]
pub struct Told(Mutex<Vec<String>>, Mutex<Vec<(usize, EventFd)>>);

impl Told {
    /// Was told nothing yet.
    pub fn new() -> Arc<Told> {
        Arc::new(Told::default())
    }

    /// All that it was told.
    pub fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    /// Waits until it was told this, and forgets all.
    pub fn eventually(&self, what: &str) {
        let end = Instant::now() + Duration::from_secs(20);
        while !self.all().iter().any(|told| told == what) {
            assert!(Instant::now() < end, "{what}: only {:?}", self.all());
            std::thread::sleep(Duration::from_millis(1));
        }
        self.0.lock().unwrap().clear();
    }

    /// Waits until the descriptor that belongs to a queue was written to.
    pub fn raised(&self, queue: usize) {
        let end = Instant::now() + Duration::from_secs(20);
        let raised = || {
            let events = self.1.lock().unwrap();
            events.iter().any(|(index, event)| *index == queue && event.read().is_ok())
        };
        while !raised() {
            assert!(Instant::now() < end, "no interrupt of queue {queue}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What a device is activated with, and the kicks of its queues.
    pub fn activation(
        self: &Arc<Told>,
        mem: &GuestMemoryMmap,
        features: u64,
        queues: &[(usize, Queue)],
    ) -> (Activation, Vec<EventFd>) {
        let kicks: Vec<_> = queues.iter().map(|_| event()).collect();
        let active = queues.iter().zip(&kicks).map(|((index, queue), kick)| ActiveQueue {
            index: *index,
            queue: Queue::try_from(queue.state()).unwrap(),
            kick: kick.try_clone().unwrap(),
        });
        let activation = Activation {
            memory: Arc::new(mem.clone()).into(),
            features,
            queues: active.collect(),
            interrupt: Arc::<Told>::clone(self),
        };
        (activation, kicks)
    }
}

fn event() -> EventFd {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap()
}

impl Interrupt for Told {
    fn used(&self, queue: usize) {
        self.0.lock().unwrap().push(format!("used {queue}"));
    }
    fn configuration_changed(&self) {
        self.0.lock().unwrap().push("configuration changed".to_owned());
    }
    fn needs_reset(&self) {
        self.0.lock().unwrap().push("needs reset".to_owned());
    }
    fn descriptor(&self, queue: usize) -> Option<EventFd> {
        let event = event();
        self.1.lock().unwrap().push((queue, event.try_clone().unwrap()));
        Some(event)
    }
}
