//! Colour, where a person looks at a terminal.

use std::os::fd::AsFd;
use std::sync::OnceLock;

/// When to use colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum When {
    /// On a terminal, unless `NO_COLOR` is set or `TERM` is `dumb`.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

static WHEN: OnceLock<When> = OnceLock::new();

/// Decides for the whole process, once.
pub fn decide(when: When) {
    // A second call would be a mistake without harm.
    let _ = WHEN.set(when);
}

/// The colours of one stream.
#[derive(Clone, Copy, Debug)]
pub struct Palette {
    on: bool,
}

impl Palette {
    /// Of the standard output.
    pub fn stdout() -> Self {
        Self::of(rustix::stdio::stdout())
    }

    fn of(stream: impl AsFd) -> Self {
        let auto = || {
            let set =
                |name| std::env::var_os(name).is_some_and(|value: std::ffi::OsString| !value.is_empty());
            let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
            rustix::termios::isatty(stream) && !set("NO_COLOR") && !dumb
        };
        let on = match WHEN.get().copied().unwrap_or_default() {
            When::Auto => auto(),
            When::Always => true,
            When::Never => false,
        };
        Self { on }
    }

    /// Good.
    pub fn green(self, text: &str) -> String {
        self.paint("32", text)
    }

    /// To be looked at.
    pub fn yellow(self, text: &str) -> String {
        self.paint("33", text)
    }

    /// Broken.
    pub fn red(self, text: &str) -> String {
        self.paint("1;31", text)
    }

    /// Less important.
    pub fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_terminal_text_stays_as_it_is() {
        let pipe = rustix::pipe::pipe().unwrap();
        assert_eq!(Palette::of(pipe.1).red("x"), "x");
        assert_eq!(Palette { on: true }.green("x"), "\x1b[32mx\x1b[0m");
    }
}
