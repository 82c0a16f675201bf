//! What is kept for old users only must say under which id: hidden flags and verbs, second names of keys and flags,
//! `#[deprecated]` items. What is hidden for another reason says `stays: why` in a comment.

use kata_config::deprecation::{Registry, Stage};

use super::Source;

/// What such a thing is written as. `visible_alias` shows itself.
const MARKS: [&str; 8] = [
    "#[deprecated",
    "#[serde(alias",
    "hide = true",
    ".hide(true)",
    "alias = \"",
    "aliases = [",
    ".alias(",
    ".aliases(",
];

/// How far above a mark its comment may be.
const REACH: usize = 6;

/// Where a mark has neither an id nor a reason to stay.
pub fn faults(registry: &Registry, sources: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    // These lines are full of marks.
    let sources = sources.iter().filter(|(path, _)| !path.ends_with("xtask/src/deprecations/hidden.rs"));
    for (path, text) in sources {
        let lines: Vec<&str> = text.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let shown = code.contains("visible_alias");
            if shown || !MARKS.iter().any(|mark| code.contains(mark)) {
                continue;
            }
            let said = comments(lines.get(..=index).unwrap_or_default());
            let place = format!("{path}:{}", index + 1);
            match (id(&said), said.contains("stays: ")) {
                (Some(id), _) => found.extend(unfit(registry, id).map(|fault| format!("{place}: {fault}"))),
                (None, true) => {}
                (None, false) => found.push(format!(
                    "{place}: `{}` keeps something for old users: name its id, or `// stays: why`",
                    code.trim()
                )),
            }
        }
    }
    found
}

/// The comments on the last of these lines and on those above that belong to it.
fn comments(lines: &[&str]) -> String {
    let mut said = String::new();
    for (distance, line) in lines.iter().rev().enumerate().take(REACH) {
        let trimmed = line.trim();
        let ends = trimmed.is_empty() || trimmed.ends_with([';', '{', '}']);
        if distance > 0 && ends {
            break;
        }
        if let Some((_, comment)) = line.split_once("//") {
            said.push_str(comment);
            said.push('\n');
        }
    }
    said
}

/// The first id in a text.
fn id(text: &str) -> Option<&str> {
    text.match_indices('D').find_map(|(at, _)| {
        let id = text.get(at..at + 5)?;
        let digits = id.bytes().skip(1).all(|byte| byte.is_ascii_digit());
        let alone = !text.get(at + 5..)?.starts_with(|next: char| next.is_ascii_alphanumeric());
        (digits && alone).then_some(id)
    })
}

fn unfit(registry: &Registry, id: &str) -> Option<String> {
    match registry.entries.iter().find(|entry| entry.id == id).map(|entry| entry.stage) {
        None => Some(format!("{id} is not registered")),
        Some(stage @ (Stage::Removed | Stage::Archived)) => {
            Some(format!("{id} is {stage}, and this is still here"))
        }
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(code: &str) -> Vec<String> {
        let text = include_str!("../../../crates/kata-config/src/deprecation/tests/registry.toml");
        faults(&Registry::parse(text).unwrap(), &[("a.rs".to_owned(), code.to_owned())])
    }

    #[test]
    fn each_way_to_hide_something_needs_an_id() {
        for code in [
            "#[deprecated(note = \"x\")]\nfn f() {}",
            "#[serde(alias = \"old\")]\nname: String,",
            "#[arg(long, hide = true)]\nold: bool,",
            "#[command(\n    subcommand,\n    hide = true\n)]\nOld,",
            "#[arg(long, alias = \"old\")]\nnew: bool,",
            "#[arg(long, aliases = [\"a\", \"b\"])]\nnew: bool,",
            "Arg::new(\"x\").alias(\"old\")",
        ] {
            assert_eq!(found(code).len(), 1, "{code}");
            assert_eq!(found(&format!("// D0002\n{code}")), [""; 0], "{code}");
        }
        assert_eq!(
            found("\n#[arg(hide = true)] // nothing\nx: bool,"),
            ["a.rs:2: `#[arg(hide = true)]` keeps something for old users: name its id, or `// stays: why`"]
        );
    }

    #[test]
    fn what_shows_itself_or_has_a_reason_needs_none() {
        assert_eq!(found("#[arg(visible_alias = \"y\")]\nx: bool,"), [""; 0]);
        assert_eq!(found("// stays: containerd runs this\n#[command(hide = true)]\nServe,"), [""; 0]);
        assert_eq!(found("// hide = true is for later\nfn f() {}"), [""; 0]);
    }

    #[test]
    fn an_id_of_something_else_does_not_count() {
        assert_eq!(found("// D0002\nold: bool,\n}\n#[arg(hide = true)]\nx: bool,").len(), 1);
        assert_eq!(found("// D00021\n#[arg(hide = true)]\nx: bool,").len(), 1);
        assert_eq!(found("// D0099\n#[arg(hide = true)]\nx: bool,"), ["a.rs:2: D0099 is not registered"]);
        assert_eq!(
            found("// D0004\n#[arg(hide = true)]\nx: bool,"),
            ["a.rs:2: D0004 is removed, and this is still here"]
        );
    }
}
