//! One virtqueue as the front end describes it.

use std::fs::File;

use virtio_queue::{Queue, QueueT};

/// Entries of the largest queue accepted; QEMU's driver-facing queues have 128.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// A virtqueue and its event descriptors.
pub struct Ring {
    /// The queue; its addresses are guest-physical.
    pub queue: Queue,
    /// Readable when the driver added buffers. A ring with a kick is started.
    pub kick: Option<File>,
    /// Interrupts the driver when written.
    pub call: Option<File>,
    /// Tells the front end of a fault when written.
    pub error: Option<File>,
    /// Enabled by the front end.
    pub enabled: bool,
    /// Where the ring stood when it was last stopped.
    pub stopped_at: Option<u16>,
    failed: bool,
}

impl Default for Ring {
    fn default() -> Ring {
        Ring {
            queue: Queue::new(MAX_QUEUE_SIZE).unwrap_or_default(),
            kick: None,
            call: None,
            error: None,
            enabled: false,
            stopped_at: None,
            failed: false,
        }
    }
}

impl Ring {
    /// Whether the queue may be touched.
    pub fn is_running(&self) -> bool {
        self.queue.ready() && self.enabled && !self.failed
    }

    /// Starts the ring. True if it goes on where it was stopped: then the guest was only paused. A driver that starts
    /// anew begins at index 0 instead.
    pub fn start(&mut self) -> bool {
        self.failed = false;
        self.queue.set_ready(true);
        self.stopped_at.take().is_none_or(|index| index == self.queue.next_avail())
    }

    /// Stops the ring and returns the index of the next chain it would have taken.
    pub fn stop(&mut self) -> u16 {
        let index = self.queue.next_avail();
        if self.queue.ready() {
            self.stopped_at = Some(index);
        }
        self.queue.set_ready(false);
        self.call = None;
        index
    }

    /// Interrupts the driver.
    pub fn interrupt(&self) {
        signal(self.call.as_ref());
    }

    /// Leaves the ring alone until it is started anew, and tells the front end.
    pub fn fail(&mut self) {
        self.failed = true;
        signal(self.error.as_ref());
    }
}

/// Adds one to an event descriptor. It cannot fail but for an overflow, and then the event is pending anyway.
fn signal(event: Option<&File>) {
    if let Some(event) = event {
        let _ = rustix::io::write(event, &1u64.to_ne_bytes());
    }
}
