//! How far the downloads of a pull are: bars on the standard error output.

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use kata_oci::{Advance, Digest, Progress};

/// The bars of one pull. They leave the terminal with the value.
pub struct Bars(MultiProgress);

impl Bars {
    /// Bars that can be seen, or not.
    pub fn new(visible: bool) -> Self {
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self(MultiProgress::with_draw_target(target))
    }
}

impl Progress for Bars {
    /// A bar with the first digits of the layer's digest.
    fn layer(&self, digest: &Digest, size: u64) -> Box<dyn Advance> {
        let bar = self.0.add(ProgressBar::new(size));
        if let Ok(style) = ProgressStyle::with_template("{prefix} {wide_bar} {bytes:>10}/{total_bytes:<10}") {
            bar.set_style(style);
        }
        bar.set_prefix(digest.hex().chars().take(12).collect::<String>());
        Box::new(Bar(bar))
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        // Only the look of a terminal is at stake.
        let _ = self.0.clear();
    }
}

struct Bar(ProgressBar);

impl Advance for Bar {
    fn by(&self, bytes: u64) {
        self.0.inc(bytes);
    }
}
