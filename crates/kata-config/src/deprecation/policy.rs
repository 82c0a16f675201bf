//! The one place that decides what becomes of a use.

use thiserror::Error;

use super::{Deprecation, Stage, Surface};
use crate::text::keywords;

keywords! {
    /// `runtime.deprecated`: what becomes of a use of something deprecated. What is removed is refused whatever this says.
    Policy { Warn = "warn", Reject = "reject", Off = "off" }
}

/// A use that is refused. One line with all that helps: id, reason, replacement, last release.
#[derive(Debug, Error)]
pub enum Refused {
    /// It is gone.
    #[error(
        "removed [{id} {title}]: {reason}. Instead, {replacement}. Last release with it: {last}. \
         More: kata-ctl deprecations show {id}",
        id = .0.id, title = .0.title, reason = .0.reason, replacement = .0.replacement, last = .0.last_release
    )]
    Removed(&'static Deprecation),
    /// It is there, and needs an opt-in by name.
    #[error(
        "off by default [{id} {title}]: {reason}. Instead, {replacement}. Until {release} it can be had with \
         runtime.deprecated_opt_in = [\"{id}\"]{hatch}. More: kata-ctl deprecations show {id}",
        id = .0.id, title = .0.title, reason = .0.reason, replacement = .0.replacement,
        release = .0.remove_in.release,
        hatch = .0.escape_hatch.as_ref().map(|hatch| format!(" ({hatch})")).unwrap_or_default()
    )]
    OffByDefault(&'static Deprecation),
    /// It works, and the user wants to be as strict as the future.
    #[error(
        "deprecated, and runtime.deprecated is \"reject\" [{id} {title}]: {reason}. Instead, {replacement}. It goes in \
         {release} ({date}). More: kata-ctl deprecations show {id}",
        id = .0.id, title = .0.title, reason = .0.reason, replacement = .0.replacement,
        release = .0.remove_in.release, date = .0.remove_in.date
    )]
    Rejected(&'static Deprecation),
}

impl Refused {
    /// What was refused.
    pub fn deprecation(&self) -> &'static Deprecation {
        match self {
            Self::Removed(item) | Self::OffByDefault(item) | Self::Rejected(item) => item,
        }
    }
}

impl Policy {
    /// Counts a use of `what`, and lets it pass or refuses it. `opted_in` holds the ids that are wanted although they are off
    /// by default.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn admit(
        self,
        item: &'static Deprecation,
        surface: Surface,
        what: &str,
        opted_in: &[String],
    ) -> Result<(), Refused> {
        let refused = match item.stage {
            Stage::Proposed | Stage::Cancelled => return Ok(()),
            Stage::Removed | Stage::Archived => Refused::Removed(item),
            Stage::Deprecated | Stage::OffByDefault if self == Self::Reject => Refused::Rejected(item),
            Stage::OffByDefault if !opted_in.iter().any(|id| *id == item.id) => Refused::OffByDefault(item),
            Stage::Deprecated | Stage::OffByDefault => {
                if self == Self::Off {
                    item.count(surface);
                } else {
                    item.warn(surface, what);
                }
                return Ok(());
            }
        };
        item.count(surface);
        Err(refused)
    }
}
