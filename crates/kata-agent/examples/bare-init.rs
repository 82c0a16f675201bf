//! An init that ends the machine at once: what a boot costs when nothing is done with it.
//!
//! Writes to QEMU's `isa-debug-exit` port, so the machine is gone with the very instruction. A kernel that gives no
//! program the right to ports is asked to reset the machine instead.

/// I/O port of `-device isa-debug-exit,iobase=0xf4`.
#[cfg(target_arch = "x86_64")]
const DEBUG_EXIT: u16 = 0xf4;

#[cfg(target_arch = "x86_64")]
fn main() {
    // SAFETY: raising the I/O privilege level changes nothing in memory.
    let allowed = unsafe { libc::iopl(3) } == 0;
    if allowed {
        // SAFETY: the port belongs to QEMU's exit device; no memory is touched.
        unsafe { std::arch::asm!("out dx, al", in("dx") DEBUG_EXIT, in("al") 0_u8) };
    }
    let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
}

#[cfg(not(target_arch = "x86_64"))]
fn main() {}
