# A container is created as one of these, or not at all. What it was created as is remembered: an id that was used belongs to the
# same container for good, so that what may be executed in one is not executed in another.
default CreateContainerRequest := false

CreateContainerRequest := {"allowed": true, "ops": [{"op": "add", "path": path, "value": created}]} if {
	count(created.containers) > 0
	remembered == created
	path := concat("/", ["", "pstate", input.container_id])
}

created := {
	"containers": [c.name | some c in containers; not c.name in faulty],
	"process": process_of(input.OCI.Process),
}

remembered := data.pstate[input.container_id]

remembered := created if not data.pstate[input.container_id]

# What is the same in all processes of a container.
process_of(process) := {
	"Capabilities": sort(capabilities(process)),
	"Cwd": process.Cwd,
	"Env": sort({entry | some entry in process.Env}),
	"NoNewPrivileges": process.NoNewPrivileges,
	"User": process.User,
}

faulty contains fault.container if some fault in faults

# What keeps a request from being which container; `kata-ctl policy explain` shows it.
faults contains {"container": c.name, "what": "its id is none, or the name of a directory of the guest's own"} if {
	some c in containers
	not is_id(input.container_id)
}

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

faults contains {"container": c.name, "what": "its working directory is another one, or comes from the host"} if {
	some c in containers
	not directory_fits(c)
}

faults contains {"container": c.name, "what": "it runs as another user or group"} if {
	some c in containers
	not user_fits(c)
}

faults contains {"container": c.name, "what": "its root is not the image that it pulls, is somewhere else, or can be written to"} if {
	some c in containers
	not root_fits(c)
}

faults contains {"container": c.name, "what": "it has more capabilities, or may get them"} if {
	some c in containers
	not capabilities_fit(c)
}

faults contains {"container": c.name, "what": "something is mounted where nothing may be, or from elsewhere"} if {
	some c in containers
	not mounts_fit(c)
}

faults contains {"container": c.name, "what": "it has storage that none of its volumes is"} if {
	some c in containers
	not storages_fit(c)
}

faults contains {"container": c.name, "what": "it has a device that is none of its volumes"} if {
	some c in containers
	not devices_fit(c)
}

faults contains {"container": c.name, "what": "it has hooks, which run outside of it"} if {
	some c in containers
	count(hooks) > 0
}

# Where the guest pulls the image, the name in the storage counts: see pulls.
image_fits(_) if not host_rootfs

image_fits(c) if c.pods_own

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

# Where the root is no image of the host's, the agent's own pause runs whatever is asked for.
command_fits(c) if {
	c.pods_own
	not host_rootfs
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

# Others may be the image's or the cluster's, but nothing that has programs load more.
variable_fits(c, entry) if {
	name := split(entry, "=")[0]
	not name in {split(wanted, "=")[0] | some wanted in c.env}
	not loads_code(name)
	path_fits(c, name, entry)
}

loads_code(name) if {
	some prefix in ["BASH_FUNC_", "GCONV_", "GLIBC_", "LD_"]
	startswith(name, prefix)
}

loads_code(name) if {
	name in {
		"BASH_ENV", "BASHOPTS", "CLASSPATH", "ENV", "IFS", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "NODE_OPTIONS", "NODE_PATH",
		"PERL5DB", "PERL5LIB", "PERL5OPT", "PERLLIB", "PHPRC", "PHP_INI_SCAN_DIR", "PROMPT_COMMAND", "PS4", "PYTHONHOME",
		"PYTHONPATH", "PYTHONSTARTUP", "RUBYLIB", "RUBYOPT", "SHELLOPTS", "_JAVA_OPTIONS",
	}
}

path_fits(_, name, _) if name != "PATH"

# Programs are not looked for among files that come from the host.
path_fits(c, "PATH", entry) if {
	every directory in split(trim_prefix(entry, "PATH="), ":") {
		not from_host(c, directory)
	}
}

directory_fits(c) if c.cwd == input.OCI.Process.Cwd

directory_fits(c) if {
	c.cwd == null
	not from_host(c, input.OCI.Process.Cwd)
}

# Whether a path of the container may lead to what the host has brought; one that is not written plainly may lead anywhere.
from_host(_, path) if not startswith(path, "/")

from_host(_, path) if regex.match(`//|/\.\.?(/|$)|^/proc(/|$)`, path)

from_host(c, path) if {
	some destination, sources in c.mounts
	some source in sources
	source in {"host", "volume"}
	startswith(concat("", [path, "/"]), concat("", [destination, "/"]))
}

user_fits(c) if {
	given := input.OCI.Process.User
	is_or_any(c.uid, given.UID)
	is_or_any(c.gid, given.GID)
}

is_or_any(wanted, _) if wanted == null

is_or_any(wanted, given) if wanted == given

capabilities_fit(c) if {
	privileges_fit(c)
	c.capabilities == null
}

capabilities_fit(c) if {
	privileges_fit(c)
	c.capabilities != null
	count(capabilities(input.OCI.Process) - {name | some name in c.capabilities}) == 0
}

privileges_fit(c) if not c.no_new_privileges

privileges_fit(_) if input.OCI.Process.NoNewPrivileges

capabilities(process) := {name |
	some kind in ["Ambient", "Bounding", "Effective", "Inheritable", "Permitted"]
	some name in process.Capabilities[kind]
}

hooks contains hook if {
	some kind in ["Prestart", "Poststart", "Poststop", "CreateRuntime", "CreateContainer", "StartContainer"]
	some hook in input.OCI.Hooks[kind]
}
