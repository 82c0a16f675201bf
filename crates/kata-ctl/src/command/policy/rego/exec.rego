# Probes and hooks of the pod, each in its own container and as the process that the container has: the same user, directory and
# variables, no capability more, and no terminal.
default ExecProcessRequest := false

ExecProcessRequest if {
	created_as := data.pstate[input.container_id]
	process := process_of(input.process)
	some container in containers
	container.name in created_as.containers
	input.process.Args in container.commands
	not input.process.Terminal
	process.Cwd == created_as.process.Cwd
	process.Env == created_as.process.Env
	process.NoNewPrivileges == created_as.process.NoNewPrivileges
	process.User == created_as.process.User
	every name in process.Capabilities {
		name in created_as.process.Capabilities
	}
}
