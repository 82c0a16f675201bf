//! Finding the program of a process: PATH, as `execvp` would, but telling where it looked.

use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, FileType, accessat, stat};
use rustix::io::Errno;

use super::wire::Failure;

/// What PATH is when the environment does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The path of `command`, looked up in this process's root and working directory with its effective rights.
pub(super) fn find(command: &str, env: &[String]) -> Result<PathBuf, Failure> {
    let candidates: Vec<PathBuf> = if command.contains('/') {
        vec![PathBuf::from(command)]
    } else {
        // The last one wins, as getenv of a shell that imported the environment would have it.
        let path = env.iter().rev().find_map(|variable| variable.strip_prefix("PATH="));
        let directories = path.unwrap_or(DEFAULT_PATH).split(':');
        // An empty element is the working directory.
        directories
            .map(|directory| Path::new(if directory.is_empty() { "." } else { directory }).join(command))
            .collect()
    };
    let mut refused = None;
    for candidate in &candidates {
        match check(candidate) {
            Ok(()) => return Ok(candidate.clone()),
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(error) => {
                refused.get_or_insert_with(|| (candidate.clone(), error));
            }
        }
    }
    Err(match refused {
        Some((path, error)) => Failure::NotExecutable { path, errno: error.raw_os_error() },
        None => Failure::CommandNotFound { command: command.to_owned(), tried: candidates },
    })
}

fn check(path: &Path) -> Result<(), Errno> {
    let kind = FileType::from_raw_mode(stat(path)?.st_mode);
    match kind {
        FileType::RegularFile => accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS),
        FileType::Directory => Err(Errno::ISDIR),
        _ => Err(Errno::ACCESS),
    }
}

/// What an `execve` of the file that [`find`] found has failed with.
pub(super) fn exec_failure(path: PathBuf, error: Errno) -> Failure {
    match error {
        Errno::NOENT if stat(&path).is_ok() => Failure::InterpreterNotFound { path },
        Errno::NOENT => Failure::CommandNotFound { command: path.display().to_string(), tried: vec![path] },
        error => Failure::NotExecutable { path, errno: error.raw_os_error() },
    }
}

/// The home directory of `uid` by the text of a `passwd(5)` file.
pub(super) fn home(passwd: &[u8], uid: u32) -> Option<String> {
    let text = String::from_utf8_lossy(passwd);
    text.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let matches = fields.next()?.parse() == Ok(uid);
        let home = fields.nth(2)?;
        (matches && home.starts_with('/') && !home.contains('\0')).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_command_tells_every_path_tried() {
        let env = ["PATH=/nowhere:/neither".to_owned()];
        let Failure::CommandNotFound { tried, .. } = find("ls", &env).unwrap_err() else {
            panic!("another failure")
        };
        assert_eq!(tried, [Path::new("/nowhere/ls"), Path::new("/neither/ls")]);
    }

    #[test]
    fn a_command_with_a_slash_is_not_looked_up_in_path() {
        let env = ["PATH=/usr/bin".to_owned()];
        let Failure::CommandNotFound { tried, .. } = find("/nowhere/ls", &env).unwrap_err() else {
            panic!("another failure")
        };
        assert_eq!(tried, [Path::new("/nowhere/ls")]);
    }

    #[test]
    fn a_directory_is_not_executable() {
        let Failure::NotExecutable { errno, .. } = find("/etc", &[]).unwrap_err() else {
            panic!("another failure")
        };
        assert_eq!(errno, libc::EISDIR);
    }

    #[test]
    fn a_file_without_permission_is_refused_only_if_no_later_one_runs() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("sh"), "").unwrap();
        let path = directory.path().display();
        assert_eq!(find("sh", &[format!("PATH={path}:/bin")]).unwrap(), Path::new("/bin/sh"));
        let Failure::NotExecutable { errno, .. } = find("sh", &[format!("PATH={path}")]).unwrap_err() else {
            panic!("another failure")
        };
        assert_eq!(errno, libc::EACCES);
    }

    #[test]
    fn home_is_the_sixth_field_of_the_users_line() {
        let passwd =
            b"root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:10:10::/srv/app:/bin/sh\nodd:x:11:11::relative:";
        assert_eq!(home(passwd, 10).as_deref(), Some("/srv/app"));
        assert_eq!(home(passwd, 11), None);
        assert_eq!(home(passwd, 12), None);
    }
}
