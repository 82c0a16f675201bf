//! The README's tour, run as it stands there.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;

use kata_testkit::host::Host;

/// A command of the tour and what the README says it prints.
#[derive(Debug)]
struct Step {
    command: String,
    expected: Vec<String>,
}

fn steps(readme: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut inside = false;
    for line in readme.lines() {
        if line.starts_with("```") {
            inside = line == "```console tour";
        } else if inside {
            match line.strip_prefix("$ ") {
                Some(command) => steps.push(Step { command: command.to_owned(), expected: Vec::new() }),
                None => steps.last_mut().unwrap().expected.push(line.to_owned()),
            }
        }
    }
    steps
}

/// Whether a line is as expected, where `[..]` stands for anything.
fn line_matches(expected: &str, found: &str) -> bool {
    let parts: Vec<&str> = expected.split("[..]").collect();
    let (first, last) = (parts[0], parts[parts.len() - 1]);
    if parts.len() == 1 {
        return expected == found;
    }
    let Some(mut rest) = found.strip_prefix(first).and_then(|rest| rest.strip_suffix(last)) else {
        return false;
    };
    parts[1..parts.len() - 1].iter().all(|part| {
        rest.find(part).is_some_and(|at| {
            rest = &rest[at + part.len()..];
            true
        })
    })
}

/// Whether the output is as expected; a line `...` stands for any further lines.
fn matches(expected: &[String], found: &[&str]) -> bool {
    match expected.split_first() {
        None => found.is_empty(),
        Some((line, [])) if line == "..." => true,
        Some((line, rest)) => found
            .split_first()
            .is_some_and(|(first, others)| line_matches(line, first) && matches(rest, others)),
    }
}

#[test]
fn every_command_of_the_tour_prints_what_the_readme_says() {
    let Some(host) = Host::new() else { return };
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md");
    let steps = steps(&std::fs::read_to_string(readme).unwrap());
    assert!(steps.len() > 12, "the tour has {} commands", steps.len());
    let work = host.scratch("tour");
    std::fs::create_dir_all(&work).unwrap();
    let path = format!("{}:{}", host.program("").display(), std::env::var("PATH").unwrap());
    let run = |command: &str| {
        let output = Command::new("sh")
            .args(["-c", &format!("{{ {command}; }} 2>&1")])
            .current_dir(&work)
            .env("PATH", &path)
            .env("IMAGE", host.image())
            .env("KATA_RUN_DIR", host.run_dir())
            .env("KATA_STATE_DIR", host.state_dir())
            .env("KATA_CONF_FILE", host.config())
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    for step in steps {
        // What a process in the background says takes a moment: nobody who reads on is as fast as this test.
        let text = if step.command.starts_with("kata-ctl logs") {
            host.wait_for("the log", || Some(run(&step.command)).filter(|text| !text.is_empty()))
        } else {
            run(&step.command)
        };
        let found: Vec<&str> = text.lines().collect();
        assert!(
            matches(&step.expected, &found),
            "$ {}\nexpected {:#?}\nfound {found:#?}",
            step.command,
            step.expected
        );
    }
}

#[test]
fn comparison_tells_lines_apart() {
    assert!(line_matches("a[..]c", "abc") && line_matches("[..]", "x") && !line_matches("a[..]c", "abd"));
    let expected = ["one".to_owned(), "...".to_owned()];
    assert!(matches(&expected, &["one", "two", "three"]) && !matches(&expected, &["two"]));
    assert!(!matches(&expected[..1], &["one", "two"]));
}
