//! Figures on their way to Prometheus: its text format, and the families that describe a process.
//!
//! ```text
//!   /proc/<pid> ─▶ process() ─┐
//!   durations ────────────────┼─▶ Exposition ─▶ text ─▶ Families ─▶ whoever passes figures of others on
//!   any other figure ─────────┘
//! ```
//!
//! Agent, owner and node monitor write the same format, and the owner reads what a guest wrote, which may be anything:
//! [`Families`] takes nothing that a scraper would stumble over. Families of a process carry upstream's names and
//! items, and the units of proc(5): kB in `proc_status`, clock ticks in `proc_stat`.

mod families;

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

pub use families::Families;

/// What a family's figures mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only grows, until its process ends.
    Counter,
    /// It goes up and down.
    Gauge,
    /// Counts below bounds.
    Histogram,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// Families in the making, as the text of version 0.0.4 of the format.
#[derive(Debug, Default)]
pub struct Exposition(String);

/// The value of the header `Content-Type`.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

impl Exposition {
    /// Begins a family. Its samples come before the next family's.
    pub fn family(&mut self, name: &str, kind: Kind, help: &str) -> Family<'_> {
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        // Writing to a String never fails, here and below.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {}", kind.as_str());
        Family { text: &mut self.0, name: name.to_owned() }
    }

    /// The text.
    #[must_use]
    pub fn into_text(self) -> String {
        self.0
    }
}

/// See [`Exposition::family`].
#[derive(Debug)]
pub struct Family<'a> {
    text: &'a mut String,
    name: String,
}

impl Family<'_> {
    /// Adds one figure. Names of labels are taken as they are, values are escaped.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        self.suffixed("", labels, value);
    }

    fn suffixed(&mut self, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
        let _ = write!(self.text, "{}{suffix}", self.name);
        for (position, (label, value)) in labels.iter().enumerate() {
            let _ =
                write!(self.text, "{}{label}=\"{}\"", if position == 0 { '{' } else { ',' }, escaped(value));
        }
        let _ = writeln!(self.text, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }
}

/// A label's value as the format writes it. Control characters other than a line's end have no business there.
#[must_use]
pub fn escaped(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            c if c.is_control() => text.push(' '),
            c => text.push(c),
        }
    }
    text
}

/// Upper bounds of [`Durations`]' buckets, in milliseconds.
const BOUNDS: [u32; 13] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096];

/// How long each kind of action took: a histogram for each, in milliseconds. Made to be a `static`: it costs nothing
/// until something is recorded.
#[derive(Debug, Default)]
pub struct Durations(Mutex<BTreeMap<String, Histogram>>);

#[derive(Debug, Default)]
struct Histogram {
    /// How many were within each bound and in none lower.
    counts: [u64; BOUNDS.len()],
    count: u64,
    sum_ms: f64,
}

impl Durations {
    /// Nothing recorded yet.
    #[must_use]
    pub const fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    /// Counts one action.
    pub fn record(&self, action: &str, took: Duration) {
        let mut histograms = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !histograms.contains_key(action) {
            histograms.insert(action.to_owned(), Histogram::default());
        }
        let Some(histogram) = histograms.get_mut(action) else { return };
        let ms = took.as_secs_f64() * 1000.0;
        let bucket = histogram.counts.iter_mut().zip(BOUNDS).find(|(_, bound)| ms <= f64::from(*bound));
        if let Some((count, _)) = bucket {
            *count += 1;
        }
        histogram.count += 1;
        histogram.sum_ms += ms;
    }

    /// Writes the family, where anything was recorded; `label` names the action in it.
    pub fn write(&self, out: &mut Exposition, name: &str, help: &str, label: &str) {
        let histograms = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if histograms.is_empty() {
            return;
        }
        let mut family = out.family(name, Kind::Histogram, help);
        for (action, histogram) in histograms.iter() {
            let own = [(label, action.as_str())];
            let own = if label.is_empty() { &[] } else { own.as_slice() };
            let mut below = 0;
            for (count, bound) in histogram.counts.iter().zip(BOUNDS) {
                below += count;
                family.suffixed("_bucket", &[own, &[("le", &bound.to_string())]].concat(), below);
            }
            family.suffixed("_bucket", &[own, &[("le", "+Inf")]].concat(), histogram.count);
            family.suffixed("_sum", own, histogram.sum_ms);
            family.suffixed("_count", own, histogram.count);
        }
    }
}

/// Writes the families of a process that is made of the operating system's `processes`, directories as `/proc/17`: their
/// sum. Those that are gone count nothing, and where all are there is no family.
pub fn process(out: &mut Exposition, prefix: &str, of: &str, processes: &[impl AsRef<Path>]) {
    let read = |file: &str| -> Vec<String> {
        processes.iter().filter_map(|dir| std::fs::read_to_string(dir.as_ref().join(file)).ok()).collect()
    };
    let statuses = read("status");
    if statuses.is_empty() {
        return;
    }
    let status = summed(statuses.iter().flat_map(|text| colon_lines(text)));
    let mut family = out.family(&format!("{prefix}_threads"), Kind::Gauge, &format!("Threads of {of}."));
    family.sample(&[], status.get("threads").copied().unwrap_or_default());
    let fds: usize = processes
        .iter()
        .filter_map(|dir| std::fs::read_dir(dir.as_ref().join("fd")).ok())
        .map(Iterator::count)
        .sum();
    let mut family = out.family(&format!("{prefix}_fds"), Kind::Gauge, &format!("Open descriptors of {of}."));
    family.sample(&[], fds);
    let told = |name: &str| {
        ["vm", "rss", "hugetlb", "voluntary", "nonvoluntary"].iter().any(|start| name.starts_with(start))
    };
    let mut family = out.family(
        &format!("{prefix}_proc_status"),
        Kind::Gauge,
        &format!("/proc/<pid>/status of {of}: sizes in kB, and context switches."),
    );
    for (item, value) in status.iter().filter(|(name, _)| told(name)) {
        family.sample(&[("item", item)], value);
    }
    let ticks = summed(read("stat").iter().flat_map(|text| cpu_ticks(text)));
    let mut family = out.family(
        &format!("{prefix}_proc_stat"),
        Kind::Gauge,
        &format!("Processor time of {of} in clock ticks, from /proc/<pid>/stat."),
    );
    for (item, value) in &ticks {
        family.sample(&[("item", item)], value);
    }
    let io = summed(read("io").iter().flat_map(|text| colon_lines(text)));
    if !io.is_empty() {
        let help = format!("/proc/<pid>/io of {of}.");
        let mut family = out.family(&format!("{prefix}_io_stat"), Kind::Gauge, &help);
        for (item, value) in &io {
            family.sample(&[("item", item)], value);
        }
    }
}

fn summed(items: impl Iterator<Item = (String, u64)>) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    for (item, value) in items {
        let sum: &mut u64 = sums.entry(item).or_default();
        *sum = sum.saturating_add(value);
    }
    sums
}

/// `Name:   number …` lines, as /proc writes them, with the name in lower case.
pub fn colon_lines(text: &str) -> impl Iterator<Item = (String, u64)> {
    text.lines().filter_map(|line| {
        let (name, rest) = line.split_once(':')?;
        Some((name.trim().to_lowercase(), rest.split_whitespace().next()?.parse().ok()?))
    })
}

/// Fields 14 to 17 of `/proc/<pid>/stat`. The name in parentheses may hold anything: fields are counted from behind it.
fn cpu_ticks(stat: &str) -> Vec<(String, u64)> {
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().skip(11);
    ["utime", "stime", "cutime", "cstime"]
        .iter()
        .zip(fields)
        .filter_map(|(name, field)| Some(((*name).to_owned(), field.parse().ok()?)))
        .collect()
}

/// Labels that a figure may have; those that there are have six.
const LABELS_MAX: usize = 32;

/// One line with a figure, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample<'a> {
    /// Name of the figure; its family's, in a histogram with a suffix.
    pub name: &'a str,
    /// Labels: names, and values as they are written, escaped.
    pub labels: Vec<(&'a str, &'a str)>,
    /// The figure, and its time if it has one.
    pub value: &'a str,
}

impl<'a> Sample<'a> {
    /// Takes `line` apart; `None` where the format has no such line, and for comments.
    #[must_use]
    pub fn parse(line: &'a str) -> Option<Self> {
        if line.chars().any(char::is_control) {
            return None;
        }
        let end = line.find(['{', ' '])?;
        let (name, rest) = line.split_at_checked(end)?;
        let (labels, value) = match rest.strip_prefix('{') {
            Some(rest) => labels(rest)?,
            None => (Vec::new(), rest),
        };
        let value = value.trim();
        let mut words = value.split(' ');
        let figure = words.next().is_some_and(|word| word.parse::<f64>().is_ok());
        let time = words.next().is_none_or(|word| word.parse::<i64>().is_ok());
        (is_name(name, true) && figure && time && words.next().is_none()).then_some(Self {
            name,
            labels,
            value,
        })
    }
}

/// What is behind a `{`: the labels, and what follows the `}`.
fn labels(mut rest: &str) -> Option<(Vec<(&str, &str)>, &str)> {
    let mut labels = Vec::new();
    loop {
        if let Some(value) = rest.strip_prefix('}') {
            return Some((labels, value));
        }
        let (name, after) = rest.split_once("=\"")?;
        let end = closing_quote(after)?;
        let (value, after) = after.split_at_checked(end)?;
        // What begins like that is the scraper's own: it takes `__name__` for the name of the family.
        let reserved = name.starts_with("__");
        if labels.len() == LABELS_MAX
            || reserved
            || !is_name(name, false)
            || labels.iter().any(|(known, _)| *known == name)
        {
            return None;
        }
        labels.push((name, value));
        let after = after.strip_prefix('"')?;
        rest = match after.strip_prefix(',') {
            Some(more) => more,
            None if after.starts_with('}') => after,
            None => return None,
        };
    }
}

fn closing_quote(text: &str) -> Option<usize> {
    let mut escapes = false;
    for (position, c) in text.char_indices() {
        match c {
            '\\' if !escapes => escapes = true,
            '"' if !escapes => return Some(position),
            // What may follow a backslash.
            '\\' | '"' | 'n' => escapes = false,
            _ if escapes => return None,
            _ => {}
        }
    }
    None
}

/// Whether the format takes this as a figure's name or, without colons, a label's.
fn is_name(text: &str, colons: bool) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || (colons && c == ':');
    !text.is_empty() && !text.starts_with(|c: char| c.is_ascii_digit()) && text.chars().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_that_are_the_scrapers_own_or_without_end_are_refused() {
        assert_eq!(Sample::parse("a{__name__=\"b c\"} 1"), None);
        let with = |count: usize| {
            let labels: Vec<String> = (0..count).map(|number| format!("l{number}=\"\"")).collect();
            format!("a{{{}}} 1", labels.join(","))
        };
        assert!(Sample::parse(&with(LABELS_MAX)).is_some());
        assert_eq!(Sample::parse(&with(LABELS_MAX + 1)), None);
        // Not in the square of their number.
        let begin = std::time::Instant::now();
        assert_eq!(Sample::parse(&with(300_000)), None);
        assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    }

    #[test]
    fn a_family_is_written_with_its_samples() {
        let mut out = Exposition::default();
        let mut family = out.family("x_total", Kind::Counter, "What\nit is.");
        family.sample(&[("a", "1\"\\\n\u{1b}"), ("b", "")], 3);
        family.sample(&[], 0.5);
        let text = out.into_text();
        assert_eq!(
            text,
            "# HELP x_total What\\nit is.\n# TYPE x_total counter\nx_total{a=\"1\\\"\\\\\\n \",b=\"\"} 3\nx_total 0.5\n"
        );
        let line = text.lines().nth(2).unwrap();
        let sample = Sample::parse(line).unwrap();
        assert_eq!((sample.name, sample.value), ("x_total", "3"));
        assert_eq!(sample.labels, [("a", "1\\\"\\\\\\n "), ("b", "")]);
    }

    #[test]
    fn buckets_count_what_is_within_their_bound() {
        static TOOK: Durations = Durations::new();
        for ms in [1, 3, 5000] {
            TOOK.record("Create", Duration::from_millis(ms));
        }
        let mut out = Exposition::default();
        TOOK.write(&mut out, "d", "Durations.", "action");
        let text = out.into_text();
        for line in [
            "d_bucket{action=\"Create\",le=\"1\"} 1",
            "d_bucket{action=\"Create\",le=\"4\"} 2",
            "d_bucket{action=\"Create\",le=\"4096\"} 2",
            "d_bucket{action=\"Create\",le=\"+Inf\"} 3",
            "d_sum{action=\"Create\"} 5004",
            "d_count{action=\"Create\"} 3",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn a_process_has_the_families_that_upstream_has() {
        let mut out = Exposition::default();
        process(&mut out, "kata_shim", "the owner", &["/proc/self"]);
        let text = out.into_text();
        for start in [
            "kata_shim_threads ",
            "kata_shim_fds ",
            "kata_shim_proc_status{item=\"vmrss\"} ",
            "kata_shim_proc_stat{item=\"cstime\"} ",
            "kata_shim_io_stat{item=\"rchar\"} ",
        ] {
            assert!(text.lines().any(|line| line.starts_with(start)), "{start} is not in\n{text}");
        }
        assert!(text.lines().all(|line| line.starts_with('#') || Sample::parse(line).is_some()), "{text}");
    }

    #[test]
    fn two_processes_are_added_up_and_none_have_no_families() {
        let size = |processes: &[&str]| {
            let mut out = Exposition::default();
            process(&mut out, "p", "it", processes);
            let text = out.into_text();
            text.lines().find_map(|line| line.strip_prefix("p_threads ")?.parse::<u64>().ok())
        };
        let one = size(&["/proc/1"]).unwrap();
        assert_eq!(size(&["/proc/1", "/proc/1"]), Some(2 * one));
        assert_eq!(size(&["/proc/none"]), None);
    }

    #[test]
    fn lines_that_a_scraper_would_stumble_over_are_no_samples() {
        for good in ["a 1", "a{} 1", "a{b=\"c\"} NaN", "a:b{b=\"}\",} +Inf", "a 1 1234", "a -1e3"] {
            assert!(Sample::parse(good).is_some(), "{good}");
        }
        let bad = [
            "",
            "a",
            "a{b=\"c\"}",
            "a{b=\"c} 1",
            "a{b=c} 1",
            "a{b=\"c\"d=\"e\"} 1",
            "a{b=\"c\",b=\"d\"} 1",
            "a{b=\"\\x\"} 1",
            "1a 1",
            "a b",
            "a 1 2 3",
            "a\t1",
            "# TYPE a gauge",
            "ä 1",
        ];
        for bad in bad {
            assert!(Sample::parse(bad).is_none(), "{bad}");
        }
    }
}
