//! From the commands of the interface to the machine.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

use kata_vmm_api::{Answer, Command, EndReason, Failure, FailureKind, Info, Size, State};

use crate::server::Monitor;

/// The machine of this process, before, while and after there is one.
pub struct Vmm {
    /// `/dev/kvm`, until there is a machine.
    kvm: Option<OwnedFd>,
    /// Where the sockets are that the guest's connections go to.
    sockets: Option<PathBuf>,
    jailed: bool,
}

impl Vmm {
    /// Without a machine.
    pub fn new(kvm: Option<OwnedFd>, sockets: Option<PathBuf>, jailed: bool) -> Self {
        Self { kvm, sockets, jailed }
    }
}

impl Monitor for Vmm {
    fn execute(&mut self, command: Command, descriptors: Vec<OwnedFd>) -> Result<Answer, Failure> {
        let _ = (descriptors, &self.kvm, &self.sockets);
        match command {
            Command::Info => Ok(Answer::Info(Info {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                state: State::Empty,
                size: Size { cpus: 0, memory_mib: 0 },
                cpu_threads: Vec::new(),
                jailed: self.jailed,
            })),
            Command::Shutdown => Ok(Answer::Nothing),
            Command::Create(_) => Err(failure(FailureKind::Unsupported, "there are no machines yet")),
            _ => Err(failure(FailureKind::WrongState, "there is no machine; create one first")),
        }
    }

    fn ended(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn end(&mut self) -> Option<(EndReason, String)> {
        None
    }
}

fn failure(kind: FailureKind, message: &str) -> Failure {
    Failure { kind, message: message.to_owned() }
}
