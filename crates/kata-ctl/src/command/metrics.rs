//! `metrics`

use std::collections::BTreeMap;
use std::time::Duration;

use kata_api::metrics::Sample;
use serde_json::{Value, json};

use super::{Outcome, named};
use crate::cli::MetricsArgs;
use crate::failure::Failure;
use crate::pod::management::ask;

/// Bound on the answer: a guest that hangs costs two seconds of it.
const BOUND: Duration = Duration::from_secs(10);

/// Prints the pod's figures, as a scraper gets them or as JSON.
pub async fn run(args: &MetricsArgs) -> Outcome {
    let pod = named(&args.name)?;
    let text = ask(&pod.run_dir, ("GET", "/metrics"), Vec::new(), BOUND).await?;
    let text = String::from_utf8(text.into()).map_err(|_| Failure::text("the figures are no text"))?;
    if args.json {
        println!("{:#}", as_json(&text));
    } else {
        print!("{text}");
    }
    Ok(0)
}

/// A list of figures: `{"name", "labels", "value"}`. What JSON has no number for is a string.
fn as_json(text: &str) -> Value {
    let samples = text.lines().filter_map(Sample::parse).map(|sample| {
        let labels: BTreeMap<&str, String> =
            sample.labels.iter().map(|(name, value)| (*name, unescaped(value))).collect();
        let value = sample.value.split(' ').next().unwrap_or_default();
        let number = value.parse::<f64>().ok().and_then(serde_json::Number::from_f64);
        let value = number.map_or_else(|| json!(value), Value::Number);
        json!({ "name": sample.name, "labels": labels, "value": value })
    });
    Value::Array(samples.collect())
}

fn unescaped(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match (c, c == '\\') {
            (_, true) => text.extend(chars.next().map(|next| if next == 'n' { '\n' } else { next })),
            (c, false) => text.push(c),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_told_with_their_labels() {
        let text = "# TYPE a gauge\na{b=\"c\\\"\\n\"} 1.5\na NaN\n";
        assert_eq!(
            as_json(text),
            json!([
                { "name": "a", "labels": { "b": "c\"\n" }, "value": 1.5 },
                { "name": "a", "labels": {}, "value": "NaN" },
            ])
        );
    }
}
