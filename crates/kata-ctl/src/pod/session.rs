//! A client at its process: streams, signals and the terminal, until the process ends.

use super::signals::{INT, KILL, PIPE, WINCH};
use super::stdio::{Carried, Notice};
use super::{CallError, Process, RawTerminal, Signals, Streams, terminal_size};

/// As many interrupts from an impatient user kill.
const INTERRUPTS_TO_KILL: u32 = 3;

/// A started process, with the client attached to it.
pub struct Session {
    process: Process,
    streams: Streams,
    carried: Carried,
    terminal: Option<RawTerminal>,
}

impl Session {
    /// Attaches to `process`, which was given `streams` and has just been started.
    pub fn attach(process: Process, mut streams: Streams, terminal: Option<RawTerminal>) -> Self {
        let carried = streams.carry();
        Self { process, streams, carried, terminal }
    }

    /// Passes on input, output, signals and sizes until the process has ended and its output is delivered; its exit code.
    ///
    /// # Errors
    /// The pod's owner is gone.
    pub async fn run(mut self, signals: &mut Signals) -> Result<u32, CallError> {
        self.resize().await;
        let process = self.process.clone();
        let ended = process.wait();
        tokio::pin!(ended);
        let mut interrupts = 0;
        let code = loop {
            tokio::select! {
                code = &mut ended => break code,
                notice = self.carried.notice() => match notice {
                    Notice::InputEnded => self.close_stdin().await,
                    // What the process would get if it wrote to the closed pipe itself.
                    Notice::OutputUnread => self.signal(PIPE, interrupts).await,
                },
                signal = signals.next() => {
                    interrupts += u32::from(signal == INT);
                    self.signal(signal, interrupts).await;
                }
            }
        };
        if code.is_ok() {
            // Whoever reads the output may be slow, and the user may not want to wait for it.
            tokio::select! {
                () = self.carried.drain(&self.streams) => {}
                _ = signals.ending() => {}
            }
        }
        code
    }

    async fn signal(&self, signal: u32, interrupts: u32) {
        let sent = match signal {
            WINCH => return self.resize().await,
            INT if interrupts >= INTERRUPTS_TO_KILL => self.process.kill(KILL, true).await,
            signal => self.process.kill(signal, false).await,
        };
        if let Err(error) = sent {
            // It may have ended in the meantime.
            tracing::debug!("signal {signal} was not delivered: {error}");
        }
    }

    async fn resize(&self) {
        if self.terminal.is_none() {
            return;
        }
        let Some((columns, rows)) = terminal_size() else { return };
        if let Err(error) = self.process.resize(columns, rows).await {
            tracing::debug!("the terminal was not resized: {error}");
        }
    }

    async fn close_stdin(&self) {
        if let Err(error) = self.process.close_stdin().await {
            tracing::debug!("the input was not closed: {error}");
        }
    }
}
