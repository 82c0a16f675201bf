# What the guest keeps of a container, below its id.
own_directory := concat("/", ["/run/kata-containers", input.container_id])

own_root := concat("/", [own_directory, "rootfs"])

is_id(text) if {
	regex.match(`^[A-Za-z0-9][A-Za-z0-9_.-]*$`, text)
	not text in {"image", "sandbox", "shared"}
}

# The root is the pod's image, which the guest pulls itself: nothing that the host has shared or copied.
root_fits(c) if {
	root_may_be(c, input.OCI.Root.Readonly)
	input.OCI.Root.Path == own_root
	count(pulls) == 1
	every storage in pulls {
		is_pull(c, storage)
	}
}

root_fits(c) if {
	host_rootfs
	root_may_be(c, input.OCI.Root.Readonly)
	input.OCI.Root.Path in {own_root, shared_root}
	count(pulls) == 0
}

root_may_be(c, _) if not c.read_only

root_may_be(_, readonly) if readonly

pulls := [storage | some storage in input.storages; storage.driver == "image_guest_pull"]

is_pull(c, storage) if {
	storage.driver == "image_guest_pull"
	storage.mount_point == own_root
	storage.source in c.images
	pauses(c, storage)
}

# A pod's own container has no image: the agent has a pause. No other container is to be taken for it.
pauses(c, storage) if {
	c.pods_own
	is_pods_own(storage)
}

pauses(c, storage) if {
	not c.pods_own
	not is_pods_own(storage)
}

is_pods_own(storage) if {
	some option in storage.driver_options
	metadata := json.unmarshal(trim_prefix(option, "image_guest_pull=")).metadata
	some key in ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"]
	metadata[key] == "sandbox"
}

storages_fit(c) if {
	every storage in input.storages {
		storage_fits(c, storage)
	}
}

storage_fits(c, storage) if is_pull(c, storage)

# The pod's shared memory.
storage_fits(_, storage) if {
	storage.driver == "ephemeral"
	storage.fstype == "tmpfs"
	storage.mount_point == "/run/kata-containers/sandbox/shm"
}

# An emptyDir in the guest's memory.
storage_fits(c, storage) if {
	some name in c.empty_dirs
	storage.driver == "ephemeral"
	storage.fstype in {"tmpfs", "hugetlbfs"}
	storage.mount_point == memory_of(name)
}

# An emptyDir, or a part of one, in the guest's own root, or on a disk of its own.
storage_fits(c, storage) if {
	some name in c.empty_dirs
	storage.driver == "local"
	some directory in [memory_of(name), concat("/", [disk_of(name), "files"])]
	is_below(storage.mount_point, directory)
}

# The disk of an emptyDir: the guest encrypts it with a key of its own and makes the file system.
storage_fits(c, storage) if {
	some name in c.empty_dirs
	storage.driver == "blk"
	storage.fstype == "ext4"
	storage.mount_point == disk_of(name)
	disk_may_be(storage)
}

disk_may_be(_) if host_rootfs

disk_may_be(storage) if "encryption_key=ephemeral" in storage.driver_options

# The disk of another volume, where something of it is mounted.
storage_fits(c, storage) if {
	storage.driver == "blk"
	is_disk_of_volume(storage.mount_point)
	some mount in input.OCI.Mounts
	mount.source == storage.mount_point
	"volume" in c.mounts[mount.destination]
}

# A root on disks: its layers, an overlay of them, and what takes the mount points.
storage_fits(_, storage) if {
	host_rootfs
	storage.driver in {"blk", "ephemeral", "overlayfs"}
	storage.fstype in {"erofs", "ext4", "overlay", "tmpfs"}
	some part in ["layers", "rootfs", "scratch"]
	is_below(storage.mount_point, concat("/", [own_directory, part]))
}

memory_of(name) := concat("/", ["/run/kata-containers/sandbox/ephemeral", name])

disk_of(name) := concat("/", ["/run/kata-containers/sandbox/disks", name])

is_disk_of_volume(path) if regex.match(`^/run/kata-containers/sandbox/storage/[A-Za-z0-9_=-]+$`, path)

# Whether a path is a directory or in it.
is_below(path, directory) if {
	startswith(concat("", [path, "/"]), concat("", [directory, "/"]))
	not ".." in split(path, "/")
}

mounts_fit(c) if {
	every mount in input.OCI.Mounts {
		some source in c.mounts[mount.destination]
		mount_fits(source, mount)
	}
}

# A file system of the guest's kernel.
mount_fits(source, mount) if {
	source == concat(":", ["kernel", mount.type_])
	not binds(mount)
}

# A path of the guest's own, as a pod asks for with a hostPath below /dev, /proc or /sys.
mount_fits(source, mount) if {
	source == concat(":", ["guest", mount.source])
	binds(mount)
}

mount_fits("shm", mount) if {
	mount.type_ == "bind"
	mount.source == "/run/kata-containers/sandbox/shm"
}

# Files of the host: copied into the container's directory, or shared.
mount_fits("host", mount) if is_of_host(mount)

mount_fits("volume", mount) if is_of_host(mount)

mount_fits("volume", mount) if {
	mount.type_ == "bind"
	is_disk_of_volume(mount.source)
}

mount_fits(source, mount) if {
	startswith(source, "emptyDir:")
	mount.type_ == "bind"
	name := trim_prefix(source, "emptyDir:")
	some directory in [memory_of(name), concat("/", [disk_of(name), "files"])]
	is_below(mount.source, directory)
}

mount_fits(source, mount) if {
	host_rootfs
	startswith(source, "emptyDir:")
	is_of_host(mount)
}

binds(mount) if mount.type_ in {"bind", "rbind"}

binds(mount) if {
	some option in mount.options
	option in {"bind", "rbind"}
}

is_of_host(mount) if {
	mount.type_ == "bind"
	some directory in [concat("/", [own_directory, "volumes"]), "/run/kata-containers/shared/containers/.volumes"]
	number := trim_prefix(mount.source, concat("", [directory, "/"]))
	regex.match(`^[0-9]+$`, number)
}

shared_root := concat("/", ["/run/kata-containers/shared/containers", input.container_id, "rootfs"])

# Raw block volumes.
devices_fit(c) if {
	every device in input.devices {
		device.container_path in c.devices
	}
}

# Neither hooks of the guest's nor modules of its kernel, and no file system but the share.
default CreateSandboxRequest := false

CreateSandboxRequest if {
	input.guest_hook_path == ""
	count(input.kernel_modules) == 0
	every storage in input.storages {
		storage.driver == "virtio-fs"
		storage.fstype == "virtiofs"
		storage.mount_point == "/run/kata-containers/shared/containers"
	}
}
