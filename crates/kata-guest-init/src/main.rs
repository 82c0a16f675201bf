//! `/init` of the services image's initramfs, and what the units that it made start their programs with.

fn main() -> std::process::ExitCode {
    kata_guest_init::boot::main()
}
