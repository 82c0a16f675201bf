//! The guest agent: PID 1 of the lean image, container engine of the pod.

fn main() -> std::process::ExitCode {
    kata_agent::boot::main()
}
