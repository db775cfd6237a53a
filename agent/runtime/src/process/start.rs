//! Starts the process of a workload behind a gate, so that it is written down before it can do anything.
//!
//! The gate is a shell that waits for a word on its standard input. If the agent dies before it has written
//! the process down, the input closes and the shell ends without having run the chute. Once the word
//! is said, the shell makes the file `released` and becomes the chute. So for every workload it is known
//! whether its chute, and with it the single-use launch token, was ever let loose.

use std::fs::File;
use std::io;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use protocol::workload::WorkloadSpec;
use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, ChildStdin, Command};

use super::output::OUTPUT;
use super::pull::Image;
use super::table::{self, Identity, MARKER};
use super::unpack::resolve;
use crate::environment::{Surroundings, command, environment};
use protocol::workload::PortMapping;

const GATE: &str = r#"read -r word && [ "$word" = go ] && : > "$0" && exec "$@" </dev/null"#;
const RELEASED: &str = "released";
const HOST_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A process that waits at the gate.
#[derive(Debug)]
pub(crate) struct Gated {
    /// The process.
    pub(crate) child: Child,
    /// Who it is, now and when it runs the chute.
    pub(crate) identity: Identity,
    word: ChildStdin,
}

/// True once the chute of this folder was let loose.
pub(crate) fn was_released(folder: &Path) -> io::Result<bool> {
    folder.join(RELEASED).try_exists()
}

/// Where the chute's code lies, if its file name is one.
pub(crate) fn code_path(folder: &Path, filename: &str) -> Option<PathBuf> {
    let good = !filename.is_empty() && !filename.contains(['/', '\0']) && !matches!(filename, "." | "..");
    good.then(|| folder.join("app").join(filename))
}

/// What the process needs besides its specification.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    /// Folder of the workload.
    pub(crate) folder: &'a Path,
    /// Folder of the chute's models.
    pub(crate) cache: &'a Path,
    /// Ports, as chosen.
    pub(crate) ports: &'a [PortMapping],
    /// Explicit egress proxy.
    pub(crate) egress_door: Option<&'a str>,
}

/// Starts the process; it waits until [`Gated::release`].
pub(crate) fn start(spec: &WorkloadSpec, image: &Image, place: &Place<'_>) -> io::Result<Gated> {
    let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidInput, text.to_owned());
    let code = code_path(place.folder, &spec.filename)
        .ok_or_else(|| invalid("the name of the code's file is not valid"))?;
    let mut line = command(spec).into_iter();
    let name = line.next().unwrap_or_default();
    let path = image.configuration.path();
    let program = find(&image.root, &path, &name).ok_or_else(|| {
        invalid(&format!(
            "the image has no command {name:?} in {}",
            path.join(":")
        ))
    })?;
    let cache = place.cache.to_string_lossy();
    let around = Surroundings {
        ports: place.ports,
        cache: &cache,
        egress_door: place.egress_door,
        sealed: false,
    };
    let inside = path
        .iter()
        .filter_map(|folder| resolve(&image.root, Path::new(folder)));
    let mut search: Vec<String> = inside
        .map(|folder| folder.to_string_lossy().into_owned())
        .collect();
    search.push(HOST_PATH.to_owned());
    let mut process = Command::new("/bin/sh");
    process
        .args(["-c", GATE])
        .arg(place.folder.join(RELEASED))
        .arg(program)
        .args(line)
        .current_dir(place.folder.join("app"))
        .env_clear()
        .envs(image.configuration.environment())
        .env("PATH", search.join(":"))
        .envs(environment(spec, around))
        .env("CHUTES_CODE_FILE", code)
        .env("CHUTES_PROCESS_BIND_HOST", &spec.external_host)
        .env(MARKER, spec.deployment.as_str())
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(output(place.folder)?)
        .stderr(output(place.folder)?);
    let mut child = process.spawn()?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    let identity = pid.map(table::identify).transpose()?.flatten();
    let (Some(identity), Some(word)) = (identity, child.stdin.take()) else {
        return Err(io::Error::other("the process ended as soon as it was started"));
    };
    Ok(Gated {
        child,
        identity,
        word,
    })
}

impl Gated {
    /// Lets the process run the chute.
    pub(crate) async fn release(mut self) -> io::Result<Child> {
        self.word.write_all(b"go\n").await?;
        self.word.flush().await?;
        Ok(self.child)
    }
}

/// Appended to, so that it can be cut while the process writes.
fn output(folder: &Path) -> io::Result<File> {
    File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(folder.join(OUTPUT))
}

/// A command in the image's search path, as a path on this machine.
fn find(root: &Path, path: &[String], name: &str) -> Option<PathBuf> {
    path.iter().find_map(|folder| {
        let program = resolve(root, &Path::new(folder).join(name))?;
        let found = std::fs::symlink_metadata(&program).ok()?;
        (found.is_file() && found.permissions().mode() & 0o111 != 0).then_some(program)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn commands_are_found_inside_the_image() {
        let root = tempfile::tempdir().expect("temporary folders can be made");
        let root = root.path();
        fs::create_dir_all(root.join("opt/venv/bin")).expect("writable");
        fs::create_dir_all(root.join("usr/bin")).expect("writable");
        fs::write(root.join("usr/bin/chutes"), "not executable").expect("writable");
        fs::write(root.join("opt/venv/bin/real"), "#!/bin/sh\n").expect("writable");
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(root.join("opt/venv/bin/real"), executable).expect("ours");
        std::os::unix::fs::symlink("/opt/venv/bin/real", root.join("opt/venv/bin/chutes")).expect("writable");
        let path = ["/usr/bin", "/nowhere", "/opt/venv/bin"].map(str::to_owned);
        assert_eq!(find(root, &path, "chutes"), Some(root.join("opt/venv/bin/real")));
        assert_eq!(find(root, &path[..2], "chutes"), None);
    }

    #[test]
    fn code_stays_in_its_folder() {
        let folder = Path::new("/data/workloads/d");
        assert_eq!(code_path(folder, "a.py"), Some(folder.join("app/a.py")));
        for bad in ["", ".", "..", "a/b.py", "/etc/passwd", "a\0"] {
            assert_eq!(code_path(folder, bad), None, "{bad:?}");
        }
    }
}
