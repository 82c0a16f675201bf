# A container is created as one of these, or not at all.
default CreateContainerRequest := false

CreateContainerRequest if {
	some container in containers
	not container.name in faulty
}

faulty contains fault.container if some fault in faults

# What keeps a request from being which container; `kata-ctl policy explain` shows it.
faults contains {"container": c.name, "what": "its image is another one"} if {
	some c in containers
	not image_fits(c)
}

faults contains {"container": c.name, "what": "its command line is another one"} if {
	some c in containers
	not command_fits(c)
}

faults contains {"container": c.name, "what": "its environment lacks a variable, or has one that it must not have"} if {
	some c in containers
	not environment_fits(c)
}

faults contains {"container": c.name, "what": "it runs as another user"} if {
	some c in containers
	not user_fits(c)
}

faults contains {"container": c.name, "what": "its root is somewhere else, or can be written to"} if {
	some c in containers
	not root_fits(c)
}

faults contains {"container": c.name, "what": "it has more capabilities"} if {
	some c in containers
	not capabilities_fit(c)
}

faults contains {"container": c.name, "what": "something is mounted where nothing may be"} if {
	some c in containers
	not mounts_fit(c)
}

faults contains {"container": c.name, "what": "it has storage outside of the containers' directory, or pulls another image"} if {
	some c in containers
	not storages_fit(c)
}

faults contains {"container": c.name, "what": "it has hooks, which run outside of it"} if {
	some c in containers
	count(hooks) > 0
}

# The name is the container runtime's word. What counts is the image that the guest pulls itself, if it does: see storages_fit.
image_fits(c) if count(c.images) == 0

image_fits(c) if {
	some key in ["io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName"]
	input.OCI.Annotations[key] in c.images
}

command_fits(c) if {
	c.command == null
	c.arguments == null
}

command_fits(c) if {
	c.command != null
	words_fit(c.command, input.OCI.Process.Args)
}

# The entry point is the image's.
command_fits(c) if {
	c.arguments != null
	given := input.OCI.Process.Args
	skipped := count(given) - count(c.arguments)
	skipped >= 0
	words_fit(c.arguments, array.slice(given, skipped, count(given)))
}

words_fit(wanted, given) if {
	count(wanted) == count(given)
	every index, word in wanted {
		word_fits(word, given[index])
	}
}

# Of such a word nothing is known before the pod runs.
word_fits(wanted, _) if wanted == null

word_fits(wanted, given) if wanted == given

environment_fits(c) if {
	given := input.OCI.Process.Env
	every entry in c.env {
		entry in given
	}
	every entry in given {
		variable_fits(c, entry)
	}
}

variable_fits(c, entry) if entry in c.env

# Others may be the image's or the cluster's, but nothing that has the loader load more programs.
variable_fits(c, entry) if {
	name := split(entry, "=")[0]
	not startswith(name, "LD_")
	not name in {split(wanted, "=")[0] | some wanted in c.env}
}

user_fits(c) if c.uid == null

user_fits(c) if input.OCI.Process.User.UID == c.uid

root_fits(c) if {
	in_containers(input.OCI.Root.Path)
	root_may_be(c, input.OCI.Root.Readonly)
}

root_may_be(c, _) if not c.read_only

root_may_be(_, readonly) if readonly

capabilities_fit(c) if c.capabilities == null

capabilities_fit(c) if {
	c.capabilities != null
	count(capabilities - {name | some name in c.capabilities}) == 0
}

capabilities contains name if {
	some kind in ["Ambient", "Bounding", "Effective", "Inheritable", "Permitted"]
	some name in input.OCI.Process.Capabilities[kind]
}

mounts_fit(c) if {
	every mount in input.OCI.Mounts {
		mount.destination in c.mounts
	}
}

storages_fit(c) if {
	every storage in input.storages {
		in_containers(storage.mount_point)
		source_fits(c, storage)
	}
}

source_fits(_, storage) if storage.driver != "image_guest_pull"

source_fits(c, storage) if storage.source in c.images

source_fits(c, storage) if {
	count(c.images) == 0
	storage.source == "pause"
}

hooks contains hook if {
	some kind in ["Prestart", "Poststart", "Poststop", "CreateRuntime", "CreateContainer", "StartContainer"]
	some hook in input.OCI.Hooks[kind]
}

# Below the directory that the agent keeps for containers.
in_containers(path) if {
	startswith(path, "/run/kata-containers/")
	not ".." in split(path, "/")
}

# Neither hooks of the guest's nor modules of its kernel.
default CreateSandboxRequest := false

CreateSandboxRequest if {
	input.guest_hook_path == ""
	count(input.kernel_modules) == 0
	every storage in input.storages {
		in_containers(storage.mount_point)
	}
}

# Files that cannot be shared are copied, but not over the programs of a container.
default CopyFileRequest := false

CopyFileRequest if {
	in_shared(input.path)
	not startswith(input.symlink_src, "/")
	not ".." in split(input.symlink_src, "/")
}

default RemoveRequest := false

RemoveRequest if in_shared(input.path)

in_shared(path) if {
	startswith(path, "/run/kata-containers/shared/containers/")
	parts := split(path, "/")
	not ".." in parts
	not "rootfs" in parts
}
