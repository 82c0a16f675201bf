//! `completion` and `man`: what shells and readers are told, from the one description of the command line.

use std::io;

use super::Outcome;
use crate::cli::{CompletionArgs, ManArgs, help};
use crate::failure::Failure;
use crate::output;

/// Prints the completions of a shell.
pub fn completion(args: &CompletionArgs) -> Outcome {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut help::command(), "kata-ctl", &mut text);
    output::print(&String::from_utf8_lossy(&text))?;
    Ok(0)
}

/// Writes the manual pages, or prints the main one.
pub fn man(args: &ManArgs) -> Outcome {
    // The manual has its own headings for the verbs.
    let command = crate::cli::plain_command();
    match &args.dir {
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command).render(&mut page)?;
            output::print(&String::from_utf8_lossy(&page))?;
        }
        Some(dir) => {
            let failed = |error: io::Error| {
                Failure::text(format!("cannot write manual pages to {}: {error}", dir.display()))
            };
            std::fs::create_dir_all(dir).map_err(failed)?;
            clap_mangen::generate_to(command, dir).map_err(failed)?;
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_verb_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        super::man(&crate::cli::ManArgs { dir: Some(dir.path().to_owned()) }).unwrap();
        for verb in crate::cli::plain_command().get_subcommands() {
            let page = dir.path().join(format!("kata-ctl-{}.1", verb.get_name()));
            let text = std::fs::read_to_string(&page).unwrap();
            assert!(text.contains(".TH") && text.contains("SYNOPSIS"), "{}", page.display());
        }
    }
}
