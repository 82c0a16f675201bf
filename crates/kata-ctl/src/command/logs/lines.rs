//! The owner's log, line by line: `TIME LEVEL TARGET: MESSAGE`, and further lines of a message below it.

use std::fs::File;
use std::io::{self, Read};

use serde::Serialize;

use crate::colour::Palette;

/// Who said something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The owner itself.
    Owner,
    /// The virtual machine monitor and its helpers.
    Vmm,
    /// The guest's kernel.
    Console,
    /// The guest's agent.
    Agent,
}

/// One thing that was said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// RFC 3339, UTC.
    pub time: String,
    /// `ERROR`, `WARN`, `INFO`, `DEBUG` or `TRACE`.
    pub level: String,
    pub source: Source,
    /// May hold line feeds.
    pub message: String,
}

impl Line {
    /// `None` for the continuation of another.
    fn parse(text: &str) -> Option<Self> {
        let (time, rest) = text.split_once(' ')?;
        let (level, rest) = rest.trim_start().split_once(' ')?;
        let is_level = matches!(level, "ERROR" | "WARN" | "INFO" | "DEBUG" | "TRACE");
        if !is_level || !time.ends_with('Z') || !time.starts_with(|c: char| c.is_ascii_digit()) {
            return None;
        }
        let (target, message) = rest.split_once(": ").unwrap_or_else(|| (rest.trim_end_matches(':'), ""));
        let source = match target {
            "agent" => Source::Agent,
            "console" => Source::Console,
            "vmm" => Source::Vmm,
            _ => Source::Owner,
        };
        // Which module of the owner's it is tells its developers more than anybody else.
        let message = if source == Source::Owner { rest } else { message };
        Some(Self { time: time.to_owned(), level: level.to_owned(), source, message: message.to_owned() })
    }

    /// One line, or several for a message of several.
    pub fn as_text(&self) -> String {
        let palette = Palette::stdout();
        let level = format!("{:5}", self.level);
        let level = match self.level.as_str() {
            "ERROR" => palette.red(&level),
            "WARN" => palette.yellow(&level),
            _ => level,
        };
        let source = match self.source {
            Source::Owner => "owner  ",
            Source::Vmm => "vmm    ",
            Source::Console => "console",
            Source::Agent => "agent  ",
        };
        format!("{}  {source}  {level}  {}\n", palette.dim(&self.time), self.message)
    }
}

/// A log that is still written.
pub struct Lines {
    file: File,
    /// The beginning of a line whose end is not written yet.
    rest: Vec<u8>,
    /// The last one, which may go on.
    last: Option<Line>,
}

impl Lines {
    /// Of `file`, from where it is.
    pub fn new(file: File) -> Self {
        Self { file, rest: Vec::new(), last: None }
    }

    /// What was said since; with `all`, also what may go on.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(&mut self, all: bool) -> io::Result<Vec<Line>> {
        self.file.read_to_end(&mut self.rest)?;
        let whole = match all {
            true => self.rest.len(),
            false => self.rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1),
        };
        let text: Vec<u8> = self.rest.drain(..whole).collect();
        let mut lines = Vec::new();
        for text in String::from_utf8_lossy(&text).lines() {
            match (Line::parse(text), &mut self.last) {
                (Some(line), last) => lines.extend(last.replace(line)),
                (None, Some(last)) => {
                    last.message.push('\n');
                    last.message.push_str(text);
                }
                // The end of a line that was there before this began.
                (None, None) => {}
            }
        }
        // Messages of several lines are written at once: one that has its end goes on only by a mistake.
        if all || self.rest.is_empty() {
            lines.extend(self.last.take());
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const LOG: &str = "2026-11-25T15:02:29.829393Z  INFO kata_sandbox::lifecycle: transition pod=\"w\"\n\
        2026-11-25T15:02:29.9Z  INFO vmm: qemu: terminating\n\
        2026-11-25T15:02:30.1Z  WARN console: [  0.1] odd: very\n\
        2026-11-25T15:02:30.2Z ERROR agent: it broke pod=\"w\"\n  | line 2\n";

    fn log(text: &str) -> (File, Lines) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("owner.log");
        std::fs::write(&path, text).unwrap();
        let writer = File::options().append(true).open(&path).unwrap();
        (writer, Lines::new(File::open(path).unwrap()))
    }

    #[test]
    fn lines_are_told_apart_by_who_said_them() {
        let lines = log(LOG).1.read(true).unwrap();
        let told: Vec<_> =
            lines.iter().map(|line| (line.source, line.level.as_str(), line.message.as_str())).collect();
        assert_eq!(
            told,
            [
                (Source::Owner, "INFO", "kata_sandbox::lifecycle: transition pod=\"w\""),
                (Source::Vmm, "INFO", "qemu: terminating"),
                (Source::Console, "WARN", "[  0.1] odd: very"),
                (Source::Agent, "ERROR", "it broke pod=\"w\"\n  | line 2"),
            ]
        );
    }

    #[test]
    fn a_line_that_is_half_written_is_waited_for() {
        let (mut writer, mut lines) = log("2026-11-25T15:02:30.1Z  INFO agent: ha");
        assert_eq!(lines.read(false).unwrap(), []);
        writer.write_all(b"lf\n").unwrap();
        assert_eq!(lines.read(false).unwrap()[0].message, "half");
    }

    #[test]
    fn a_guest_cannot_pass_for_the_owner() {
        // Control characters, line feeds among them, are taken out before its words reach the log.
        let text = "2026-11-25T15:02:30.1Z  INFO console: 2026-11-25T15:02:30.1Z  INFO kata: fine\n";
        assert_eq!(log(text).1.read(true).unwrap()[0].source, Source::Console);
    }
}
