//! One virtual CPU: its registers at boot, its thread, and what it does when the guest cannot go on by itself.
//!
//! ```text
//!            ┌──────────── resume ────────────┐
//!            ▼                                │
//!   new ─▶ stands ──▶ runs ──▶ pause ──▶ stands still
//!                      │ exit: I/O ─▶ bus; power, reset, what is not understood ─▶ Ending
//!                      └──▶ end: the thread is gone
//! ```

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{CpuState, KvmError, cpuid, prefault, refused};
use crate::boot::{Entry, GDT, PAGE_TABLES, START_INFO, ZERO_PAGE};
use crate::bus::Bus;

pub use kata_vmm_api::EndReason;

/// Stack of a CPU's thread: device registers are written from here.
const STACK: usize = 256 * 1024;
/// How long a CPU may take to notice that it is to stand still, before it is told again.
const PATIENCE: Duration = Duration::from_millis(5);

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEFAULT: u32 = 0x2ff;
/// Ranges on, and write-back where none says otherwise.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG: u64 = 1 << 8 | 1 << 10;

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// For programs.
    pub reason: EndReason,
    /// For people; empty where the reason says all.
    pub detail: String,
}

/// The end of a machine: said once, by whoever is first, and heard by whoever asks.
pub struct Ending {
    end: Mutex<Option<End>>,
    changed: Condvar,
    event: EventFd,
}

impl Ending {
    /// A machine that has not ended.
    pub fn new() -> io::Result<Ending> {
        Ok(Ending {
            end: Mutex::default(),
            changed: Condvar::new(),
            event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })
    }

    /// Ends the machine, if it has not ended.
    pub fn end(&self, reason: EndReason, detail: impl fmt::Display) {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        if end.is_none() {
            *end = Some(End { reason, detail: detail.to_string() });
            self.changed.notify_all();
            // It cannot overflow: it is written to once.
            let _ = self.event.write(1);
        }
    }

    /// How it ended.
    pub fn get(&self) -> Option<End> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for it.
    pub fn wait(&self) -> End {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match end.clone() {
                Some(end) => return end,
                None => end = self.changed.wait(end).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Readable from when it has ended.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

/// Where a CPU's accesses go.
#[derive(Clone, Default)]
pub struct Buses {
    /// Ports.
    pub ports: Arc<Bus>,
    /// Addresses that are no RAM.
    pub memory: Arc<Bus>,
}

/// What a CPU does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It runs the guest.
    Runs,
    /// It stands still.
    Stands,
    /// Its thread is gone.
    Gone,
}

/// A virtual CPU without a thread.
pub struct Cpu {
    index: u32,
    cpu: Arc<Mutex<VcpuFd>>,
}

impl Cpu {
    pub(super) fn new(machine: &VmFd, supported: &CpuId, index: u32, count: u32) -> Result<Cpu, KvmError> {
        let cpu = machine.create_vcpu(index.into()).map_err(refused("make a virtual CPU"))?;
        cpu.set_cpuid2(&cpuid::of(supported, index, count))
            .map_err(refused("set what a CPU says that it is"))?;
        let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
        let entries = [entry(MSR_MISC_ENABLE, MISC_FAST_STRINGS), entry(MSR_MTRR_DEFAULT, MTRR_WRITE_BACK)];
        let registers = Msrs::from_entries(&entries).map_err(|e| KvmError::Refused {
            action: "hold the registers of a model",
            source: io::Error::other(format!("{e:?}")),
        })?;
        // What a host's KVM does not know is left as it is: the guest checks what it needs.
        cpu.set_msrs(&registers).map_err(refused("set the registers of a model"))?;
        Ok(Cpu { index, cpu: Arc::new(Mutex::new(cpu)) })
    }

    /// Sets the registers of the CPU that boots; all others wait for it to wake them.
    pub fn enter(&self, entry: Entry) -> Result<(), KvmError> {
        let cpu = lock(&self.cpu);
        let mut special = cpu.get_sregs().map_err(refused("read a CPU's registers"))?;
        let flags = 2;
        let general = match entry {
            Entry::Pvh { address } => {
                set_segments(&mut special, false);
                special.cr0 = CR0_PROTECTED | CR0_EXTENSION;
                special.cr4 = 0;
                special.efer = 0;
                kvm_regs { rip: address, rbx: START_INFO, rflags: flags, ..Default::default() }
            }
            Entry::Linux64 { address } => {
                set_segments(&mut special, true);
                special.cr0 = CR0_PROTECTED | CR0_EXTENSION | CR0_PAGING;
                special.cr3 = PAGE_TABLES;
                special.cr4 = CR4_PAE;
                special.efer = EFER_LONG;
                kvm_regs { rip: address, rsi: ZERO_PAGE, rflags: flags, ..Default::default() }
            }
        };
        cpu.set_sregs(&special).map_err(refused("set a CPU's registers"))?;
        cpu.set_regs(&general).map_err(refused("set a CPU's registers"))
    }

    /// Maps these addresses for the guest, of whichever CPU, where the host's KVM can do so before it runs.
    pub fn prefault(&self, ranges: &[Range<u64>]) {
        prefault::prefault(&lock(&self.cpu), ranges);
    }

    /// Puts it where another of its number stood.
    pub(super) fn put(&self, state: &CpuState, first: &CpuState) -> Result<(), KvmError> {
        state.put(&lock(&self.cpu), first)
    }

    /// Gives the CPU its thread, in which it stands still. `confine` is called there first. Where there is no thread to be had, it can
    /// be tried again.
    pub fn start(
        &self,
        buses: Buses,
        ending: Arc<Ending>,
        confine: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> Result<CpuThread, KvmError> {
        let (index, cpu) = (self.index, Arc::clone(&self.cpu));
        let its_cpu = Arc::clone(&cpu);
        let control = Arc::new(Control::default());
        let its_control = Arc::clone(&control);
        let body = move || {
            its_control.set_thread(rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs());
            match confine() {
                Ok(()) => work(&its_cpu, index, &buses, &ending, &its_control),
                Err(reason) => {
                    ending.end(
                        EndReason::CpuFault,
                        format_args!("virtual CPU {index} is not confined: {reason}"),
                    );
                }
            }
            its_control.set(State::Gone);
        };
        install_kick();
        let thread = Builder::new().name(format!("vcpu{index}")).stack_size(STACK).spawn(body);
        let thread = thread.map_err(|source| KvmError::Thread { index, source })?;
        Ok(CpuThread { control, cpu, thread: Some(thread) })
    }
}

/// Flat segments for 32-bit protected mode or for 64-bit mode, as [`GDT`] has them.
fn set_segments(registers: &mut kvm_sregs, long: bool) {
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 0xb,
        present: 1,
        s: 1,
        db: u8::from(!long),
        l: u8::from(long),
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 0x18, type_: 3, db: 1, l: 0, ..code };
    registers.cs = code;
    (registers.ds, registers.es, registers.fs, registers.gs, registers.ss) = (data, data, data, data, data);
    registers.tr = kvm_segment { limit: 0x67, selector: 0x20, type_: 0xb, present: 1, ..Default::default() };
    registers.gdt.base = GDT;
    registers.gdt.limit = crate::boot::GDT_LIMIT;
    registers.idt.base = 0;
    registers.idt.limit = 0;
}

/// What is wanted of a CPU's thread, and what it does.
struct Control {
    /// What is wanted, what is, and the number of the thread.
    state: Mutex<(Wanted, State, u32)>,
    changed: Condvar,
    exits: Exits,
}

/// How often the guest was left.
#[derive(Default)]
struct Exits {
    ports: AtomicU64,
    memory: AtomicU64,
    other: AtomicU64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Run,
    Stand,
    End,
}

impl Default for Control {
    fn default() -> Control {
        Control {
            state: Mutex::new((Wanted::Stand, State::Stands, 0)),
            changed: Condvar::new(),
            exits: Exits::default(),
        }
    }
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, (Wanted, State, u32)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: State) {
        self.lock().1 = state;
        self.changed.notify_all();
    }

    fn set_thread(&self, id: u32) {
        self.lock().2 = id;
        self.changed.notify_all();
    }

    /// Waits as long as the CPU is to stand still; false once it is to end.
    fn may_run(&self) -> bool {
        let mut state = self.lock();
        while state.0 == Wanted::Stand {
            state.1 = State::Stands;
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.1 = State::Runs;
        self.changed.notify_all();
        state.0 == Wanted::Run
    }
}

/// A CPU's thread.
pub struct CpuThread {
    control: Arc<Control>,
    /// The thread has it while it runs the guest.
    cpu: Arc<Mutex<VcpuFd>>,
    thread: Option<JoinHandle<()>>,
}

impl CpuThread {
    /// Lets it run the guest.
    pub fn resume(&self) {
        let mut state = self.control.lock();
        if state.0 == Wanted::Stand {
            state.0 = Wanted::Run;
        }
        self.control.changed.notify_all();
    }

    /// Makes it stand still, and comes back when it does.
    pub fn pause(&self) {
        self.bring(Wanted::Stand, |state| state != State::Runs);
    }

    /// Where it stands, with these registers of the model, for a snapshot; waits until it stands still.
    pub fn save(&self, registers: &[u32]) -> Result<CpuState, KvmError> {
        CpuState::of(&lock(&self.cpu), registers)
    }

    /// Its thread's number, where this process runs; waits until there is one.
    pub fn id(&self) -> u32 {
        let mut state = self.control.lock();
        while state.2 == 0 && state.1 != State::Gone {
            state = self.control.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.2
    }

    /// How often it left the guest, by what for.
    pub fn exits(&self) -> [(&'static str, u64); 3] {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Exits { ports, memory, other } = &self.control.exits;
        [("port-exits", count(ports)), ("memory-exits", count(memory)), ("other-exits", count(other))]
    }

    /// A signal makes it leave the guest. It may come just before the guest is entered, and is lost then: so it is sent again.
    fn bring(&self, wanted: Wanted, is_there: impl Fn(State) -> bool) {
        let mut state = self.control.lock();
        if state.0 != Wanted::End {
            state.0 = wanted;
        }
        self.control.changed.notify_all();
        while !is_there(state.1) {
            self.kick();
            let waited = self.control.changed.wait_timeout(state, PATIENCE);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            // SAFETY: the thread is not joined yet, so its handle is valid; the signal has a handler that does nothing.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
        }
    }
}

impl Drop for CpuThread {
    fn drop(&mut self) {
        self.bring(Wanted::End, |state| state == State::Gone);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has aborted the process.
            let _ = thread.join();
        }
    }
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Gives the signal a handler, so that it interrupts and does not kill.
fn install_kick() {
    static ONCE: Once = Once::new();
    extern "C" fn nothing(_: libc::c_int) {}
    ONCE.call_once(|| {
        // SAFETY: all zero is a valid action: no flags, no mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        let handler: extern "C" fn(libc::c_int) = nothing;
        action.sa_sigaction = handler as usize;
        // SAFETY: the action is complete, and its handler does nothing at all.
        unsafe { libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut()) };
    });
}

/// Runs the guest until the CPU is to end, or the machine has.
fn work(cpu: &Mutex<VcpuFd>, index: u32, buses: &Buses, ending: &Ending, control: &Control) {
    while control.may_run() {
        let mut cpu = lock(cpu);
        // A guest that stood still shall not take its own CPUs for stuck. One that has no such clock needs nothing.
        let _ = cpu.kvmclock_ctrl();
        loop {
            match step(&mut cpu, index, buses, &control.exits) {
                Next::Enter => {}
                Next::Look => break,
                Next::End(end) => {
                    ending.end(end.reason, end.detail);
                    return;
                }
            }
        }
    }
}

/// Nothing in it is half done when somebody who holds it ends.
fn lock(cpu: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    cpu.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What follows an exit.
enum Next {
    Enter,
    /// Somebody may want this CPU to do something else.
    Look,
    End(End),
}

/// Runs the guest until its next exit, and does what that asks for.
fn step(cpu: &mut VcpuFd, index: u32, buses: &Buses, exits: &Exits) -> Next {
    let fault = |what: String| {
        Next::End(End { reason: EndReason::CpuFault, detail: format!("virtual CPU {index} {what}") })
    };
    let exit = cpu.run();
    let counter = match &exit {
        Ok(VcpuExit::IoOut(..) | VcpuExit::IoIn(..)) => &exits.ports,
        Ok(VcpuExit::MmioWrite(..) | VcpuExit::MmioRead(..)) => &exits.memory,
        _ => &exits.other,
    };
    counter.fetch_add(1, Ordering::Relaxed);
    match exit {
        Ok(VcpuExit::IoOut(port, data)) => buses.ports.write(port.into(), data),
        Ok(VcpuExit::IoIn(port, data)) => buses.ports.read(port.into(), data),
        Ok(VcpuExit::MmioWrite(address, data)) => buses.memory.write(address, data),
        Ok(VcpuExit::MmioRead(address, data)) => buses.memory.read(address, data),
        Ok(VcpuExit::Hlt) => {}
        Ok(VcpuExit::Intr) => return Next::Look,
        // A triple fault is how Linux resets a machine that has nothing else.
        Ok(VcpuExit::Shutdown) => return Next::End(End { reason: EndReason::Reset, detail: String::new() }),
        Ok(VcpuExit::FailEntry(reason, _)) => {
            return fault(format!(
                "cannot enter the guest: the processor refuses its state, reason {reason:#x}"
            ));
        }
        Ok(VcpuExit::InternalError) => {
            let place = place(cpu);
            return fault(format!("did what KVM cannot emulate, at {place}"));
        }
        Ok(other) => {
            let exit = format!("{other:?}");
            let place = place(cpu);
            return fault(format!("left the guest for a reason that is not known here, {exit}, at {place}"));
        }
        Err(e) => match e.errno() {
            libc::EINTR => return Next::Look,
            libc::EAGAIN => {}
            _ => {
                let place = place(cpu);
                return fault(format!("does not run: {e}, at {place}"));
            }
        },
    }
    Next::Enter
}

/// Where the guest was, for people.
fn place(cpu: &VcpuFd) -> String {
    cpu.get_regs().map_or_else(|_| "an unknown address".to_owned(), |regs| format!("{:#x}", regs.rip))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    use super::*;
    use crate::kvm::Hypervisor;
    use crate::memory::{self, Backing};

    const CODE: u64 = 0x10_0000;

    /// How a guest ends that runs `code` in 32-bit mode; `None`, said aloud, without a KVM that runs guests.
    fn end_of(code: &[u8]) -> Option<End> {
        let memory = memory::allocate(64 << 20, 0, Backing::default()).unwrap();
        memory.memory().write_slice(code, GuestAddress(CODE)).unwrap();
        let machine = Hypervisor::open().and_then(|kvm| Hypervisor::new(kvm, &memory.memory()));
        let machine = match machine {
            Ok(machine) => machine,
            Err(error) => {
                eprintln!("skipped: no machine of KVM's: {error}");
                return None;
            }
        };
        let cpu = machine.cpus(0..1, 1).unwrap().next().unwrap().unwrap();
        cpu.enter(Entry::Pvh { address: CODE }).unwrap();
        let ending = Arc::new(Ending::new().unwrap());
        let thread = cpu.start(Buses::default(), Arc::clone(&ending), || Ok(())).unwrap();
        thread.resume();
        let begin = Instant::now();
        while ending.get().is_none() {
            assert!(begin.elapsed() < Duration::from_secs(60), "the guest goes on");
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(thread);
        ending.get()
    }

    #[test]
    fn guest_that_runs_where_nothing_is_ends_with_the_place() {
        // mov eax, 0xd0000000; jmp eax
        let Some(end) = end_of(&[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0]) else { return };
        assert_eq!(end.reason, EndReason::CpuFault, "{}", end.detail);
        assert!(
            end.detail.starts_with("virtual CPU 0 ") && end.detail.contains("0xd0000000"),
            "{}",
            end.detail
        );
    }

    #[test]
    fn guest_that_faults_thrice_has_reset() {
        // ud2, and no table of handlers.
        let Some(end) = end_of(&[0x0f, 0x0b]) else { return };
        assert_eq!(end.reason, EndReason::Reset, "{}", end.detail);
    }
}
