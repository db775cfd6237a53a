//! What a container is told: arguments, variables and code.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use proof::software_device;
use protocol::gpu::DeviceInfo;
use protocol::hotkey::Hotkey;
use protocol::id::{ConfigId, GpuId};
use protocol::workload::{LOGGING_PORT, PRIMARY_PORT};

use crate::state::PortMapping;
use crate::token::claims_of;

/// Checked settings.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) ref_str: String,
    pub(crate) miner: Hotkey,
    pub(crate) validator: Hotkey,
    pub(crate) flow: Flow,
    pub(crate) devices: Vec<DeviceInfo>,
    pub(crate) external_host: String,
    /// The app, the log server, then the ports of the job.
    pub(crate) ports: Vec<PortMapping>,
    /// Address to listen on, and whether with the external port numbers.
    pub(crate) bind: (IpAddr, bool),
    pub(crate) proxy: Option<String>,
    pub(crate) code: String,
}

/// How the container makes itself known.
#[derive(Debug)]
pub(crate) enum Flow {
    LaunchConfig(LaunchToken),
    /// The miner announces it; the seed is for the proof.
    Legacy {
        seed: u64,
    },
}

/// The token with what a container reads from it.
pub(crate) struct LaunchToken {
    pub(crate) token: String,
    pub(crate) url: String,
    pub(crate) config: ConfigId,
}

impl std::fmt::Debug for LaunchToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LaunchToken({})", self.config)
    }
}

impl Settings {
    pub(crate) fn read(arguments: &[String], environment: &BTreeMap<String, String>) -> anyhow::Result<Self> {
        let (ref_str, options) = read_arguments(arguments)?;
        let option = |name: &str| {
            options
                .get(name)
                .copied()
                .with_context(|| format!("argument --{name} is missing"))
        };
        let variable = |name: &str| environment.get(name).filter(|value| !value.is_empty());
        ensure!(
            option("port")? == PRIMARY_PORT.to_string(),
            "--port must be {PRIMARY_PORT}"
        );
        let flow = match (variable("CHUTES_LAUNCH_JWT"), options.get("graval-seed")) {
            (Some(token), None) => Flow::LaunchConfig(read_token(token)?),
            (None, Some(seed)) => Flow::Legacy {
                seed: seed.parse().context("--graval-seed")?,
            },
            (Some(_), Some(_)) => bail!("both CHUTES_LAUNCH_JWT and --graval-seed"),
            (None, None) => bail!("neither CHUTES_LAUNCH_JWT nor --graval-seed"),
        };
        let bind = match variable("CHUTES_PROCESS_BIND_HOST") {
            Some(host) => (host.parse().context("CHUTES_PROCESS_BIND_HOST")?, true),
            None => (Ipv4Addr::UNSPECIFIED.into(), false),
        };
        let external_host = match (variable("CHUTES_EXTERNAL_HOST"), &flow) {
            (Some(host), _) => host.clone(),
            (None, Flow::Legacy { .. }) => String::new(),
            (None, Flow::LaunchConfig(_)) => bail!("CHUTES_EXTERNAL_HOST is missing"),
        };
        let filename = ref_str.split(':').next().unwrap_or_default();
        let code_file = variable("CHUTES_CODE_FILE")
            .cloned()
            .unwrap_or_else(|| format!("/app/{filename}.py"));
        let code = read_code(Path::new(&code_file))?;
        Ok(Self {
            miner: Hotkey::parse(option("miner-ss58")?).context("--miner-ss58")?,
            validator: Hotkey::parse(option("validator-ss58")?).context("--validator-ss58")?,
            devices: read_devices(variable("NVIDIA_VISIBLE_DEVICES").map_or("", |text| text))?,
            ports: read_ports(environment)?,
            proxy: variable("HTTPS_PROXY").or(variable("https_proxy")).cloned(),
            ref_str,
            flow,
            external_host,
            bind,
            code,
        })
    }

    /// Where a port is opened: the process runtime has no address translation.
    pub(crate) fn listen_port(&self, mapping: &PortMapping) -> u16 {
        if self.bind.1 {
            mapping.external_port
        } else {
            mapping.internal_port
        }
    }
}

fn read_arguments(arguments: &[String]) -> anyhow::Result<(String, BTreeMap<&str, &str>)> {
    let [_, run, ref_str, rest @ ..] = arguments else {
        bail!("usage: chutes run MODULE:VARIABLE --port 8000 --miner-ss58 M --validator-ss58 V");
    };
    ensure!(run == "run", "unknown command {run}");
    ensure!(ref_str.contains(':'), "{ref_str} is not MODULE:VARIABLE");
    let mut options = BTreeMap::new();
    for pair in rest.chunks(2) {
        let [name, value] = pair else {
            bail!("{} has no value", pair.concat());
        };
        let name = name
            .strip_prefix("--")
            .filter(|name| ["port", "graval-seed", "miner-ss58", "validator-ss58"].contains(name))
            .with_context(|| format!("unknown argument {name}"))?;
        options.insert(name, value.as_str());
    }
    Ok((ref_str.clone(), options))
}

fn read_token(token: &str) -> anyhow::Result<LaunchToken> {
    let claims = claims_of(token).context("CHUTES_LAUNCH_JWT")?;
    let text = |name: &str| {
        claims[name]
            .as_str()
            .map(str::to_owned)
            .with_context(|| format!("CHUTES_LAUNCH_JWT has no claim {name}"))
    };
    Ok(LaunchToken {
        token: token.to_owned(),
        url: text("url")?,
        config: ConfigId::parse(&text("sub")?)?,
    })
}

fn read_devices(list: &str) -> anyhow::Result<Vec<DeviceInfo>> {
    let devices = list
        .split(',')
        .filter(|text| !text.is_empty())
        .map(|text| GpuId::from_device_uuid(text).map(software_device))
        .collect::<Result<Vec<_>, _>>()
        .context("NVIDIA_VISIBLE_DEVICES")?;
    ensure!(!devices.is_empty(), "NVIDIA_VISIBLE_DEVICES names no GPU");
    Ok(devices)
}

fn read_ports(environment: &BTreeMap<String, String>) -> anyhow::Result<Vec<PortMapping>> {
    let mut ports = vec![];
    for (name, internal) in [("PRIMARY", PRIMARY_PORT), ("LOGGING", LOGGING_PORT)] {
        let value = environment
            .get(&format!("CHUTES_PORT_{name}"))
            .with_context(|| format!("CHUTES_PORT_{name} is missing"))?;
        ports.push(PortMapping {
            internal_port: internal,
            external_port: value.parse().with_context(|| format!("CHUTES_PORT_{name}"))?,
            proto: "tcp".to_owned(),
        });
    }
    for (name, value) in environment {
        let Some((proto, internal)) = name
            .strip_prefix("CHUTES_PORT_")
            .and_then(|rest| rest.rsplit_once('_'))
        else {
            continue;
        };
        ports.push(PortMapping {
            internal_port: internal.parse().with_context(|| name.clone())?,
            external_port: value.parse().with_context(|| name.clone())?,
            proto: proto.to_lowercase(),
        });
    }
    Ok(ports)
}

/// The code, or nothing where none is mounted: newer libraries get it from the validator.
fn read_code(path: &Path) -> anyhow::Result<String> {
    match std::fs::read_to_string(path) {
        Ok(code) => Ok(code),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::token::TokenKey;

    const MINER: &str = "5CcyqxXnJucaCnQQvvUg5EPzj1uoNAxACZvzArHw5aVDvgNH";
    const VALIDATOR: &str = "5CfCr47V5Dte6bwxNBE8K9oNnQd9fiay6aDEEkgYtFv7w4Fq";

    fn arguments(extra: &[&str]) -> Vec<String> {
        let line = ["chutes", "run", "app:chute", "--port", "8000"];
        let tail = ["--miner-ss58", MINER, "--validator-ss58", VALIDATOR];
        line.iter()
            .chain(extra)
            .chain(&tail)
            .map(|s| (*s).to_owned())
            .collect()
    }

    fn environment() -> BTreeMap<String, String> {
        let token = TokenKey::from_secret(b"s").sign(&json!({"url": "http://x/c", "sub": "c"}));
        [
            ("CHUTES_LAUNCH_JWT", token.as_str()),
            ("CHUTES_EXTERNAL_HOST", "127.0.1.1"),
            ("CHUTES_PORT_PRIMARY", "31000"),
            ("CHUTES_PORT_LOGGING", "31001"),
            ("CHUTES_PORT_UDP_9000", "31002"),
            (
                "NVIDIA_VISIBLE_DEVICES",
                "GPU-aabbccdd-0011-2233-4455-66778899eeff",
            ),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
    }

    #[test]
    fn a_containers_settings_are_read() {
        let mut environment = environment();
        let settings = Settings::read(&arguments(&[]), &environment).expect("complete");
        let ports: Vec<_> = settings
            .ports
            .iter()
            .map(|p| (p.internal_port, p.external_port, p.proto.as_str()))
            .collect();
        assert_eq!(
            ports,
            [(8000, 31000, "tcp"), (8001, 31001, "tcp"), (9000, 31002, "udp")]
        );
        assert_eq!(settings.listen_port(&settings.ports[0]), 8000);
        environment.insert("CHUTES_PROCESS_BIND_HOST".to_owned(), "127.0.1.1".to_owned());
        let settings = Settings::read(&arguments(&[]), &environment).expect("complete");
        assert_eq!(settings.listen_port(&settings.ports[0]), 31000);
        environment.remove("CHUTES_LAUNCH_JWT");
        environment.remove("CHUTES_EXTERNAL_HOST");
        let settings = Settings::read(&arguments(&["--graval-seed", "77"]), &environment).expect("legacy");
        assert!(matches!(settings.flow, Flow::Legacy { seed: 77 }));
    }

    #[test]
    fn incomplete_settings_say_what_is_missing() {
        for missing in [
            "CHUTES_LAUNCH_JWT",
            "CHUTES_EXTERNAL_HOST",
            "CHUTES_PORT_PRIMARY",
            "CHUTES_PORT_LOGGING",
            "NVIDIA_VISIBLE_DEVICES",
        ] {
            let mut environment = environment();
            environment.remove(missing);
            let error = Settings::read(&arguments(&[]), &environment).expect_err(missing);
            assert!(format!("{error:#}").contains(missing), "{error:#}");
        }
        for extra in [
            &["--verbose", "1"][..],
            &["--graval-seed", "1"],
            &["--graval-seed", "-1"],
        ] {
            assert!(
                Settings::read(&arguments(extra), &environment()).is_err(),
                "{extra:?}"
            );
        }
        assert!(Settings::read(&["chutes".to_owned()], &environment()).is_err());
    }
}
