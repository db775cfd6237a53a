//! Discovery against a driver library that the test compiles: order of calls, facts, and each way in which
//! a driver can fail. The loader reads its search path at start, so each row probes in a child process, which
//! is this test again.

use std::path::Path;
use std::process::Command;

use agent::gpu::cuda::probe;

/// Set in the child: what the fake driver answers.
const MODE: &str = "FAKE_CUDA";
/// Marks the child's result among the test harness's own output.
const MARK: &str = "probe says: ";

/// Compiles the fake driver; `None`, said aloud, if this machine has no compiler to do it.
fn compile(folder: &Path, options: &[&str]) -> Option<()> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_cuda/libcuda.rs");
    let compiler = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let output = Command::new(compiler)
        .args([
            "--edition",
            "2024",
            "--crate-type",
            "cdylib",
            "--crate-name",
            "cuda",
        ])
        .args(options)
        .arg("-o")
        .arg(folder.join("libcuda.so.1"))
        .arg(source)
        .output();
    match output {
        Ok(output) if output.status.success() => Some(()),
        Ok(output) => panic!("{}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => {
            assert!(std::env::var_os("REQUIRE_PEERS").is_none(), "rustc: {error}");
            eprintln!("NOT TESTED: discovery against a fake driver, since rustc cannot be run: {error}");
            None
        }
    }
}

/// What a probe says in a process that finds its libraries in `folder`.
fn probe_in_child(folder: &Path, mode: &str) -> String {
    let output = Command::new(std::env::current_exe().expect("a running test has a path"))
        .args(["--exact", "discovery_reads_what_a_driver_says", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder)
        .env(MODE, mode)
        .output()
        .expect("this test can be run again");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = text.lines().find_map(|line| line.split_once(MARK));
    said.unwrap_or_else(|| panic!("mode {mode}: {text}")).1.to_owned()
}

#[test]
fn discovery_reads_what_a_driver_says() {
    if std::env::var_os(MODE).is_some() {
        let said = match probe() {
            Ok(devices) => devices
                .iter()
                .map(|found| {
                    let info = serde_json::to_string(&found.info).expect("plain data");
                    format!("{} {info};", found.pci)
                })
                .collect(),
            Err(error) => error.to_string(),
        };
        println!("{MARK}{said}");
        return;
    }

    let folder = tempfile::tempdir().expect("a temporary folder");
    if compile(folder.path(), &[]).is_none() {
        return;
    }
    let card = |bus: &str, uuid: &str| {
        let uuid = uuid.repeat(16);
        format!(
            r#"0000:{bus}:00.0 {{"uuid":"{uuid}","name":"NVIDIA H100 80GB HBM3","memory":85031714816,"processors":132,"clock_rate":1980000.0,"max_threads_per_processor":2048}};"#
        )
    };
    let two = card("3b", "a0") + &card("3c", "a1");
    for (mode, expected) in [
        ("two", two.as_str()),
        ("none", "the CUDA driver is installed but shows no device"),
        ("empty", "the CUDA driver is installed but shows no device"),
        (
            "mismatch",
            "CUDA driver: initialise: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        ),
        (
            "nonsense",
            "device 0: the driver says processors = -1, which is not possible",
        ),
    ] {
        assert_eq!(probe_in_child(folder.path(), mode), expected, "mode {mode}");
    }

    let old = tempfile::tempdir().expect("a temporary folder");
    compile(old.path(), &["--cfg", "without_uuid"]).expect("compiled a moment ago");
    let said = probe_in_child(old.path(), "two");
    assert!(said.starts_with("the CUDA driver cannot be used: "), "{said}");
    assert!(said.contains("cuDeviceGetUuid"), "{said}");
}
