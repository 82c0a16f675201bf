//! Families that others have written: checked, labelled, put together and written again.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::{Exposition, Sample, escaped};

/// Figures that are kept of one text; one pod has some five hundred.
const SAMPLES_MAX: usize = 10_000;
const KINDS: [&str; 5] = ["counter", "gauge", "histogram", "summary", "untyped"];

/// Families by name, each once, with the samples of every text that was read.
#[derive(Debug, Default)]
pub struct Families(BTreeMap<String, Parts>);

#[derive(Debug, Default)]
struct Parts {
    kind: String,
    help: String,
    /// In the order in which they came, as the buckets of a histogram need.
    samples: Vec<(String, String)>,
    /// Names and labels of those, for a figure that comes twice makes a scraper refuse all of them.
    seen: BTreeSet<String>,
}

impl Families {
    /// Takes the families of `text` whose name `wanted` accepts, and gives their samples the labels `own` in place of any
    /// that they have by these names. Lines that the format does not know are left out, and what exceeds ten thousand samples.
    pub fn read(&mut self, text: &str, own: &[(&str, &str)], wanted: impl Fn(&str) -> bool) {
        let own: Vec<(&str, String)> = own.iter().map(|(name, value)| (*name, escaped(value))).collect();
        let mut of_text: BTreeMap<&str, (&str, &str)> = BTreeMap::new();
        let mut left = SAMPLES_MAX;
        for line in text.lines() {
            if let Some((name, rest)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
                if KINDS.contains(&rest) {
                    of_text.entry(name).or_default().0 = rest;
                }
            } else if let Some((name, rest)) =
                line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' '))
            {
                if !rest.chars().any(char::is_control) {
                    of_text.entry(name).or_default().1 = rest;
                }
            } else if left == 0 {
                break;
            } else if let Some(sample) = Sample::parse(line) {
                let family = family_of(sample.name, &of_text);
                if wanted(family) {
                    left -= 1;
                    let described = of_text.get(family).copied().unwrap_or_default();
                    self.0.entry(family.to_owned()).or_default().add(&sample, &own, described);
                }
            }
        }
    }

    /// Writes them, by name.
    pub fn write(&self, out: &mut Exposition) {
        for (name, parts) in &self.0 {
            // Writing to a String never fails.
            if !parts.help.is_empty() {
                let _ = writeln!(out.0, "# HELP {name} {}", parts.help);
            }
            let kind = if parts.kind.is_empty() { "untyped" } else { &parts.kind };
            let _ = writeln!(out.0, "# TYPE {name} {kind}");
            for (figure, value) in &parts.samples {
                let _ = writeln!(out.0, "{figure} {value}");
            }
        }
    }
}

impl Parts {
    fn add(&mut self, sample: &Sample<'_>, own: &[(&str, String)], (kind, help): (&str, &str)) {
        if self.samples.is_empty() {
            (self.kind, self.help) = (kind.to_owned(), help.to_owned());
        }
        let kept =
            sample.labels.iter().copied().filter(|(label, _)| own.iter().all(|(name, _)| name != label));
        let labels: Vec<String> = own
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
            .chain(kept)
            .map(|(name, value)| format!("{name}=\"{value}\""))
            .collect();
        let figure = match labels.as_slice() {
            [] => sample.name.to_owned(),
            labels => format!("{}{{{}}}", sample.name, labels.join(",")),
        };
        if self.seen.insert(figure.clone()) {
            self.samples.push((figure, sample.value.to_owned()));
        }
    }
}

/// The family that a figure belongs to: those of histograms and summaries have suffixes.
fn family_of<'a>(figure: &'a str, known: &BTreeMap<&'a str, (&str, &str)>) -> &'a str {
    let suffixed = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| {
        let family = figure.strip_suffix(suffix)?;
        known.get(family).filter(|(kind, _)| matches!(*kind, "histogram" | "summary")).map(|_| family)
    });
    suffixed.unwrap_or(figure)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(families: &Families) -> String {
        let mut out = Exposition::default();
        families.write(&mut out);
        out.into_text()
    }

    #[test]
    fn families_of_two_texts_are_put_together_under_labels_of_their_own() {
        let mut families = Families::default();
        let text = "# HELP a Some.\n# TYPE a gauge\na{item=\"x\",pod=\"forged\"} 1\n";
        families.read(text, &[("pod", "one")], |_| true);
        families.read("# TYPE a gauge\na{item=\"x\"} 2\nb 3\n", &[("pod", "t\"o")], |_| true);
        assert_eq!(
            written(&families),
            "# HELP a Some.\n# TYPE a gauge\na{pod=\"one\",item=\"x\"} 1\na{pod=\"t\\\"o\",item=\"x\"} 2\n\
             # TYPE b untyped\nb{pod=\"t\\\"o\"} 3\n"
        );
    }

    #[test]
    fn what_a_guest_forges_or_garbles_is_left_out() {
        let mut families = Families::default();
        let text = "kata_shim_fds 1\nkata_guest_load{item=\"load1\"} 2\nkata_guest_load{item=\"load1\"} 3\n\
                    kata_guest_x{y=\"\u{1b}[2J\"} 4\nkata_guest_x 5 garbage\n# TYPE kata_guest_x nonsense\nkata_guest_x 6\n";
        families.read(text, &[], |name| name.starts_with("kata_guest_"));
        assert_eq!(
            written(&families),
            "# TYPE kata_guest_load untyped\nkata_guest_load{item=\"load1\"} 2\n# TYPE kata_guest_x untyped\nkata_guest_x 6\n"
        );
        let mut families = Families::default();
        let many: String = (0..SAMPLES_MAX + 5).fold(String::new(), |text, n| text + &format!("a{n} 1\n"));
        families.read(&many, &[], |_| true);
        assert_eq!(families.0.len(), SAMPLES_MAX);
    }

    #[test]
    fn a_histogram_stays_one_family_in_order() {
        let text = "# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"+Inf\"} 2\nh_sum 3\nh_count 2\n";
        let mut families = Families::default();
        families.read(text, &[], |name| name == "h");
        assert_eq!(written(&families), text);
    }
}
