# Files of volumes that cannot be shared are copied: beside a container's root and never into it, and nothing that can be executed.
default CopyFileRequest := false

CopyFileRequest if {
	is_copy(input.path)
	kind_of_file == 32768 # 0100000, a regular file
	bits.and(input.file_mode, 3657) == 0 # 07111, executable or special
}

CopyFileRequest if {
	is_copy(input.path)
	kind_of_file == 16384 # 0040000
}

# A link leads to something beside it or below, and is not the volume itself.
CopyFileRequest if {
	is_copy(input.path)
	kind_of_file == 40960 # 0120000
	count(split(input.path, "/")) > 6
	input.symlink_src != ""
	not startswith(input.symlink_src, "/")
	not ".." in split(input.symlink_src, "/")
}

kind_of_file := bits.and(input.file_mode, 61440) # 0170000

default RemoveRequest := false

RemoveRequest if is_copy(input.path)

# All copies of a container go at once.
RemoveRequest if {
	parts := split(input.path, "/")
	count(parts) == 5
	array.slice(parts, 0, 3) == ["", "run", "kata-containers"]
	is_id(parts[3])
	parts[4] == "volumes"
}

# /run/kata-containers/ID/volumes/NUMBER, or below.
is_copy(path) if {
	parts := split(path, "/")
	array.slice(parts, 0, 3) == ["", "run", "kata-containers"]
	is_id(parts[3])
	parts[4] == "volumes"
	regex.match(`^[0-9]+$`, parts[5])
	every part in array.slice(parts, 3, count(parts)) {
		not part in {"", ".", ".."}
	}
}
