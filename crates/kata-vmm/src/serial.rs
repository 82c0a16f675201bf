//! A serial port, of which only the output leads anywhere: for the kernel's first words and for its last.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::Device;

/// First of its ports: the first serial port of a PC.
pub const PORT: u16 = 0x3f8;
/// How many ports it has.
pub const PORTS: u8 = 8;
/// Its pin of the I/O APIC.
pub const PIN: u32 = 4;

/// The port.
pub struct SerialPort(Mutex<Serial<Raise, NoEvents, Output>>);

struct Raise(EventFd);

impl Trigger for Raise {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Where the output goes. What its reader is too slow for is lost: a console never holds a guest up.
struct Output(File);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.write(bytes) {
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::BrokenPipe) => {
                Ok(bytes.len())
            }
            done => done,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SerialPort {
    /// A port that writes to `output`, and raises `interrupt`.
    pub fn new(output: OwnedFd, interrupt: EventFd) -> io::Result<SerialPort> {
        rustix::io::ioctl_fionbio(&output, true)?;
        let output = Output(File::from(output));
        Ok(SerialPort(Mutex::new(Serial::new(Raise(interrupt), output))))
    }
}

/// The port's registers in a snapshot, in the order of [`SerialState`]'s fields.
pub type Registers = [u8; 9];

impl SerialPort {
    /// A port that goes on with these registers.
    pub fn restored(output: OwnedFd, interrupt: EventFd, registers: Registers) -> io::Result<SerialPort> {
        rustix::io::ioctl_fionbio(&output, true)?;
        let [low, high, enable, identification, line, line_status, modem, modem_status, scratch] = registers;
        let state = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: line,
            line_status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: Vec::new(),
        };
        let output = Output(File::from(output));
        let port = Serial::from_state(&state, Raise(interrupt), NoEvents, output);
        Ok(SerialPort(Mutex::new(port.map_err(|e| io::Error::other(format!("{e:?}")))?)))
    }

    /// Its registers, for a snapshot. Nobody writes to the guest, so there is no input to keep.
    pub fn registers(&self) -> Registers {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner).state();
        [
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
        ]
    }
}

impl Device for SerialPort {
    fn read(&self, offset: u64, into: &mut [u8]) {
        if let ([byte], Ok(offset)) = (into, u8::try_from(offset)) {
            *byte = self.0.lock().unwrap_or_else(PoisonError::into_inner).read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (&[byte], Ok(offset)) = (data, u8::try_from(offset)) {
            let written = self.0.lock().unwrap_or_else(PoisonError::into_inner).write(offset, byte);
            if let Err(error) = written {
                tracing::debug!(?error, "the serial port's output is lost");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn output_arrives_and_a_full_or_closed_reader_holds_nobody_up() {
        let (mut reader, writer) = io::pipe().unwrap();
        let port = SerialPort::new(writer.into(), EventFd::new(0).unwrap()).unwrap();
        port.write(0, b"a");
        let mut byte = [0];
        reader.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"a");
        for _ in 0..200_000 {
            port.write(0, b"x");
        }
        drop(reader);
        port.write(0, b"x");
    }

    #[test]
    fn wide_access_is_no_access() {
        let (_reader, writer) = io::pipe().unwrap();
        let port = SerialPort::new(writer.into(), EventFd::new(0).unwrap()).unwrap();
        let mut word = [0xff; 2];
        port.read(0, &mut word);
        assert_eq!(word, [0xff; 2]);
        port.write(0, &word);
    }

    #[test]
    fn registers_are_the_same_after_a_snapshot() {
        let port = |registers: Option<Registers>| {
            let (_, writer) = io::pipe().unwrap();
            let event = EventFd::new(0).unwrap();
            match registers {
                Some(registers) => SerialPort::restored(writer.into(), event, registers).unwrap(),
                None => SerialPort::new(writer.into(), event).unwrap(),
            }
        };
        let first = port(None);
        for (offset, value) in [(1, 1), (3, 0x83), (0, 0x0c), (3, 3), (4, 8), (7, 0x5a)] {
            first.write(offset, &[value]);
        }
        let second = port(Some(first.registers()));
        assert_eq!(second.registers(), first.registers());
        let mut scratch = [0];
        second.read(7, &mut scratch);
        assert_eq!(scratch, [0x5a]);
    }
}
