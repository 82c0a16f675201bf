//! A first pod: from nothing to a container's output.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::products::{Products, Profile};
use crate::shell::{self, at, tree};
use crate::{Chores, packages, products, say};

/// What the first container does: say where it is.
const SCRIPT: &str = "echo \"Hello from a container in its own virtual machine.\"; \
    echo \"  kernel   $(uname -r)\"; echo \"  memory   $(grep MemTotal /proc/meminfo | tr -s ' ' | cut -d' ' -f2-)\"; \
    echo \"  pid      $$\"; echo \"  image    $(busybox | head -n 1)\"";

/// Sets the machine up, builds, and runs a container.
pub fn run() -> Chores {
    packages::for_run()?;
    let products = products::build(Profile::Quick, products::STOCK_KERNEL)?;
    let image = busybox_image()?;
    say("starting a pod");
    shell::run(
        Command::new(products.program("kata-ctl"))
            .args(["run", "--rm", "--timing"])
            .arg(format!("oci:{}:latest", image.display()))
            .args(["sh", "-c", SCRIPT]),
    )?;
    hint(&products, &image);
    Ok(())
}

/// A small OCI image made of Debian's static busybox, once.
pub fn busybox_image() -> Chores<PathBuf> {
    let images = tree().join("target/images");
    let layout = images.join("busybox");
    if layout.join("index.json").exists() {
        return Ok(layout);
    }
    say("making an OCI image from busybox");
    let temp = images.join("busybox.new");
    let bundle = images.join("busybox.bundle");
    for stale in [&temp, &bundle] {
        if stale.exists() {
            std::fs::remove_dir_all(stale).map_err(at("remove", stale))?;
        }
    }
    std::fs::create_dir_all(&images).map_err(at("create", &images))?;
    let tag = format!("{}:latest", temp.display());
    let umoci = |words: &[&str]| {
        let mut command = Command::new("umoci");
        command.args(words);
        command
    };
    shell::run(umoci(&["init", "--layout"]).arg(&temp))?;
    shell::run(&mut umoci(&["new", "--image", &tag]))?;
    shell::run(umoci(&["unpack", "--image", &tag]).arg(&bundle))?;
    fill(&bundle.join("rootfs"))?;
    shell::run(umoci(&["repack", "--image", &tag]).arg(&bundle))?;
    shell::run(&mut umoci(&["config", "--image", &tag, "--config.cmd", "sh", "--config.env", PATH]))?;
    std::fs::remove_dir_all(&bundle).map_err(at("remove", &bundle))?;
    std::fs::rename(&temp, &layout).map_err(at("rename", &temp))?;
    Ok(layout)
}

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

fn fill(root: &Path) -> Chores {
    for dir in ["bin", "etc", "root", "tmp", "var", "usr/bin", "home"] {
        let dir = root.join(dir);
        std::fs::create_dir_all(&dir).map_err(at("create", &dir))?;
    }
    let busybox = root.join("bin/busybox");
    std::fs::copy("/bin/busybox", &busybox).map_err(at("copy to", &busybox))?;
    let applets = shell::output(Command::new(&busybox).arg("--list"))?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        let link = root.join("bin").join(applet);
        std::os::unix::fs::symlink("busybox", &link).map_err(at("link", &link))?;
    }
    for (file, text) in [
        ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
        ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
    ] {
        let file = root.join(file);
        std::fs::write(&file, text).map_err(at("write", &file))?;
    }
    Ok(())
}

fn hint(products: &Products, image: &Path) {
    let shown = |path: &Path| path.strip_prefix(tree()).unwrap_or(path).display().to_string();
    eprintln!(
        "\nNow try a shell in a pod of your own:\n  {} run --rm -it oci:{}:latest sh",
        shown(&products.program("kata-ctl")),
        shown(image)
    );
}
