//! The configuration file that `init` writes: short, with the keys that every installation must look at.

use std::path::Path;

/// The text, with the data folder filled in.
#[must_use]
pub fn text(data: &Path) -> String {
    let data = toml::Value::String(data.display().to_string()).to_string();
    EXAMPLE.replace("@data@", &data)
}

const EXAMPLE: &str = r#"# Settings of chutes-agent. Every key: docs/configuration.md. Check with: chutes-agent config check
# A variable CHUTES_AGENT__SECTION__KEY wins over this file, a flag --set section.key=value over both.

# Folder of all that the agent keeps.
data = @data@

[miner]
# The miner's SS58 address.
hotkey = ""
# File with its seed (hexadecimal, or a wallet's hotkey file), mode 0600. On members of the coordinator only.
seed_file = "/etc/chutes-agent/seed"
# The seed may lie on a machine that also runs chutes.
seed_on_gpu_host = false
# User and group that the process with the seed becomes, when started as root.
signer_user = "65534:65534"

# Who we work for. Repeat the section for more validators.
[[validators]]
hotkey = "5Dt7HZ7Zpw4DppPxFM7Ke3Cm7sDAWhsZXmM5ZAmE7dSVJbcQ"
api = "https://api.chutes.ai"
socket = "wss://ws.chutes.ai"
registry = "registry.chutes.ai"

[host]
# Run workloads on this machine.
enabled = true
# Address under which validators reach this machine from outside.
address = ""
# Provider or place: members are spread over them.
# site = "provider-1"

[coordinator]
# Be a member of the coordinator.
enabled = true
# Where hosts and other members connect (UDP), and where they find that from outside.
hosts_listen = "0.0.0.0:4433"
# advertise = "192.0.2.1:4433"
# The management API. It has no TLS of its own.
api_listen = "127.0.0.1:32000"

[runtime]
# "process" is for development with validators on this machine.
kind = "kubernetes"
# Without it: the usual kubeconfig, or the service account of the pod that the agent runs in.
# kubeconfig = "/etc/rancher/k3s/k3s.yaml"

[log]
level = "info"
format = "text"
"#;
