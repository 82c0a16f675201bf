//! What xtask and the lab's init say to each other over one virtio-serial port.
//!
//! ```text
//!  xtask                                          init
//!    │◀────────────────────────────────── Ready ────┤ the machine is up
//!    ├─ Start ─────────────────────────────────────▶│
//!    ├─ Stdin… StdinEnd, Signal, Resize ───────────▶│
//!    │◀──────────────────── Stdout…, Stderr…, Taken ┤ a piece of input has gone: the next may come
//!    │◀─────────────────────────────────────── Beat ▶│ now and then, answered at once
//!    │◀──────────────────── Exit or Fault ──────────┤ nothing follows
//! ```
//!
//! A frame is its kind (one byte), the length of what follows (four, little-endian), and that. One channel for
//! everything keeps the order: the exit status comes after the last byte of output.

use std::io::{self, Read, Write};

use thiserror::Error;

/// Name of the serial port.
pub const PORT: &str = "lab";
/// virtio-fs tag of the root.
pub const ROOT_TAG: &str = "lab-root";
/// virtio-fs tag of the source tree.
pub const TREE_TAG: &str = "lab-tree";
/// Kernel parameter that says where the source tree is to be.
pub const TREE_PARAMETER: &str = "lab.tree=";
/// Kernel parameter that asks for systemd.
pub const SYSTEMD_PARAMETER: &str = "lab.systemd";

/// Output is sent in pieces of at most this many bytes.
pub const PIECE: usize = 32 * 1024;
/// No frame is longer; a command line fits.
const LONGEST: u32 = 4 << 20;

/// A frame that cannot be sent or understood.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The channel is at its end or broken.
    #[error("the channel between xtask and the lab broke")]
    Channel(#[from] io::Error),
    /// A length that no frame has.
    #[error("a frame of {0} bytes, more than any has: the channel is out of step")]
    TooLong(u64),
    /// A kind or content that makes no sense.
    #[error("a frame of kind {kind} that makes no sense")]
    Malformed {
        /// Its first byte.
        kind: u8,
    },
}

/// One thing said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Init: the machine is up.
    Ready,
    /// xtask: what to run. Once.
    Start(Start),
    /// xtask: bytes for the command; no more until they are taken, so that nothing stands in a signal's way.
    Stdin(Vec<u8>),
    /// xtask: no more of them will come.
    StdinEnd,
    /// xtask: a signal's number, for the command's process group.
    Signal(u8),
    /// xtask: the terminal's new size.
    Resize(Size),
    /// Init: what the command wrote.
    Stdout(Vec<u8>),
    /// Init: what it wrote to the other stream.
    Stderr(Vec<u8>),
    /// Init: the command's exit status, 128 and the signal's number if it was killed.
    Exit(u8),
    /// Init: why there is nothing to run a command in.
    Fault(String),
    /// xtask: are you there? Init: yes.
    Beat,
    /// Init: the command has taken the last piece of input, or will never take any.
    Taken,
}

/// Rows and columns of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// What to run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// Where; `/` if there is no such directory.
    pub directory: String,
    /// On a terminal of this size, or on pipes.
    pub terminal: Option<Size>,
    /// `NAME=VALUE`, beside what every command gets.
    pub environment: Vec<String>,
    /// The program and its arguments.
    pub command: Vec<String>,
}

impl Frame {
    /// Reads one.
    ///
    /// # Errors
    /// [`FrameError`]; the channel is of no use afterwards.
    pub fn read(from: &mut impl Read) -> Result<Self, FrameError> {
        let mut head = [0; 5];
        from.read_exact(&mut head)?;
        let [kind, length @ ..] = head;
        let length = u32::from_le_bytes(length);
        if length > LONGEST {
            return Err(FrameError::TooLong(length.into()));
        }
        let mut content = Vec::new();
        from.take(length.into()).read_to_end(&mut content)?;
        if u32::try_from(content.len()) != Ok(length) {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Self::parse(kind, content).ok_or(FrameError::Malformed { kind })
    }

    /// Writes it at once.
    ///
    /// # Errors
    /// [`FrameError`], also for a command line beyond all measure.
    pub fn write(&self, to: &mut impl Write) -> Result<(), FrameError> {
        let (kind, content) = self.parts();
        let length = u32::try_from(content.len()).ok().filter(|length| *length <= LONGEST);
        let length = length.ok_or(FrameError::TooLong(content.len() as u64))?;
        let mut bytes = Vec::with_capacity(5 + content.len());
        bytes.push(kind);
        bytes.extend(length.to_le_bytes());
        bytes.extend(content);
        to.write_all(&bytes)?;
        Ok(to.flush()?)
    }

    fn parts(&self) -> (u8, Vec<u8>) {
        match self {
            Self::Ready => (0, Vec::new()),
            Self::Start(start) => (1, start.bytes()),
            Self::Stdin(bytes) => (2, bytes.clone()),
            Self::StdinEnd => (3, Vec::new()),
            Self::Signal(number) => (4, vec![*number]),
            Self::Resize(size) => (5, size.bytes().to_vec()),
            Self::Stdout(bytes) => (6, bytes.clone()),
            Self::Stderr(bytes) => (7, bytes.clone()),
            Self::Exit(status) => (8, vec![*status]),
            Self::Fault(reason) => (9, reason.clone().into_bytes()),
            Self::Beat => (10, Vec::new()),
            Self::Taken => (11, Vec::new()),
        }
    }

    fn parse(kind: u8, content: Vec<u8>) -> Option<Self> {
        Some(match (kind, content.as_slice()) {
            (0, []) => Self::Ready,
            (1, bytes) => Self::Start(Start::parse(bytes)?),
            (2, _) => Self::Stdin(content),
            (3, []) => Self::StdinEnd,
            (4, [number]) => Self::Signal(*number),
            (5, bytes) => Self::Resize(Size::parse(bytes)?),
            (6, _) => Self::Stdout(content),
            (7, _) => Self::Stderr(content),
            (8, [status]) => Self::Exit(*status),
            (9, bytes) => Self::Fault(String::from_utf8_lossy(bytes).into_owned()),
            (10, []) => Self::Beat,
            (11, []) => Self::Taken,
            _ => return None,
        })
    }
}

impl Size {
    fn bytes(self) -> [u8; 4] {
        let ([a, b], [c, d]) = (self.rows.to_le_bytes(), self.columns.to_le_bytes());
        [a, b, c, d]
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let [a, b, c, d] = *bytes else { return None };
        Some(Self { rows: u16::from_le_bytes([a, b]), columns: u16::from_le_bytes([c, d]) })
    }
}

impl Start {
    /// Terminal, directory, number of variables, variables and command, each ended by a zero byte.
    fn bytes(&self) -> Vec<u8> {
        let terminal =
            self.terminal.map_or_else(String::new, |size| format!("{} {}", size.rows, size.columns));
        let head = [terminal, self.directory.clone(), self.environment.len().to_string()];
        let words = head.iter().chain(&self.environment).chain(&self.command);
        words.flat_map(|word| word.bytes().chain([0])).collect()
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes.strip_suffix(&[0])?).ok()?;
        let mut words = text.split('\0').map(str::to_owned);
        let terminal = match words.next()?.split_once(' ') {
            Some((rows, columns)) => Some(Size { rows: rows.parse().ok()?, columns: columns.parse().ok()? }),
            None => None,
        };
        let directory = words.next()?;
        let variables: usize = words.next()?.parse().ok()?;
        let environment: Vec<String> = words.by_ref().take(variables).collect();
        let command: Vec<String> = words.collect();
        let whole = environment.len() == variables && !command.is_empty();
        whole.then_some(Self { directory, terminal, environment, command })
    }
}

#[cfg(test)]
mod tests;
