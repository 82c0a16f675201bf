//! `analyze`: where the time of a start went, and how two starts differ.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::Outcome;
use crate::cli::{AnalyzeArgs, AnalyzeCommand, CompareArgs};
use crate::failure::{self, Failure};
use crate::start::{self, Share, SourceError, Stage, Start, ms, shares, waterfall};
use crate::table;

/// Width of a whole start, in characters.
const BARS: u64 = 40;

/// Tells about one start, or two.
pub async fn run(args: &AnalyzeArgs) -> Outcome {
    if let Some(AnalyzeCommand::Compare(args)) = &args.command {
        return compare(args).await;
    }
    let start = match &args.pod {
        Some(name) => resolve(name).await?,
        None => start::last().map_err(absent)?,
    };
    if let Some(file) = &args.svg {
        let svg = waterfall::file(&start);
        if file == Path::new("-") {
            print!("{svg}");
            return Ok(0);
        }
        std::fs::write(file, svg)
            .map_err(|error| Failure::text(format!("cannot write {}: {error}", file.display())))?;
    }
    if args.json {
        println!("{:#}", as_json(&start)?);
    } else {
        print!("{}", report(&start));
    }
    Ok(0)
}

/// A saved start where there is such a file, else a pod's.
async fn resolve(name: &str) -> Result<Start, Failure> {
    let path = Path::new(name);
    if path.is_file() {
        return start::read(path).map_err(absent);
    }
    start::find(name).await.map_err(absent)
}

fn absent(error: SourceError) -> Failure {
    if error.is_absent() { Failure::with_code(failure::NO_SUCH, error) } else { error.into() }
}

fn as_json(start: &Start) -> Result<Value, Failure> {
    let mut value = serde_json::to_value(start)?;
    let layers =
        shares(start).into_iter().map(|share| json!({ "layer": share.layer, "own_us": share.own_us }));
    if let Value::Object(keys) = &mut value {
        keys.insert("total_us".to_owned(), start.total_us().into());
        keys.insert("layers".to_owned(), layers.collect());
    }
    Ok(value)
}

fn report(start: &Start) -> String {
    let total = start.total_us();
    let header = ["  AT (ms)", "TOOK (ms)", "LAYER", "STAGE", ""].map(str::to_owned);
    let row = |stage: &Stage| {
        [
            format!("{:>9}", ms(stage.start_us)),
            format!("{:>9}", ms(stage.duration_us)),
            stage.layer.clone(),
            stage.name.clone(),
            bar(stage, total),
        ]
    };
    let lines: Vec<[String; 5]> = std::iter::once(header).chain(start.timeline.iter().map(row)).collect();
    let fault = start.fault.as_ref().map(|fault| format!("\nThe pod failed: {fault}\n")).unwrap_or_default();
    format!(
        "Pod {}: {} ms, {}\n\n{}\n{}{fault}",
        start.id,
        ms(total),
        start.machine(),
        table::columns(&lines),
        layers(&shares(start), total)
    )
}

/// Each layer's own time; together they are the whole start.
fn layers(shares: &[Share], total: u64) -> String {
    let header = ["  OWN (ms)", "SHARE", "LAYER", ""].map(str::to_owned);
    let row = |share: &Share| {
        let about = start::LAYERS.iter().find(|(layer, _)| *layer == share.layer).map(|(_, about)| *about);
        [
            format!("{:>10}", ms(share.own_us)),
            format!("{:>4} %", percent(share.own_us, total)),
            share.layer.clone(),
            about.unwrap_or("between stages").to_owned(),
        ]
    };
    let told = shares.iter().filter(|share| share.own_us > 0).map(row);
    let lines: Vec<[String; 4]> = std::iter::once(header).chain(told).collect();
    table::columns(&lines)
}

fn percent(part: u64, total: u64) -> u64 {
    part.saturating_mul(200).checked_div(total).map_or(0, |twice| twice.div_ceil(2)).min(100)
}

fn bar(stage: &Stage, total: u64) -> String {
    let column = |us: u64| us.saturating_mul(BARS).checked_div(total).unwrap_or_default();
    let (from, to) = (column(stage.start_us).min(BARS - 1), column(stage.end_us()).min(BARS));
    let count = |n: u64| usize::try_from(n).unwrap_or_default();
    format!("{}{}", " ".repeat(count(from)), "█".repeat(count(to.saturating_sub(from).max(1))))
}

async fn compare(args: &CompareArgs) -> Outcome {
    let (one, two) = (resolve(&args.a).await?, resolve(&args.b).await?);
    let rows = differences(&one, &two);
    if args.json {
        let stages = rows.iter().map(|row| {
            json!({ "layer": row.layer, "stage": row.stage, "a_us": row.a, "b_us": row.b, "difference_us": row.difference() })
        });
        let total = json!({ "a_us": one.total_us(), "b_us": two.total_us(),
            "difference_us": signed(two.total_us()) - signed(one.total_us()) });
        println!(
            "{:#}",
            json!({ "a": one.id, "b": two.id, "total": total, "stages": Value::from_iter(stages) })
        );
        return Ok(0);
    }
    let header = ["  A (ms)", "  B (ms)", "B - A (ms)", "LAYER", "STAGE"].map(str::to_owned);
    let cell = |us: Option<u64>| format!("{:>8}", us.map_or_else(|| "-".to_owned(), ms));
    let line = |row: &Row| {
        let difference = format!("{:>10}", signed_ms(row.difference()));
        [cell(row.a), cell(row.b), difference, row.layer.clone(), row.stage.clone()]
    };
    let total = Row {
        layer: "total".to_owned(),
        stage: String::new(),
        a: Some(one.total_us()),
        b: Some(two.total_us()),
    };
    let lines: Vec<[String; 5]> =
        std::iter::once(header).chain(rows.iter().chain([&total]).map(line)).collect();
    print!(
        "A  {}: {} ms, {}\nB  {}: {} ms, {}\n\n{}",
        one.id,
        ms(one.total_us()),
        one.machine(),
        two.id,
        ms(two.total_us()),
        two.machine(),
        table::columns(&lines)
    );
    Ok(0)
}

/// A stage of two starts.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    layer: String,
    stage: String,
    a: Option<u64>,
    b: Option<u64>,
}

impl Row {
    /// What the second took longer.
    fn difference(&self) -> i64 {
        signed(self.b.unwrap_or_default()) - signed(self.a.unwrap_or_default())
    }
}

fn signed(us: u64) -> i64 {
    i64::try_from(us).unwrap_or(i64::MAX)
}

fn signed_ms(us: i64) -> String {
    let sign = if us < 0 { "-" } else { "+" };
    format!("{sign}{}", ms(us.unsigned_abs()))
}

/// Stages of either start in their order, those of the second that the first has not at the end.
fn differences(one: &Start, two: &Start) -> Vec<Row> {
    let (first, mut second) = (stages(one), stages(two));
    let mut rows: Vec<Row> = first
        .into_iter()
        .map(|((layer, stage), us)| {
            let same = second.iter().position(|(key, _)| (&key.0, &key.1) == (&layer, &stage));
            let b = same.map(|position| second.remove(position).1);
            Row { layer, stage, a: Some(us), b }
        })
        .collect();
    let rest = second.into_iter();
    rows.extend(rest.map(|((layer, stage), us)| Row { layer, stage, a: None, b: Some(us) }));
    rows
}

type Keyed = ((String, String), u64);

/// Durations by layer and stage. Containers have other names in each pod: they are numbered.
fn stages(start: &Start) -> Vec<Keyed> {
    const OF_CONTAINERS: [&str; 4] = ["files of ", "late network of ", "create ", "start "];
    let mut containers: BTreeMap<String, usize> = BTreeMap::new();
    let mut found: Vec<Keyed> = Vec::new();
    for stage in &start.timeline {
        let names_one = matches!(stage.layer.as_str(), "host" | "container");
        let split = OF_CONTAINERS
            .iter()
            .find_map(|verb| stage.name.strip_prefix(verb).map(|id| (*verb, id)))
            .filter(|_| names_one);
        let name = match split {
            Some((verb, id)) => {
                let next = containers.len() + 1;
                format!("{verb}container {}", containers.entry(id.to_owned()).or_insert(next))
            }
            None => stage.name.clone(),
        };
        let key = (stage.layer.clone(), name);
        match found.iter_mut().find(|(known, _)| *known == key) {
            Some((_, us)) => *us = us.saturating_add(stage.duration_us),
            None => found.push((key, stage.duration_us)),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::start::samples;

    #[test]
    fn the_report_has_every_stage_its_place_and_every_layer_its_share() {
        let text = report(&samples::start("web"));
        assert!(text.starts_with("Pod web: 1000.0 ms, qemu with tcg\n"), "{text}");
        let lines: Vec<String> =
            text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        let bar = "█".repeat(20);
        assert!(lines.contains(&format!("300.0 500.0 kernel boot {bar}")), "{text}");
        assert!(lines.contains(&"500.0 50 % kernel the guest's kernel".to_owned()), "{text}");
    }

    #[test]
    fn pods_are_compared_by_stage_whatever_their_containers_are_called() {
        let (one, mut two) = (samples::start("web"), samples::start("db"));
        two.timeline[4].duration_us += 1_500;
        two.timeline.remove(1);
        let rows = differences(&one, &two);
        let row = |stage: &str| rows.iter().find(|row| row.stage == stage).unwrap();
        assert_eq!(row("boot").difference(), 1_500);
        assert_eq!(row("create container 1").difference(), 0);
        assert_eq!((row("virtio-fs daemon").b, row("virtio-fs daemon").difference()), (None, -3_000));
        assert_eq!(signed_ms(-1_500), "-1.5");
    }

    #[test]
    fn json_of_a_start_reads_back() {
        let start = samples::start("web");
        let value = as_json(&start).unwrap();
        assert_eq!(value["total_us"], 1_000_000);
        assert_eq!(serde_json::from_value::<Start>(value).unwrap(), start);
    }
}
