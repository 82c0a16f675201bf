# The input of containers that have one. Probes and hooks have none.
default WriteStreamRequest := false

WriteStreamRequest if {
	some container in containers
	container.stdin
	container.name in data.pstate[input.container_id].containers
	input.exec_id in {"", input.container_id}
}
