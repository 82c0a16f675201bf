//! Which requests of the host a guest serves.
//!
//! ```text
//!   bytes of a request ── Request::of ── name (CreateContainerRequest), JSON ──▶ Policy::check ── data.agent_policy.<name>
//!                                                                                  ▲      │ true, or { allowed, ops }
//!                                                                            data.pstate ◀┘ ops, a JSON patch
//! ```
//!
//! Names and JSON are those that policies of upstream's agent are written for, so those policies work here: messages are objects
//! with the protocol's field names, an absent message is `null`, enumerations are numbers, bytes are arrays of numbers.

#[cfg(feature = "engine")]
mod policy;
mod request;

#[cfg(feature = "engine")]
pub use policy::{Denied, Policy, PolicyError};
pub use request::{Request, RequestError, Shape, shapes};
