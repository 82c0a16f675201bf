//! Samples, rows, and the table in the document.

use std::fmt::Write as _;
use std::process::Command;

use super::{Accelerator, Bench};
use crate::Chores;
use crate::shell::{self, ChoreError, tree};

const BEGIN: &str = "<!-- measured: begin -->";
const END: &str = "<!-- measured: end -->";

/// Samples of one figure.
pub struct Samples(Vec<f64>);

impl Samples {
    /// Takes samples in any order.
    pub fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// The middle sample.
    pub fn median(&self) -> f64 {
        self.0.get(self.0.len() / 2).copied().unwrap_or(f64::NAN)
    }

    fn spread(&self, digits: usize) -> String {
        match (self.0.first(), self.0.last()) {
            (Some(least), Some(most)) if self.0.len() > 1 => format!("{least:.digits$}–{most:.digits$}"),
            _ => "–".to_owned(),
        }
    }
}

/// A line of the table.
pub struct Row {
    /// What was measured.
    pub what: String,
    /// Unit of the figures; empty for ratios.
    pub unit: &'static str,
    /// The samples.
    pub samples: Samples,
    /// The most that is allowed, where there is a budget.
    pub budget: Option<f64>,
}

/// A line of these samples.
pub fn row(what: impl Into<String>, unit: &'static str, samples: Vec<f64>, budget: Option<f64>) -> Row {
    Row { what: what.into(), unit, samples: Samples::new(samples), budget }
}

impl Row {
    fn render(&self) -> String {
        let digits = if self.unit.is_empty() { 2 } else { 1 };
        let median = self.samples.median();
        let budget = self.budget.map_or_else(|| "–".to_owned(), |most| format!("{most}"));
        let verdict = match self.budget {
            None => "",
            Some(most) if median <= most => "kept",
            Some(_) => "**missed**",
        };
        let unit = if self.unit.is_empty() { String::new() } else { format!(" {}", self.unit) };
        let spread = self.samples.spread(digits);
        format!(
            "| {} | {median:.digits$}{unit} | {spread} | {} | {budget} | {verdict} |",
            self.what,
            self.samples.0.len()
        )
    }
}

/// The table with its circumstances.
pub fn render(rows: &[Row], bench: &Bench) -> Chores<String> {
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let commit = std::env::var(super::COMMIT).or_else(|_| commit())?;
    let date = shell::output(Command::new("date").args(["-u", "+%Y-%m-%d"]))?;
    let guest = shell::output(&mut bench.ctl(&["run", "--rm", &bench.image, "uname", "-r"]))?;
    let mut text = format!(
        "Measured {} at commit {} with guest kernel {} on host kernel {}, QEMU with {}.\n\n",
        date.trim(),
        commit.trim(),
        guest.trim(),
        host.trim(),
        match bench.accelerator {
            Accelerator::Tcg => "TCG where KVM is not usable",
            Accelerator::Kvm => "KVM, on a machine that is emulated itself: only ratios mean something",
        }
    );
    text.push_str("| what | median | least–most | runs | budget | |\n|---|---|---|---|---|---|\n");
    for row in rows {
        let _ = writeln!(text, "{}", row.render());
    }
    Ok(text)
}

/// The commit that is checked out.
pub fn commit() -> Chores<String> {
    shell::output(Command::new("git").current_dir(tree()).args(["rev-parse", "--short", "HEAD"]))
}

/// The page with the table in its place.
pub fn insert(page: &str, table: &str) -> Chores<String> {
    let parts = page.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let (before, after) = parts
        .ok_or_else(|| ChoreError::Found("docs/performance.md has no place for the table".to_owned()))?;
    Ok(format!("{before}{BEGIN}\n{table}{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_replaces_the_old_one_and_nothing_else() {
        let page = format!("# a\n{BEGIN}\nold\n{END}\nrest\n");
        assert_eq!(insert(&page, "new\n").unwrap(), format!("# a\n{BEGIN}\nnew\n{END}\nrest\n"));
        assert!(insert("nothing", "new").is_err());
    }

    #[test]
    fn missed_budget_is_said() {
        let row = |value| row("x", "", vec![value], Some(1.3));
        assert!(row(1.4).render().contains("missed") && row(1.2).render().contains("kept"));
    }
}
