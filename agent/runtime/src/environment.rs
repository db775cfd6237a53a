//! What a chute finds around it: command line, environment variables, health port (pure).
//!
//! The chutes library and the validator check these, so they follow the validator's protocol to the letter,
//! and nothing is added to them lightly: newer libraries send the whole environment to the validator.

use protocol::workload::{ATTESTATION_PORT, LOGGING_PORT, PRIMARY_PORT, PortMapping, WorkloadSpec};

/// Newer libraries end with code 137 when they find a proxy variable in any spelling.
const FIRST_WITHOUT_PROXY: [u32; 3] = [0, 3, 63];
/// From this version on, the log server answers health checks.
const FIRST_WITH_LOG_SERVER: [u32; 3] = [0, 3, 3];

/// What the environment depends on besides the workload itself.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    /// Where the ports are reached from outside.
    pub ports: &'a [PortMapping],
    /// Folder of the models, as the chute sees it.
    pub cache: &'a str,
    /// URL of the explicit egress proxy, where one is to be used.
    pub egress_door: Option<&'a str>,
    /// On a sealed worker.
    pub sealed: bool,
}

/// The first three numbers of a version; what follows a number within its part is ignored, so that
/// `0.3.40.rc5` is 0.3.40.
#[must_use]
pub fn version_numbers(version: &str) -> Option<[u32; 3]> {
    let mut numbers = [0; 3];
    for (number, part) in numbers.iter_mut().zip(version.trim().split('.')) {
        let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
        *number = part[..end].parse().ok()?;
    }
    Some(numbers)
}

fn library_version(spec: &WorkloadSpec) -> Option<[u32; 3]> {
    spec.chutes_version.as_deref().and_then(version_numbers)
}

/// The port inside the chute whose `/_alive` says that it is ready.
#[must_use]
pub fn health_port(spec: &WorkloadSpec) -> u16 {
    match library_version(spec) {
        Some(version) if version >= FIRST_WITH_LOG_SERVER => LOGGING_PORT,
        _ => PRIMARY_PORT,
    }
}

/// The command line. The seed appears in the legacy flow alone, which has no launch token.
#[must_use]
pub fn command(spec: &WorkloadSpec) -> Vec<String> {
    let mut line = vec![
        "chutes".to_owned(),
        "run".to_owned(),
        spec.ref_str.clone(),
        "--port".to_owned(),
        PRIMARY_PORT.to_string(),
    ];
    if spec.launch_token.is_none()
        && let Some(seed) = spec.legacy_seed
    {
        line.extend(["--graval-seed".to_owned(), seed.to_string()]);
    }
    line.extend(["--miner-ss58".to_owned(), spec.miner.to_string()]);
    line.extend(["--validator-ss58".to_owned(), spec.validator.to_string()]);
    line
}

/// All variables, in a fixed order. The value of `CHUTES_LAUNCH_JWT` is a secret.
#[must_use]
pub fn environment(spec: &WorkloadSpec, around: Surroundings<'_>) -> Vec<(String, String)> {
    let mut list: Vec<(String, String)> = Vec::new();
    let mut set = |name: &str, value: &str| list.push((name.to_owned(), value.to_owned()));
    let gpus: Vec<String> = spec.gpus.iter().map(|gpu| gpu.visible_device()).collect();
    set("NVIDIA_VISIBLE_DEVICES", &gpus.join(","));
    for port in around.ports {
        let name = match port.internal {
            PRIMARY_PORT => "CHUTES_PORT_PRIMARY".to_owned(),
            LOGGING_PORT => "CHUTES_PORT_LOGGING".to_owned(),
            ATTESTATION_PORT if around.sealed => "CHUTES_PORT_ATTESTATION".to_owned(),
            internal => format!("CHUTES_PORT_{}_{internal}", port.protocol.env_word()),
        };
        set(&name, &port.external.to_string());
    }
    if let Some(token) = &spec.launch_token {
        set("CHUTES_LAUNCH_JWT", token.reveal());
        set("CHUTES_EXTERNAL_HOST", &spec.external_host);
    }
    set("CHUTES_EXECUTION_CONTEXT", "REMOTE");
    set("HF_HOME", around.cache);
    set("CIVITAI_HOME", &format!("{}/civitai", around.cache));
    for (name, value) in TUNING {
        set(name, value);
    }
    if around.sealed {
        set("CHUTES_NVIDIA_DEVICES", &gpus.join(","));
        for (name, value) in SEALED_TUNING {
            set(name, value);
        }
    }
    let takes_proxy = library_version(spec).is_some_and(|version| version < FIRST_WITHOUT_PROXY);
    if let (true, Some(door)) = (takes_proxy, around.egress_door) {
        for name in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"] {
            set(name, door);
        }
        set("NO_PROXY", "localhost,127.0.0.1");
    }
    list
}

const TUNING: [(&str, &str); 8] = [
    ("NCCL_P2P_DISABLE", "1"),
    ("NCCL_IB_DISABLE", "1"),
    ("NCCL_SHM_DISABLE", "0"),
    ("NCCL_NET_GDR_LEVEL", "0"),
    ("NCCL_DEBUG", "INFO"),
    ("NCCL_SOCKET_IFNAME", "lo"),
    ("NCCL_SOCKET_FAMILY", "AF_INET"),
    ("VLLM_DISABLE_TELEMETRY", "1"),
];

/// From version 1.3.1 of the worker's virtual machine on (`kubernetes-objects`, section 1.2).
const SEALED_TUNING: [(&str, &str); 2] = [
    ("HF_XET_FIXED_DOWNLOAD_CONCURRENCY", "16"),
    ("TOKIO_WORKER_THREADS", "8"),
];

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use protocol::hotkey::Hotkey;
    use protocol::id::{ChuteId, ChuteVersion, ConfigId, DeploymentId, GpuId};
    use protocol::workload::{Port, PortProtocol, Secret};

    /// A chute in the launch-config flow.
    pub(crate) fn spec() -> WorkloadSpec {
        let port = |internal| Port {
            internal,
            protocol: PortProtocol::Tcp,
        };
        WorkloadSpec {
            deployment: DeploymentId::parse("5c6f7f0e-9f5c-4d8a-8f0a-0d2a4c0f7a11").expect("valid"),
            validator: Hotkey::from_public_key(&[2; 32]),
            miner: Hotkey::from_public_key(&[1; 32]),
            chute: ChuteId::parse("2ff25e81-4586-5ec8-b892-3a6f342693d7").expect("valid"),
            version: ChuteVersion::parse("v1").expect("valid"),
            image: "someone/echo:1.0".to_owned(),
            ref_str: "echo:chute".to_owned(),
            filename: "echo.py".to_owned(),
            code: "print('hello')\n".to_owned(),
            chutes_version: Some("0.3.40.rc5".to_owned()),
            gpus: vec![
                GpuId::from_device_uuid("aabbccdd00112233445566778899eeff").expect("valid"),
                GpuId::from_device_uuid("aabbccdd00112233445566778899ee00").expect("valid"),
            ],
            external_host: "203.0.113.7".to_owned(),
            config: Some(ConfigId::parse("cfg-1").expect("valid")),
            launch_token: Some(Secret::new("token.of.launch".to_owned())),
            legacy_seed: None,
            job: None,
            ports: vec![port(PRIMARY_PORT), port(LOGGING_PORT)],
            cpu_count: 8,
            memory_gb: 48,
            disk_gb: 10,
        }
    }

    fn value(spec: &WorkloadSpec, door: Option<&str>, name: &str) -> Option<String> {
        let ports = [
            (8000, 31000, PortProtocol::Tcp),
            (8001, 31001, PortProtocol::Tcp),
            (5000, 31002, PortProtocol::Http),
            (6000, 31003, PortProtocol::Udp),
        ]
        .map(|(internal, external, protocol)| PortMapping {
            internal,
            external,
            protocol,
        });
        let around = Surroundings {
            ports: &ports,
            cache: "/cache",
            egress_door: door,
            sealed: false,
        };
        let mut all = environment(spec, around);
        let names: std::collections::BTreeSet<_> = all.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(names.len(), all.len(), "a variable is set twice");
        all.retain(|(found, _)| found == name);
        all.pop().map(|(_, value)| value)
    }

    #[test]
    fn the_environment_follows_the_protocol() {
        let spec = spec();
        let check = |name: &str, expected: &str| {
            assert_eq!(value(&spec, None, name).as_deref(), Some(expected), "{name}");
        };
        check(
            "NVIDIA_VISIBLE_DEVICES",
            "GPU-aabbccdd-0011-2233-4455-66778899eeff,GPU-aabbccdd-0011-2233-4455-66778899ee00",
        );
        check("CHUTES_PORT_PRIMARY", "31000");
        check("CHUTES_PORT_LOGGING", "31001");
        check("CHUTES_PORT_HTTP_5000", "31002");
        check("CHUTES_PORT_UDP_6000", "31003");
        check("CHUTES_LAUNCH_JWT", "token.of.launch");
        check("CHUTES_EXTERNAL_HOST", "203.0.113.7");
        check("CHUTES_EXECUTION_CONTEXT", "REMOTE");
        check("HF_HOME", "/cache");
        check("CIVITAI_HOME", "/cache/civitai");
        check("NCCL_SOCKET_IFNAME", "lo");
        check("VLLM_DISABLE_TELEMETRY", "1");
    }

    #[test]
    fn proxy_variables_are_for_old_libraries_with_an_explicit_door_alone() {
        for (version, door, expected) in [
            (Some("0.3.62"), Some("http://127.0.1.1:3128"), true),
            (Some("0.2.9"), Some("http://127.0.1.1:3128"), true),
            (Some("0.3.62"), None, false),
            (Some("0.3.63"), Some("http://127.0.1.1:3128"), false),
            (Some("0.6.10"), Some("http://127.0.1.1:3128"), false),
            (Some("newest"), Some("http://127.0.1.1:3128"), false),
            (None, Some("http://127.0.1.1:3128"), false),
        ] {
            let spec = WorkloadSpec {
                chutes_version: version.map(str::to_owned),
                ..spec()
            };
            for name in ["HTTP_PROXY", "https_proxy"] {
                assert_eq!(
                    value(&spec, door, name).is_some(),
                    expected,
                    "{version:?} {door:?} {name}"
                );
            }
        }
    }

    #[test]
    fn the_command_names_a_seed_in_the_legacy_flow_alone() {
        let miner = Hotkey::from_public_key(&[1; 32]);
        let validator = Hotkey::from_public_key(&[2; 32]);
        let tail = format!("--miner-ss58 {miner} --validator-ss58 {validator}");
        assert_eq!(
            command(&spec()).join(" "),
            format!("chutes run echo:chute --port 8000 {tail}")
        );
        let legacy = WorkloadSpec {
            launch_token: None,
            config: None,
            legacy_seed: Some(u64::MAX),
            ..spec()
        };
        assert_eq!(
            command(&legacy).join(" "),
            format!("chutes run echo:chute --port 8000 --graval-seed 18446744073709551615 {tail}")
        );
        let both = WorkloadSpec {
            legacy_seed: Some(1),
            ..spec()
        };
        assert_eq!(command(&both), command(&spec()));
        assert_eq!(value(&legacy, None, "CHUTES_LAUNCH_JWT"), None);
        assert_eq!(value(&legacy, None, "CHUTES_EXTERNAL_HOST"), None);
    }

    #[test]
    fn the_health_port_depends_on_the_library() {
        for (version, expected) in [
            (Some("0.3.3"), 8001),
            (Some("0.3.2"), 8000),
            (Some("1"), 8001),
            (Some("0.3.40.rc5"), 8001),
            (Some(""), 8000),
            (None, 8000),
        ] {
            let spec = WorkloadSpec {
                chutes_version: version.map(str::to_owned),
                ..spec()
            };
            assert_eq!(health_port(&spec), expected, "{version:?}");
        }
    }
}
