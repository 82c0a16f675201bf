//! From the command to the container's first byte, against the same machine booting to an init that does nothing.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use super::table::{Row, Samples, row};
use super::{Accelerator, Bench, timed};
use crate::Chores;
use crate::products::{self, Products};
use crate::shell::{ChoreError, at, output, tree};

/// The machine of a pod, without the devices that no boot needs.
const MACHINE: &str = "q35,memory-backend=mem,vmport=off,smbus=off,sata=off,usb=off,i8042=off";
/// What a pod's kernel is told to do without under emulation.
const POD_PARAMETERS: &str = "cryptomgr.notests no_timer_check noreplace-smp noapictimer";

/// Rows of the start, and the median of the bare boot in milliseconds.
pub fn measure(bench: &Bench) -> Chores<(Vec<Row>, f64)> {
    let bare = BareBoot::of(bench);
    let (mut ratios, mut lean_ratios) = (Vec::new(), Vec::new());
    let (mut starts, mut boots, mut lean_boots) = (Vec::new(), Vec::new(), Vec::new());
    // One of each to warm the page cache.
    for run in 0..=bench.runs {
        let boot = bare.boot(&format!("{MACHINE},hpet=off"), "")?;
        // KVM's pods are given nothing that this boot is not.
        let lean_boot = match bench.accelerator {
            Accelerator::Tcg => bare.boot(&format!("{MACHINE},hpet=on"), POD_PARAMETERS)?,
            Accelerator::Kvm => boot,
        };
        let start = first_byte(bench, &["--hypervisor", "qemu"])?;
        if run > 0 {
            boots.push(boot * 1e3);
            lean_boots.push(lean_boot * 1e3);
            starts.push(start * 1e3);
            ratios.push(start / boot);
            lean_ratios.push(start / lean_boot);
        }
    }
    let bare_boot = Samples::new(boots.clone()).median();
    let mut rows = vec![
        row("`kata-ctl run` to first byte ÷ bare boot", "", ratios, Some(1.30)),
        row("the same ÷ bare boot that is given the pod's kernel parameters too", "", lean_ratios, None),
        row("`kata-ctl run` to first byte", "ms", starts, None),
        row("bare boot: same machine, kernel and initrd to an init that exits", "ms", boots, None),
        row("the same with the pod's kernel parameters", "ms", lean_boots, None),
    ];
    if bench.accelerator == Accelerator::Kvm {
        rows.retain(|row| !row.what.contains("the pod's kernel parameters"));
    }
    Ok((rows, bare_boot))
}

/// Seconds until the first byte of output of a pod that is started with these options.
pub(super) fn first_byte(bench: &Bench, options: &[&str]) -> Chores<f64> {
    let run = [&["run", "--rm", "--memory", "256M"], options, &[&bench.image, "echo", "up"]].concat();
    let mut command = bench.ctl(&run);
    let program = PathBuf::from(command.get_program());
    let begin = Instant::now();
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(at("start", &program))?;
    let mut byte = [0];
    if let Some(stdout) = child.stdout.as_mut() {
        stdout.read_exact(&mut byte).map_err(at("read the output of", &program))?;
    }
    let elapsed = begin.elapsed().as_secs_f64();
    child.wait().map_err(at("wait for", &program))?;
    Ok(elapsed)
}

/// The machine alone.
pub(super) struct BareBoot {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    accelerator: Accelerator,
}

/// Adds an init that exits to the image's initrd: archives may follow one another.
pub fn prepare(products: &Products) -> Chores {
    let image = products.dir.join("guest-image/initrd.cpio");
    let init = products::build_bare_init()?;
    let mut bytes = std::fs::read(&image).map_err(at("read", &image))?;
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes.extend(archive(&init)?);
    std::fs::write(initrd(), bytes).map_err(at("write", &initrd()))
}

fn initrd() -> PathBuf {
    tree().join("target/bare-initrd")
}

impl BareBoot {
    pub fn of(bench: &Bench) -> Self {
        let kernel = bench.products.dir.join("guest-image/vmlinux");
        Self { kernel, initrd: initrd(), accelerator: bench.accelerator }
    }

    /// Seconds from exec of QEMU to its end.
    pub fn boot(&self, machine: &str, parameters: &str) -> Chores<f64> {
        let (accelerator, processor) = match self.accelerator {
            Accelerator::Tcg => ("tcg,thread=multi", "max"),
            Accelerator::Kvm => ("kvm", "host"),
        };
        let begin = Instant::now();
        let status = Command::new("timeout")
            .args(["30", "qemu-system-x86_64"])
            .args(["-machine", machine, "-accel", accelerator, "-cpu", processor, "-smp", "1", "-m", "256M"])
            .args(["-object", "memory-backend-memfd,id=mem,size=256M,share=on"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4", "-kernel"])
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initrd)
            .args(["-append", &format!("quiet panic=0 reboot=t rdinit=/bare-init {parameters}")])
            .stdin(Stdio::null())
            .status()
            .map_err(at("start", Path::new("timeout")))?;
        // The exit device ends QEMU with twice the value written, plus one; a reset ends it with 0; a panic would hang.
        if matches!(status.code(), Some(0 | 1)) {
            Ok(begin.elapsed().as_secs_f64())
        } else {
            Err(ChoreError::Found(format!("the bare boot did not reach its init: {status}")))
        }
    }
}

/// A cpio archive with the program as `/bare-init`.
fn archive(init: &Path) -> Chores<Vec<u8>> {
    let dir = tree().join("target/bare-init");
    std::fs::create_dir_all(&dir).map_err(at("create", &dir))?;
    std::fs::copy(init, dir.join("bare-init")).map_err(at("copy", init))?;
    output(
        Command::new("sh")
            .current_dir(&dir)
            .args(["-c", "echo bare-init | cpio --quiet -o -H newc > ../bare.cpio"]),
    )?;
    let path = tree().join("target/bare.cpio");
    std::fs::read(&path).map_err(at("read", &path))
}

/// Seconds of `kata-ctl` with these arguments, from start to end.
pub fn whole(bench: &Bench, args: &[&str]) -> Chores<f64> {
    timed(bench.ctl(args).stdout(Stdio::null())).map(|elapsed| elapsed.as_secs_f64())
}
