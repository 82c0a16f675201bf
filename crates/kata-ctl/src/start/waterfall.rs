//! A start as a picture: one row for each stage, by its begin, over a common axis of time.
//!
//! ```text
//!   0 ms            500 ms          1000 ms
//!   ▪ host  owner   ▌ 9.1
//!   ▪ vmm   start     ████ 240.2
//!   ▪ kernel boot          ███████████ 610.0
//! ```
//!
//! A name stands in a column of its own and a duration beside its bar, on the side where there is room: texts never meet.

use std::fmt::Write as _;

use super::{LAYERS, Start, ms};

const WIDTH: f64 = 960.0;
const NAMES: f64 = 290.0;
/// Room at the right end, for the last label of the axis.
const MARGIN: f64 = 34.0;
const ROW: f64 = 22.0;
const BAR: f64 = 13.0;
/// What is above the rows: the axis, and in a file of its own a title.
const AXIS: f64 = 34.0;
const TITLE: f64 = 28.0;
/// Least width of a bar: what took no time is still to be seen.
const LEAST: f64 = 2.0;
/// Width of a digit, about, in the size of a duration.
const DIGIT: f64 = 6.6;
/// Characters of a stage's name that fit into its column.
const NAME_MAX: usize = 30;

/// Colours of layers, for light and dark backgrounds: told apart also by those who do not tell red from green.
const COLOURS: [(&str, &str, &str); 5] = [
    ("host", "#3b6fb6", "#6aa1ee"),
    ("vmm", "#7a4fb0", "#b58ae8"),
    ("kernel", "#b3541e", "#f0955a"),
    ("agent", "#13795b", "#47c496"),
    ("container", "#b0892a", "#e8c15c"),
];

/// How pictures look. A page that holds several needs it once.
pub fn style() -> String {
    let mut light = String::new();
    let mut dark = String::new();
    for (layer, on_light, on_dark) in COLOURS {
        let _ = write!(light, ".kw .{layer}{{fill:{on_light}}}");
        let _ = write!(dark, ".kw .{layer}{{fill:{on_dark}}}");
    }
    format!(
        ".kw text{{font:12px system-ui,'DejaVu Sans',sans-serif;fill:#1f2328}}\
         .kw .title{{font-size:15px;font-weight:600}}.kw .dim{{fill:#59636e}}\
         .kw .num{{font-variant-numeric:tabular-nums;font-size:11px;fill:#59636e}}\
         .kw .end{{text-anchor:end}}.kw .mid{{text-anchor:middle}}\
         .kw line{{stroke:#d8dee4;stroke-width:1}}.kw .band{{fill:#f6f8fa}}.kw .other{{fill:#8b949e}}{light}\
         @media (prefers-color-scheme:dark){{.kw text{{fill:#e6edf3}}.kw .dim,.kw .num{{fill:#9aa4af}}\
         .kw line{{stroke:#30363d}}.kw .band{{fill:#161b22}}{dark}}}"
    )
}

/// The picture as a file of its own, on a background of its own.
pub fn file(start: &Start) -> String {
    let height = height(start) + TITLE;
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <svg xmlns=\"http://www.w3.org/2000/svg\" class=\"kw\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" role=\"img\" aria-label=\"{}\">\n<style>{}.kw .paper{{fill:#fff}}\
         @media (prefers-color-scheme:dark){{.kw .paper{{fill:#0d1117}}}}</style>\n\
         <rect class=\"paper\" width=\"100%\" height=\"100%\"/>\n<text class=\"title\" x=\"12\" y=\"24\">{}</text>\n\
         <g transform=\"translate(0 {TITLE})\">\n{}</g></svg>\n",
        escaped(&summary(start)),
        style(),
        escaped(&summary(start)),
        body(start)
    )
}

/// The picture as a part of a page that has the [`style`].
pub fn inline(start: &Start) -> String {
    let height = height(start);
    format!(
        "<svg class=\"kw\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">\n{}</svg>\n",
        escaped(&summary(start)),
        body(start)
    )
}

/// One sentence that tells what the picture shows.
fn summary(start: &Start) -> String {
    format!("Start of pod {}: {} ms, {}", start.id, ms(start.total_us()), start.machine())
}

fn height(start: &Start) -> f64 {
    AXIS + ROW * rows(start) + 12.0
}

fn rows(start: &Start) -> f64 {
    f64::from(u32::try_from(start.timeline.len()).unwrap_or(u32::MAX))
}

/// Where a moment is on the axis.
struct Scale {
    total_us: u64,
}

impl Scale {
    fn x(&self, us: u64) -> f64 {
        NAMES + self.width(us)
    }

    #[allow(clippy::cast_precision_loss, reason = "a picture has a thousand points")]
    fn width(&self, us: u64) -> f64 {
        (WIDTH - NAMES - MARGIN) * (us as f64 / self.total_us.max(1) as f64)
    }
}

fn body(start: &Start) -> String {
    let scale = Scale { total_us: start.total_us() };
    let mut svg = String::new();
    // Writing to a String never fails.
    let head = AXIS - 12.0;
    let _ = writeln!(svg, "<text class=\"num\" x=\"12\" y=\"{head}\">durations in ms</text>");
    for row in (0..start.timeline.len()).step_by(2) {
        let y = AXIS + ROW * f64::from(u32::try_from(row).unwrap_or(u32::MAX));
        let _ = writeln!(svg, "<rect class=\"band\" x=\"0\" y=\"{y}\" width=\"{WIDTH}\" height=\"{ROW}\"/>");
    }
    axis(&mut svg, &scale, AXIS + ROW * rows(start));
    let mut y = AXIS;
    for stage in &start.timeline {
        let class =
            LAYERS.iter().map(|(layer, _)| *layer).find(|layer| *layer == stage.layer).unwrap_or("other");
        let (text, bar) = (y + ROW / 2.0 + 4.0, y + (ROW - BAR) / 2.0);
        let (x, width) = (scale.x(stage.start_us), scale.width(stage.duration_us).max(LEAST));
        let (duration, at) = (ms(stage.duration_us), ms(stage.start_us));
        let _ = writeln!(
            svg,
            "<g><title>{} · {}: {duration} ms, from {at} ms</title><rect class=\"{class}\" x=\"12\" y=\"{:.1}\" width=\"9\" \
             height=\"9\" rx=\"2\"/><text class=\"dim\" x=\"28\" y=\"{text:.1}\">{}</text><text x=\"96\" y=\"{text:.1}\">{}</text>",
            escaped(&stage.layer),
            escaped(&stage.name),
            y + (ROW - 9.0) / 2.0,
            escaped(&stage.layer),
            escaped(&shortened(&stage.name)),
        );
        let _ = write!(
            svg,
            "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{bar:.1}\" width=\"{width:.1}\" height=\"{BAR}\" rx=\"2\"/>"
        );
        let label = DIGIT * f64::from(u32::try_from(duration.len()).unwrap_or(u32::MAX));
        let (class, place) = if x + width + 6.0 + label <= WIDTH - 2.0 {
            ("num", x + width + 5.0)
        } else {
            ("num end", x - 5.0)
        };
        let _ =
            writeln!(svg, "<text class=\"{class}\" x=\"{place:.1}\" y=\"{text:.1}\">{duration}</text></g>");
        y += ROW;
    }
    svg
}

/// Marks at round times, five to ten of them.
fn axis(svg: &mut String, scale: &Scale, bottom: f64) {
    let step = step(scale.total_us);
    let mut at = 0_u64;
    while at <= scale.total_us {
        let x = scale.x(at);
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" y1=\"{:.1}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\"/><text class=\"num mid\" x=\"{x:.1}\" y=\"{:.1}\">{}</text>",
            AXIS - 6.0,
            AXIS - 12.0,
            mark(at, step)
        );
        at = at.saturating_add(step);
    }
}

/// A round number of microseconds: 1, 2 or 5 times a power of ten.
fn step(total_us: u64) -> u64 {
    let mut step = 1;
    for factor in [2, 5, 10].into_iter().cycle().take(57) {
        if total_us / step <= 8 {
            break;
        }
        let decade = 10_u64.pow(step.ilog10());
        step = decade.saturating_mul(factor);
    }
    step
}

fn mark(us: u64, step: u64) -> String {
    match (us, step) {
        (0, _) => "0".to_owned(),
        (us, 1_000_000..) => format!("{} s", us / 1_000_000),
        (us, 100_000..) if us >= 1_000_000 => format!("{}.{} s", us / 1_000_000, us % 1_000_000 / 100_000),
        (us, 1000..) => format!("{} ms", us / 1000),
        (us, _) => format!("{us} µs"),
    }
}

fn shortened(name: &str) -> String {
    match name.char_indices().nth(NAME_MAX) {
        Some(_) => name.chars().take(NAME_MAX - 1).chain(['…']).collect(),
        None => name.to_owned(),
    }
}

/// Text as XML and HTML take it, between tags and as an attribute. Control characters have no place in either.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    #[test]
    fn marks_are_round_and_few() {
        for (total_us, expected) in
            [(1, 1), (9, 2), (950, 200), (1_930_000, 500_000), (60_000_000, 10_000_000)]
        {
            assert_eq!(step(total_us), expected, "{total_us}");
        }
        for total_us in (1..3_000_000).step_by(997) {
            assert!((1..=8).contains(&(total_us / step(total_us))), "{total_us}");
        }
        assert_eq!(mark(1_500_000, 500_000), "1.5 s");
        assert_eq!(mark(200_000, 100_000), "200 ms");
        assert_eq!(step(u64::MAX).ilog10(), 18);
    }

    #[test]
    fn a_picture_has_every_stage_and_stays_within_its_frame() {
        let start = samples::start("web");
        let svg = file(&start);
        for stage in &start.timeline {
            assert!(svg.contains(&escaped(&stage.name)), "{}", stage.name);
        }
        let ends = svg.lines().filter_map(|line| {
            let (_, bar) = line.rsplit_once("<rect class=")?;
            let number = |key: &str| bar.split_once(key)?.1.split('"').next()?.parse::<f64>().ok();
            Some(number(" x=\"")? + number(" width=\"")?)
        });
        assert!(ends.clone().count() >= start.timeline.len());
        assert!(ends.clone().all(|end| end <= WIDTH), "{svg}");
    }

    #[test]
    fn names_cannot_become_markup() {
        let mut start = samples::start("a\"><script>");
        start.timeline[0].name = "</text><script>alert(1)</script>".to_owned();
        start.timeline[1].layer = "\" onload=\"x".to_owned();
        let svg = file(&start);
        assert!(!svg.contains("<script") && !svg.contains("\" onload"), "{svg}");
    }

    #[test]
    fn a_start_without_stages_is_an_empty_picture() {
        assert!(inline(&Start::default()).contains("0.0 ms"));
    }
}
