//! The guest agent: PID 1 of the lean image, container engine of the pod.

/// What an image builder wants to know of this program without running it; it goes into the image's manifest.
#[cfg(not(feature = "policy"))]
const FACTS: &str = concat!(r#"{"version":""#, env!("CARGO_PKG_VERSION"), r#"","announces":true}"#);
#[cfg(feature = "policy")]
const FACTS: &str =
    concat!(r#"{"version":""#, env!("CARGO_PKG_VERSION"), r#"","announces":true,"policy":true}"#);

#[used]
#[unsafe(link_section = ".kata.agent")]
static FACTS_SECTION: [u8; FACTS.len()] = match FACTS.as_bytes().first_chunk() {
    Some(bytes) => *bytes,
    None => [0; FACTS.len()],
};

fn main() -> std::process::ExitCode {
    kata_agent::boot::main()
}
