//! `exec --vm`: a shell in the guest itself, or one command of it.
//!
//! The console carries one terminal and no exit code. For a command the shell is sent one line that brackets it with marks;
//! what is between them is the command's output, and the second one carries its code:
//!
//! ```text
//!   ▶ stty -echo -opost; printf '\036%s\n' B<nonce>; 'the' 'command' </dev/null; printf '\036%s:%d\n' E<nonce> $?; exit
//!   ◀ …the line, echoed, with \036 as four characters…  ␞B<nonce>⏎  output  ␞E<nonce>:<code>⏎
//! ```

use std::io::{IsTerminal, Write};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::super::{Outcome, exit_code};
use crate::failure::Failure;
use crate::pod::{Client, DebugConsole, PodDir, RawTerminal, Signals, is_terminal, random_name};

/// Longest line that a terminal takes before its shell has looked at it, less what goes around the command.
const COMMAND_MAX: usize = 3500;
/// Before each mark: no shell echoes it.
const RECORD_SEPARATOR: u8 = 0x1e;

/// Runs `command`, or a shell where there is none.
pub async fn run(name: &str, command: &[String]) -> Outcome {
    let pod = PodDir::alive(name)?;
    let mut signals = Signals::catch()?;
    let seen = Client::connect(&pod).await?.inspect().await?;
    let console = DebugConsole::connect(&pod, seen.debug_console).await?;
    tokio::select! {
        ended = async {
            match command {
                [] => shell(console).await,
                command => one(console, command).await,
            }
        } => ended,
        signal = signals.ending() => Ok(exit_code(128 + signal)),
    }
}

/// The user's terminal at the guest's shell; or the input as its script.
async fn shell(console: DebugConsole) -> Outcome {
    let raw = is_terminal() && std::io::stdout().is_terminal();
    let terminal = if raw { Some(RawTerminal::enter()?) } else { None };
    let (mut output, mut input) = console.0.into_split();
    // A thread, because the input may be anything; one that waits for input nobody types ends with the process.
    let (typed, mut keys) = tokio::sync::mpsc::channel::<Vec<u8>>(16);
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = rustix::io::read(rustix::stdio::stdin(), &mut buffer) {
            if typed.blocking_send(buffer.get(..count).unwrap_or_default().to_vec()).is_err() {
                return;
            }
        }
    });
    let mut buffer = vec![0; 16 << 10];
    let mut more_input = true;
    loop {
        tokio::select! {
            count = output.read(&mut buffer) => match count {
                Ok(0) | Err(_) => break,
                Ok(count) => {
                    let mut out = std::io::stdout().lock();
                    out.write_all(buffer.get(..count).unwrap_or_default()).and_then(|()| out.flush())?;
                }
            },
            keys = keys.recv(), if more_input => match keys {
                Some(keys) => input.write_all(&keys).await?,
                None => {
                    more_input = false;
                    input.write_all(b"\nexit\n").await?;
                }
            },
        }
    }
    drop(terminal);
    Ok(0)
}

async fn one(console: DebugConsole, command: &[String]) -> Outcome {
    let quoted: Vec<String> = command.iter().map(|word| quote(word)).collect();
    let quoted = quoted.join(" ");
    if quoted.len() > COMMAND_MAX || quoted.contains(['\n', '\r', '\0']) {
        return Err(Failure::text(format!(
            "the debug console takes commands of one line and {COMMAND_MAX} bytes at most; copy a script into a container instead"
        )));
    }
    let nonce = random_name()?;
    let mut stream = console.0;
    let line = format!(
        "stty -echo -opost 2>/dev/null; printf '\\036%s\\n' B{nonce}; {quoted} </dev/null; printf '\\036%s:%d\\n' E{nonce} $?; exit\n"
    );
    stream.write_all(line.as_bytes()).await?;
    let mut answer = Answer::new(&nonce);
    let mut buffer = vec![0; 16 << 10];
    loop {
        let count = match stream.read(&mut buffer).await {
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(error.into()),
        };
        if count == 0 {
            return Err(Failure::text("the guest's shell ended before the command did"));
        }
        let (output, code) = answer.take(buffer.get(..count).unwrap_or_default());
        let mut out = std::io::stdout().lock();
        out.write_all(&output).and_then(|()| out.flush())?;
        if let Some(code) = code {
            return Ok(exit_code(code));
        }
    }
}

/// A word as every shell reads it.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Bytes that an exit code may have, with what the terminal adds.
const CODE_MAX: usize = 64;

/// Finds the command's output between the marks.
struct Answer {
    begin: Vec<u8>,
    end: Vec<u8>,
    /// What is not decided yet.
    held: Vec<u8>,
    begun: bool,
    /// The terminal writes CR LF for LF, as one does that knows no `stty`.
    translated: bool,
}

impl Answer {
    fn new(nonce: &str) -> Self {
        let mark = |letter: char| [&[RECORD_SEPARATOR], format!("{letter}{nonce}").as_bytes()].concat();
        Self { begin: mark('B'), end: mark('E'), held: Vec::new(), begun: false, translated: false }
    }

    /// Takes what came; answers with output, and once there is one with the exit code.
    fn take(&mut self, new: &[u8]) -> (Vec<u8>, Option<u32>) {
        self.held.extend_from_slice(new);
        if !self.begun {
            let Some(at) = find(&self.held, &self.begin) else {
                // The shell's greetings; what may be the beginning of the mark is kept.
                let keep = self.begin.len().min(self.held.len());
                self.held.drain(..self.held.len() - keep);
                return (Vec::new(), None);
            };
            let rest = at + self.begin.len();
            let Some(line) =
                self.held.get(rest..).and_then(|rest| rest.iter().position(|byte| *byte == b'\n'))
            else {
                if self.held.len() - rest > CODE_MAX {
                    // Not the mark: that ends its line.
                    self.held.drain(..rest);
                }
                return (Vec::new(), None);
            };
            self.translated = line == 1;
            self.held.drain(..=rest + line);
            self.begun = true;
        }
        let Some(at) = find(&self.held, &self.end) else {
            // A mark may have begun, and a CR may belong to the LF to come.
            let keep = self.end.len().min(self.held.len());
            let output = self.held.drain(..self.held.len() - keep).collect();
            return (self.plain(output), None);
        };
        let after = self.held.get(at + self.end.len()..).unwrap_or_default();
        match parse_code(after) {
            // No code is as long: a guest that goes on says nothing that is of use.
            None if after.len() > CODE_MAX => {
                let output = self.held.drain(..).collect();
                (self.plain(output), Some(u32::from(u8::MAX)))
            }
            Some(code) => {
                let output = self.held.drain(..at).collect();
                (self.plain(output), Some(code))
            }
            None => (Vec::new(), None),
        }
    }

    fn plain(&mut self, mut output: Vec<u8>) -> Vec<u8> {
        if !self.translated {
            return output;
        }
        // A CR at the end waits for what follows it.
        if output.last() == Some(&b'\r') && !self.held.is_empty() {
            output.pop();
            self.held.insert(0, b'\r');
        }
        let mut plain = Vec::with_capacity(output.len());
        let mut bytes = output.iter().peekable();
        while let Some(byte) = bytes.next() {
            if *byte != b'\r' || bytes.peek() != Some(&&b'\n') {
                plain.push(*byte);
            }
        }
        plain
    }
}

/// `:<code>` and the end of the line.
fn parse_code(text: &[u8]) -> Option<u32> {
    let end = text.iter().position(|byte| *byte == b'\n')?;
    let digits = std::str::from_utf8(text.get(..end)?).ok()?;
    digits.trim_end().strip_prefix(':')?.parse().ok()
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|window| window == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the pieces are in which it comes.
    fn answered(text: &[u8]) -> Vec<(Vec<u8>, Option<u32>)> {
        [1, 2, 3, 7, text.len()]
            .map(|size| {
                let mut answer = Answer::new("77");
                let (mut output, mut code) = (Vec::new(), None);
                for piece in text.chunks(size) {
                    let (new, end) = answer.take(piece);
                    output.extend(new);
                    code = code.or(end);
                }
                (output, code)
            })
            .into()
    }

    #[test]
    fn a_guest_that_goes_on_and_on_is_not_kept() {
        let mut answer = Answer::new("77");
        for _ in 0..100 {
            assert_eq!(answer.take(&[b'x'; 1000]), (Vec::new(), None));
        }
        assert!(answer.held.len() < 100, "{}", answer.held.len());
        assert_eq!(answer.take(b"\x1eB77\nout"), (Vec::new(), None));
        let (_, code) = answer.take(&[b"\x1eE77:".as_slice(), &[b'9'; 100]].concat());
        assert_eq!(code, Some(255));
    }

    #[test]
    fn output_is_what_is_between_the_marks() {
        let text = b"# stty; printf '\\036%s\\n' B77; ls\r\n\x1eB77\none\ntwo\x1eE77:3\nexit\n";
        for answer in answered(text) {
            assert_eq!(answer, (b"one\ntwo".to_vec(), Some(3)));
        }
    }

    #[test]
    fn a_terminal_that_translates_line_feeds_is_undone() {
        for answer in answered(b"$ \x1eB77\r\na\r\n\rb\r\n\x1eE77:0\r\n") {
            assert_eq!(answer, (b"a\n\rb\n".to_vec(), Some(0)));
        }
    }

    #[test]
    fn nothing_is_told_before_the_command_has_begun_and_no_code_before_it_has_ended() {
        let mut answer = Answer::new("77");
        assert_eq!(answer.take(b"noise \x1eE77:1\n"), (vec![], None));
        assert_eq!(answer.take(b"\x1eB77\n").1, None);
    }

    #[test]
    fn words_reach_the_command_as_they_are() {
        assert_eq!(quote("a b"), "'a b'");
        assert_eq!(quote("it's $HOME"), r"'it'\''s $HOME'");
    }
}
