//! The thread of a device: how it is started, woken and stopped, and how its queues come back.
//!
//! ```text
//!   Device::activate ──▶ Worker::start ──▶ thread: epoll over control, kicks, the work's own descriptors
//!                                            │ each time: Work::turn(Wake, Rings) ── Then::Again ──▶ at once
//!                                            │                                    └─ Then::Wait ──▶ sleeps
//!   Device::stop     ──▶ Worker::stop  ──▶ ends; the work and the queues return
//! ```
//!
//! A device is a [`Worker`] and the few calls of [`Device`](super::Device) around it; what it does is its [`Work`], which the
//! thread has to itself while it runs. Every turn looks at whatever may have become possible: kicks are edge-triggered and never
//! read, so a kick costs one system call and any number of them while a turn lasts are one.

use std::error::Error;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{Builder, JoinHandle};

use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use thiserror::Error;
use virtio_queue::{Queue, QueueState};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{ActivateError, Activation, ActiveQueue, Interrupt, Memory};
use crate::chain;
use crate::seccomp;

/// Stack of a device's thread, in bytes: address space, of which a device touches a few pages.
const STACK: usize = 128 * 1024;
/// Token of the control descriptor; other descriptors have their position, with [`OWN`] for the work's.
const CONTROL: u64 = u64::MAX;
const OWN: u64 = 1 << 32;

/// What a device does in its thread.
pub trait Work: Send + 'static {
    /// Name of the thread, at most 15 bytes; system call filters are chosen by it.
    const NAME: &'static str;

    /// Descriptors of its own that wake it, the same at every call; [`Wake::own`] counts in their order. Edge-triggered where
    /// the flags say so ([`EventFlags::ET`]), which suits what is not always read to its end.
    fn sources(&self) -> Vec<(BorrowedFd<'_>, EventFlags)> {
        Vec::new()
    }

    /// Does what can be done now, without blocking and in bounds: a long piece of work in several turns, between which the
    /// worker can be stopped. The first turn comes without a cause.
    fn turn(&mut self, wake: Wake, rings: &mut Rings) -> Then;

    /// The thread is about to end; what is still under way in the kernel or elsewhere must be over when this returns.
    fn quiesce(&mut self, rings: &mut Rings) {
        let _ = rings;
    }
}

/// When the next turn is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Then {
    /// When something happens.
    Wait,
    /// At once, there is more to do.
    Again,
}

impl Then {
    /// At once if either of both wants that.
    pub fn or(self, other: Then) -> Then {
        if self == Then::Again { self } else { other }
    }
}

/// Why a turn is taken. Several causes can come together, and none is there where [`Then::Again`] was answered before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wake {
    kicked: u64,
    own: u64,
}

impl Wake {
    /// Whether the driver kicked this queue. Only a hint: a kick may have been meant for buffers that are long done.
    pub fn kicked(self, queue: usize) -> bool {
        queue < 64 && self.kicked >> queue & 1 == 1
    }

    /// Whether this one of [`Work::sources`] is ready.
    pub fn own(self, source: usize) -> bool {
        source < 64 && self.own >> source & 1 == 1
    }

    fn add(&mut self, token: u64) {
        match token {
            // Only a stop comes that way.
            CONTROL => {}
            OWN.. => self.own |= 1u64.checked_shl(position(token - OWN)).unwrap_or(0),
            _ => self.kicked |= 1u64.checked_shl(position(token)).unwrap_or(0),
        }
    }
}

fn position(token: u64) -> u32 {
    u32::try_from(token).unwrap_or(u32::MAX)
}

/// What came of serving a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// The driver is to be interrupted (`Queue::needs_notification`).
    pub interrupt: bool,
    /// There is more to do without waiting.
    pub more: bool,
}

/// The queues of a device that works, and its driver.
pub struct Rings {
    memory: Memory,
    features: u64,
    interrupt: Arc<dyn Interrupt>,
    rings: Vec<Ring>,
}

struct Ring {
    index: usize,
    queue: Queue,
    kick: EventFd,
    /// The driver broke its rules.
    broken: bool,
}

impl Rings {
    fn new(activation: Activation) -> Rings {
        let ring = |ActiveQueue { index, queue, kick }| Ring { index, queue, kick, broken: false };
        let Activation { memory, features, queues, interrupt } = activation;
        Rings { memory, features, interrupt, rings: queues.into_iter().map(ring).collect() }
    }

    /// What device and driver agreed on.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// How the driver is told of anything but used buffers.
    pub fn interrupt(&self) -> &Arc<dyn Interrupt> {
        &self.interrupt
    }

    /// Numbers of the queues that the driver set up and did not break, in order.
    pub fn indexes(&self) -> impl Iterator<Item = usize> + '_ {
        self.rings.iter().filter(|ring| !ring.broken).map(|ring| ring.index)
    }

    /// Serves one queue and interrupts the driver if it wants that. Nothing happens where the driver left that queue out or broke
    /// it before. An error means that it broke it now: it is left alone from then on, and the driver is told.
    pub fn serve<E: Error>(
        &mut self,
        index: usize,
        serve: impl FnOnce(&GuestMemoryMmap, &mut Queue) -> Result<Served, E>,
    ) -> Then {
        let Some(ring) = self.rings.iter_mut().find(|ring| ring.index == index && !ring.broken) else {
            return Then::Wait;
        };
        match serve(&self.memory.memory(), &mut ring.queue) {
            Ok(Served { interrupt, more }) => {
                if interrupt {
                    self.interrupt.used(index);
                }
                if more { Then::Again } else { Then::Wait }
            }
            Err(error) => {
                ring.broken = true;
                tracing::error!(
                    queue = index,
                    error = chain(&error),
                    "the guest's driver broke a virtqueue; it rests until the driver resets the device"
                );
                self.interrupt.needs_reset();
                Then::Wait
            }
        }
    }

    /// The device cannot go on: all its queues are left alone, and the driver is told.
    pub fn fail<E: Error>(&mut self, error: &E) {
        tracing::error!(error = chain(error), "a virtio device cannot go on until its driver resets it");
        self.rings.iter_mut().for_each(|ring| ring.broken = true);
        self.interrupt.needs_reset();
    }

    fn states(&self) -> Vec<(usize, QueueState)> {
        self.rings.iter().map(|ring| (ring.index, ring.queue.state())).collect()
    }
}

/// Runs a [`Work`], one activation after another.
pub struct Worker<W: Work> {
    control: Arc<Control>,
    state: State<W>,
}

enum State<W> {
    /// Nothing of the guest's is touched.
    Stands(W),
    /// A thread has the work.
    Works(JoinHandle<Option<(W, Rings)>>),
    /// The thread ended without giving the work back.
    Lost,
}

/// How others reach the thread.
struct Control {
    event: EventFd,
    stop: AtomicBool,
}

#[derive(Debug, Error)]
#[error("its thread ended without giving its work back")]
struct Lost;

impl<W: Work> Worker<W> {
    /// It stands still at first.
    pub fn new(work: W) -> Result<Worker<W>, ActivateError> {
        let event =
            EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(failed("make the descriptor that wakes it"))?;
        let control = Arc::new(Control { event, stop: AtomicBool::new(false) });
        Ok(Worker { control, state: State::Stands(work) })
    }

    /// The work, while it stands still.
    pub fn standing(&mut self) -> Option<&mut W> {
        match &mut self.state {
            State::Stands(work) => Some(work),
            State::Works(_) | State::Lost => None,
        }
    }

    /// Begins to work in a thread of its own; one that works already is stopped first. On an error it stands still.
    pub fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.stop();
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Stands(work) => {
                let (state, result) = self.spawn(work, Rings::new(activation));
                self.state = state;
                result
            }
            State::Works(_) | State::Lost => Err(failed("work again")(io::Error::other(Lost))),
        }
    }

    fn spawn(&self, work: W, rings: Rings) -> (State<W>, Result<(), ActivateError>) {
        let poll = match Poll::new(&self.control.event, &rings, &work) {
            Ok(poll) => poll,
            Err(e) => return (State::Stands(work), Err(failed("watch its descriptors")(e))),
        };
        self.control.stop.store(false, Ordering::Relaxed);
        // The work goes only to a thread that is there; with a closure that never runs it would be lost.
        let (hand, take) = mpsc::sync_channel::<(W, Rings)>(1);
        let control = Arc::clone(&self.control);
        let body = move || {
            if let Err(error) = seccomp::confine_thread(W::NAME) {
                tracing::error!(
                    thread = W::NAME,
                    error = chain(&error),
                    "a device's thread does not work unconfined"
                );
                return None;
            }
            let (mut work, mut rings) = take.recv().ok()?;
            run(&poll, &control, &mut work, &mut rings);
            Some((work, rings))
        };
        match Builder::new().name(W::NAME.to_owned()).stack_size(STACK).spawn(body) {
            Ok(thread) => match hand.send((work, rings)) {
                Ok(()) => (State::Works(thread), Ok(())),
                Err(mpsc::SendError((work, _))) => {
                    (State::Stands(work), Err(failed("hand its work to the thread")(io::Error::other(Lost))))
                }
            },
            Err(e) => (State::Stands(work), Err(failed("start its thread")(e))),
        }
    }

    /// Comes to a stand, as [`Device::stop`](super::Device::stop) asks for it.
    pub fn stop(&mut self) -> Vec<(usize, QueueState)> {
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Works(thread) => {
                self.control.stop.store(true, Ordering::Relaxed);
                // It fails only where it is written to already.
                let _ = self.control.event.write(1);
                let Ok(Some((work, rings))) = thread.join() else {
                    tracing::error!(thread = W::NAME, "{Lost}; the device is out of use");
                    return Vec::new();
                };
                self.state = State::Stands(work);
                rings.states()
            }
            other => {
                self.state = other;
                Vec::new()
            }
        }
    }
}

impl<W: Work> Drop for Worker<W> {
    fn drop(&mut self) {
        self.stop();
    }
}

fn failed(action: &'static str) -> impl FnOnce(io::Error) -> ActivateError {
    move |source| ActivateError { action, source }
}

/// What the thread waits at.
struct Poll(OwnedFd);

impl Poll {
    fn new(control: &EventFd, rings: &Rings, work: &impl Work) -> io::Result<Poll> {
        let poll = Poll(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        let edge = EventFlags::IN | EventFlags::ET;
        epoll::add(&poll.0, descriptor(control), EventData::new_u64(CONTROL), edge)?;
        for ring in &rings.rings {
            epoll::add(&poll.0, descriptor(&ring.kick), EventData::new_u64(token(ring.index)), edge)?;
        }
        for (position, (source, flags)) in work.sources().into_iter().enumerate() {
            let added = epoll::add(&poll.0, source, EventData::new_u64(OWN + token(position)), flags);
            match added {
                // A regular file is always ready, and nothing to wait for.
                Ok(()) | Err(rustix::io::Errno::PERM) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(poll)
    }
}

/// The descriptor of an event, for [`Work::sources`].
pub fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` owns the descriptor and outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

fn token(position: usize) -> u64 {
    u64::try_from(position).unwrap_or(CONTROL)
}

/// The thread's loop, until it is to stop or cannot wait any more.
fn run<W: Work>(poll: &Poll, control: &Control, work: &mut W, rings: &mut Rings) {
    let mut events = Vec::with_capacity(16);
    let mut then = work.turn(Wake::default(), rings);
    while !control.stop.load(Ordering::Relaxed) {
        let timeout = (then == Then::Again).then(Timespec::default);
        match epoll::wait(&poll.0, spare_capacity(&mut events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                rings.fail(&io::Error::from(e));
                break;
            }
        }
        if control.stop.load(Ordering::Relaxed) {
            break;
        }
        let mut wake = Wake::default();
        events.drain(..).for_each(|event: epoll::Event| wake.add(event.data.u64()));
        then = work.turn(wake, rings);
    }
    work.quiesce(rings);
}

#[cfg(test)]
mod tests;
