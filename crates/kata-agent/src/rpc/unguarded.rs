//! In place of the guard, where the agent is built without policies: everything that is served is served to the host.

use std::collections::HashMap;
use std::sync::Arc;

use ttrpc::r#async::{Service, TtrpcContext};

use crate::stdio::Withheld;

/// Lets everything through.
#[derive(Debug, Default)]
pub struct Guard;

impl Guard {
    /// Nothing is read.
    #[must_use]
    pub fn boot() -> Self {
        Self
    }

    /// The services as they are.
    #[must_use]
    pub fn before(self: &Arc<Self>, services: HashMap<String, Service>) -> HashMap<String, Service> {
        services
    }

    /// There are no rules.
    pub fn is_active(&self) -> bool {
        false
    }

    /// It is.
    ///
    /// # Errors
    /// None.
    pub fn allows(&self, _: &str) -> ttrpc::Result<()> {
        Ok(())
    }
}

/// Nothing is.
pub fn withheld(_: &TtrpcContext) -> Withheld {
    Withheld::default()
}
