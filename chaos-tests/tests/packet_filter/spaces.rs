//! What tests do in network namespaces.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use chaos_tests::faults::probe;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Whether there can be any; CI needs them.
pub(crate) fn works(for_what: &str) -> bool {
    let tool = "network namespaces with nftables";
    let tried = probe().into_iter().find(|(name, _)| *name == tool);
    let Some((_, Err(reason))) = tried else {
        return true;
    };
    let required = std::env::var_os("REQUIRE_PEERS").is_some_and(|value| value == "1");
    assert!(!required, "{tool}: {reason}");
    eprintln!("NOT TESTED: {for_what}: {reason}");
    false
}

/// Does something in a network namespace.
pub(crate) fn inside<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let file = File::open(Path::new("/run/netns").join(namespace)).expect("the namespace is there");
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), kind).expect("root may");
            work()
        });
        thread.join().expect("no panic inside")
    })
}

/// Awaits something in a network namespace, on a thread that is there.
pub(crate) fn awaited<T: Send>(namespace: &str, work: impl AsyncFnOnce() -> T + Send) -> T {
    inside(namespace, || {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build().expect("a runtime");
        runtime.block_on(work())
    })
}

pub(crate) fn done(command: &mut Command) -> String {
    let output = command.output().expect("the program is there");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn ip(namespace: &str, arguments: &str) {
    done(
        Command::new("ip")
            .args(["-n", namespace])
            .args(arguments.split(' ')),
    );
}

/// A namespace of a pod; it goes with this.
pub(crate) struct Space(String);

impl Space {
    pub(crate) fn new(name: String) -> Self {
        done(Command::new("ip").args(["netns", "add", &name]));
        Self(name)
    }
}

impl std::ops::Deref for Space {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).output();
    }
}
