//! From the kernel to systemd: nothing of the guest is used before it was verified.
//!
//! ```text
//!  kernel ─▶ /init in the initramfs (this program)
//!              boot ─┬─ cmdline    which images, and what vouches for each
//!                    ├─ modules    drivers that the kernel has not built in
//!                    ├─ disks      each image by its serial number
//!                    ├─ verity     parameters against superblock and hash tree ─▶ dm: the kernel checks every block
//!                    ├─ root       mounts, writable /etc and /var
//!                    ├─ components ─▶ manifest ─▶ plan ─▶ units    services that an extension brings
//!                    │                             └ variables
//!                    └─▶ switch to the root ─▶ /usr/lib/systemd/systemd
//!  later:  launch      the same program, started by those units for what a unit cannot say
//! ```
//!
//! Whatever goes wrong is said on the console with its cause, and then the machine ends: `fault`. The host is not trusted: it
//! makes disks and the command line, and only the latter is measured.

pub mod boot;
pub mod cmdline;
pub mod components;
pub mod disks;
pub mod dm;
pub mod fault;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod launch;
pub mod manifest;
pub mod modules;
pub mod plan;
pub mod root;
pub mod timeline;
pub mod units;
pub mod variables;
pub mod verity;
