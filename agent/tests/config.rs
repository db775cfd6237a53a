//! The configuration: which source wins, what is refused and how that is said, and what is printed.

use std::path::{Path, PathBuf};
use std::process::Command;

use agent::config::{self, Config, Error, Loaded, Sources, example};
use coordinator::join::admission;
use protocol::id::ServerId;
use protocol::time::UnixMillis;

const HOTKEY: &str = "5CcyqxXnJucaCnQQvvUg5EPzj1uoNAxACZvzArHw5aVDvgNH";
const VALIDATOR: &str = "5Dt7HZ7Zpw4DppPxFM7Ke3Cm7sDAWhsZXmM5ZAmE7dSVJbcQ";

/// A host and member on one machine, with a stand-in as its validator.
fn good(folder: &Path) -> String {
    format!(
        r#"
data = "/srv/chutes"
[miner]
hotkey = "{HOTKEY}"
seed_file = "{seed}"
seed_on_gpu_host = true
[[validators]]
hotkey = "{VALIDATOR}"
api = "http://127.0.0.1:8000"
socket = "ws://127.0.0.1:8000"
registry = "127.0.0.1:5000"
[host]
name = "host-1"
id = "host-1.example"
address = "192.0.2.1"
[coordinator]
enabled = true
[proof]
backend = "cpu"
[runtime]
kind = "process"
"#,
        seed = folder.join("seed").display()
    )
}

struct Case {
    folder: tempfile::TempDir,
    sources: Sources,
}

impl Case {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let text = good(folder.path());
        let case = Self {
            sources: Sources {
                file: Some(folder.path().join("config.toml")),
                ..Sources::default()
            },
            folder,
        };
        case.write(&text);
        case
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("config.toml")
    }

    fn write(&self, text: &str) {
        std::fs::write(self.file(), text).expect("our own folder");
    }

    /// Replaces a piece of the good file.
    fn edit(&self, from: &str, to: &str) -> &Self {
        let text = std::fs::read_to_string(self.file()).expect("written above");
        assert!(text.contains(from), "{from} is not in the file");
        self.write(&text.replacen(from, to, 1));
        self
    }

    fn variable(mut self, name: &str, value: &str) -> Self {
        self.sources.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    fn flag(mut self, assignment: &str) -> Self {
        self.sources.assignments.push(assignment.to_owned());
        self
    }

    fn load(&self) -> Loaded {
        config::load(&self.sources).expect("a good configuration")
    }

    /// The lines that complain.
    fn refused(&self) -> Vec<String> {
        let error = config::load(&self.sources).expect_err("not a good configuration");
        assert!(matches!(error, Error::Invalid(_)), "{error}");
        error.to_string().lines().map(ToOwned::to_owned).collect()
    }
}

#[test]
fn each_source_wins_over_the_one_before() {
    let tick = |case: &Case| case.load().written.coordinator.tick.to_string();
    assert_eq!(tick(&Case::new()), "15s");
    let case = Case::new();
    case.edit("enabled = true", "enabled = true\ntick = \"16s\"");
    assert_eq!(tick(&case), "16s");
    let case = case
        .variable("CHUTES_AGENT__COORDINATOR__TICK", "17s")
        .variable("PATH", "x");
    assert_eq!(tick(&case), "17s");
    let case = case
        .flag("coordinator.tick=18s")
        .flag("coordinator.tick = \"19s\"");
    assert_eq!(tick(&case), "19s");
    let mut case = case.flag("data=/from/set");
    assert_eq!(case.load().config.data, Path::new("/from/set"));
    case.sources.data = Some("/from/flag".into());
    assert_eq!(case.load().config.data, Path::new("/from/flag"));
}

#[test]
fn variables_and_flags_take_toml_and_plain_texts() {
    let case = Case::new()
        .variable("CHUTES_AGENT__HOST__NAME", "7")
        .variable("CHUTES_AGENT__PROOF__SOFTWARE_GPUS", "3")
        .variable("CHUTES_AGENT__EGRESS__ALLOWED_ALSO", "[\"a.example\"]")
        .flag("coordinator.pay_profile=2025-09")
        .flag("coordinator.allow_plain_legacy_writes=true");
    let written = case.load().written;
    assert_eq!(written.host.name.as_deref(), Some("7"));
    assert_eq!(written.proof.software_gpus, 3);
    assert_eq!(written.egress.allowed_also, ["a.example"]);
    assert!(written.coordinator.allow_plain_legacy_writes);
    let profile = toml::Value::try_from(written.coordinator.pay_profile).expect("a text");
    assert_eq!(profile.as_str(), Some("2025-09"));
}

#[test]
fn unknown_keys_are_named_with_their_place_and_what_was_meant() {
    let case = Case::new()
        .variable("CHUTES_AGENT__LOG__LEVLE", "info")
        .flag("host.seed_file=/x")
        .flag("colour=blue")
        .flag("nonsense");
    case.edit("[host]", "[host]\nadress = \"x\"");
    case.edit("api = ", "token = \"x\"\napi = ");
    case.edit("data = ", "seed = 1\ndata = ");
    let file = case.file().display().to_string();
    let lines = case.refused();
    for expected in [
        format!("{file}: seed: unknown key"),
        format!("{file}: host.adress: unknown key; did you mean host.address?"),
        format!("{file}: validators[].token: unknown key"),
        "environment variable CHUTES_AGENT__LOG__LEVLE: log.levle: unknown key; did you mean log.level?"
            .to_owned(),
        "flag --set host.seed_file: host.seed_file: unknown key; did you mean miner.seed_file?".to_owned(),
        "flag --set colour: colour: unknown key".to_owned(),
        "flag --set nonsense: write section.key=value".to_owned(),
    ] {
        assert!(
            lines.iter().any(|line| line == &expected),
            "{expected} is not in {lines:#?}"
        );
    }
    assert_eq!(lines.len(), 7, "{lines:#?}");
}

#[test]
fn wrong_types_are_named_with_what_is_expected() {
    let case = Case::new().variable("CHUTES_AGENT__REGISTRY__STORE", "perhaps");
    case.edit("seed_on_gpu_host = true", "seed_on_gpu_host = \"yes\"");
    case.edit("backend = \"cpu\"", "backend = \"abacus\"\nlisten = \"nowhere\"");
    case.edit(
        "enabled = true",
        "enabled = true\ntick = 5\nobserve = \"5 fortnights\"",
    );
    case.edit("[host]", "log = 3\n[host]");
    let file = case.file().display().to_string();
    let lines = case.refused();
    for (key, place, expected) in [
        ("miner.seed_on_gpu_host", file.as_str(), "expected a boolean"),
        ("proof.backend", &file, "`cuda`"),
        ("proof.listen", &file, "invalid socket address"),
        ("coordinator.tick", &file, "expected a string"),
        ("coordinator.observe", &file, "30s"),
        (
            "registry.store",
            "environment variable CHUTES_AGENT__REGISTRY__STORE",
            "expected a boolean",
        ),
    ] {
        let start = format!("{place}: {key}: ");
        assert!(
            lines
                .iter()
                .any(|line| line.starts_with(&start) && line.contains(expected)),
            "{start}...{expected} is not in {lines:#?}"
        );
    }
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let case = Case::new();
    case.edit("[miner]", "[miner");
    let error = config::load(&case.sources).expect_err("no TOML").to_string();
    assert!(
        error.contains(&case.file().display().to_string()) && error.contains("line 3"),
        "{error}"
    );
    std::fs::remove_file(case.file()).expect("written above");
    let error = config::load(&case.sources).expect_err("no file").to_string();
    assert!(error.contains("config.toml"), "{error}");
}

#[test]
fn what_makes_no_sense_is_refused_with_the_reason() {
    let real = "api = \"https://api.chutes.ai\"";
    let rows: &[(&str, &str, &str)] = &[
        ("api = \"http://127.0.0.1:8000\"", real, "isolates nothing"),
        (
            "api = \"http://127.0.0.1:8000\"",
            real,
            "software GPUs, for development only",
        ),
        (
            "api = \"http://127.0.0.1:8000\"",
            "api = \"http://8.8.8.8\"",
            "only for loopback",
        ),
        (
            "kind = \"process\"",
            "kind = \"kubernetes\"\nnode = \"a-name-that-is-too-long-for-a-label-of-kubernetes-which-has-63-characters\"",
            "give it a shorter one",
        ),
        ("seed_on_gpu_host = true", "", "set miner.seed_on_gpu_host = true"),
        (
            "seed_on_gpu_host = true",
            "seed_on_gpu_host = true\nsigner_user = \"nobody\"",
            "65534:65534",
        ),
        ("address = \"192.0.2.1\"", "", "host.address is missing"),
        (
            "address = \"192.0.2.1\"",
            "address = \"http://192.0.2.1\"",
            "without a scheme",
        ),
        (
            "address = \"192.0.2.1\"",
            "[host.addresses]\nhost-1 = \"http://192.0.2.1\"",
            "host.addresses = \"http://192.0.2.1\": write an address or a name alone",
        ),
        ("id = \"host-1.example\"", "id = \"host_1\"", "host.id"),
        (
            "enabled = true",
            "enabled = true\nstrategy = \"luck\"",
            "there is value_per_cost",
        ),
        (
            "enabled = true",
            "enabled = true\ntick = \"0s\"",
            "coordinator.tick must be more than zero",
        ),
        (HOTKEY, "5Cc", "miner.hotkey: "),
        (VALIDATOR, "5Dt", "validators[0].hotkey"),
        (
            "[host]",
            "[registry]\nlisten = \"0.0.0.0:30500\"\n[host]",
            "not a loopback address",
        ),
        ("[host]", "[egress]\nallowed = [\"*\"]\n[host]", "egress.allowed"),
        ("[host]", "[log]\nlevel = \"agent=loud\"\n[host]", "log.level"),
        ("[host]", "[cache]\ndirectory = \"/\"\n[host]", "cache.directory"),
        (
            "kind = \"process\"",
            "kind = \"process\"\nports = \"1-2\"",
            "runtime.ports",
        ),
        (
            "kind = \"process\"",
            "kind = \"process\"\n[packet_filter]\nenabled = true",
            "elsewhere there are no pods",
        ),
        (
            "kind = \"process\"",
            "kind = \"kubernetes\"\n[packet_filter]\nenabled = true\ntrusted_namespaces = [\"kube-system\", \"chutes\"]",
            "they would not be filtered",
        ),
        (
            "kind = \"process\"",
            "kind = \"kubernetes\"\n[packet_filter]\nenabled = true\nnetworks = [\"10.42.0.0\", \"10.42/16\"]",
            "packet_filter.networks: \"10.42/16\"",
        ),
        (
            "backend = \"cpu\"",
            "backend = \"cpu\"\nsoftware_gpus = 0",
            "proof.software_gpus",
        ),
    ];
    for (from, to, expected) in rows {
        let case = Case::new();
        case.edit(from, to);
        let lines = case.refused();
        assert!(
            lines.iter().any(|line| line.contains(expected)),
            "{to}: {expected} is not in {lines:#?}"
        );
    }
    let case = Case::new();
    case.edit("enabled = true", "")
        .edit("[host]", "[host]\nenabled = false");
    assert!(case.refused().join("\n").contains("nothing to run"));
}

#[test]
fn services_get_what_was_written() {
    let Config { member, host, .. } = Case::new().load().config;
    let (member, host) = (member.expect("enabled"), host.expect("enabled"));
    assert_eq!(member.coordinator.data, Path::new("/srv/chutes/coordinator"));
    assert_eq!(member.coordinator.miner.as_str(), HOTKEY);
    assert_eq!(host.host.link.first.as_deref(), Some("127.0.0.1:4433"));
    assert_eq!(host.host.link.certificates, Path::new("/srv/chutes/host"));
    assert_eq!(host.host.identity.proof_port, 30443);
    assert_eq!(host.proof.socket, Path::new("/srv/chutes/run/proof.sock"));
    assert_eq!(host.data.socket, Path::new("/srv/chutes/run/data.sock"));
    assert_eq!(host.data.registry.upstreams.len(), 1);
    assert_eq!(host.host.identity.address, "192.0.2.1");

    // The settings of several hosts, of which this is one.
    let case = Case::new();
    case.edit(
        "[coordinator]",
        "[host.addresses]\nhost-1 = \"203.0.113.7\"\nhost-2 = \"203.0.113.8\"\n[coordinator]",
    );
    let host = case.load().config.host.expect("enabled");
    assert_eq!(host.host.identity.address, "203.0.113.7");

    let case = Case::new();
    case.edit("enabled = true", "enabled = false")
        .edit("seed_on_gpu_host = true", "")
        .edit("[host]", "[host]\ncoordinator = \"192.0.2.9:4433\"");
    let config = case.load().config;
    assert!(config.member.is_none(), "this host holds no seed");
    assert_eq!(
        config.host.expect("enabled").host.link.first.as_deref(),
        Some("192.0.2.9:4433")
    );

    let case = Case::new();
    case.edit("[host]", "[host]\nenabled = false")
        .edit("seed_on_gpu_host = true", "");
    assert!(case.load().config.host.is_none());
}

const NODES: &str = r#"[nodes]
config_map = "gpu-cluster"
namespace = "miner"
member_account = "gpu-members"
host_account = "gpu-hosts"
audience = "us"
[host]"#;

#[test]
fn the_cluster_whose_nodes_enter_is_named_whole_or_not_at_all() {
    let nodes = |case: &Case| case.load().config.member.expect("enabled").nodes;
    assert_eq!(nodes(&Case::new()), None);
    let case = Case::new();
    case.edit("[host]", NODES);
    let config = nodes(&case).expect("it is named");
    assert_eq!(config.notice_name(), "ConfigMap miner/gpu-cluster");
    for key in ["namespace", "member_account", "host_account", "audience"] {
        let case = Case::new();
        case.edit("[host]", NODES)
            .edit(&format!("\n{key} = \""), &format!("\n{key} = \"\" # "));
        let lines = case.refused().join("\n");
        assert!(lines.contains(&format!("nodes.{key} is missing")), "{lines}");
    }
    let case = Case::new();
    case.edit("[host]", NODES)
        .edit("\"gpu-hosts\"", "\"gpu-members\"");
    assert!(case.refused().join("\n").contains("the account says who votes"));
}

#[test]
fn a_host_that_has_joined_goes_on_under_the_id_that_it_was_given() {
    let case = Case::new();
    let data = case.folder.path().join("data");
    let host = data.join("host");
    std::fs::create_dir_all(&host).expect("our own folder");
    let id = ServerId::parse("node-1-given").expect("an id");
    let now = UnixMillis(1_800_000_000_000);
    admission::found(&host, "chutes", &id, "192.0.2.1:4433", now).expect("it can");
    case.edit("/srv/chutes", &data.display().to_string());
    let written_wins = case.load().written.host.id;
    assert_eq!(written_wins.as_deref(), Some("host-1.example"));
    case.edit("id = \"host-1.example\"", "");
    assert_eq!(case.load().written.host.id.as_deref(), Some("node-1-given"));
}

#[test]
fn what_is_in_effect_reads_back_as_itself() {
    let case = Case::new();
    let first = case.load().written;
    case.write(&toml::to_string(&first).expect("settings are TOML"));
    assert_eq!(case.load().written, first);
}

#[test]
fn a_hosts_id_is_made_of_its_name_and_machine() {
    let machine = |name: &str, id: &str| config::written::Machine {
        name: name.to_owned(),
        id: id.to_owned(),
    };
    let id = |machine| {
        let mut written = config::Written::default();
        written.fill_in(&machine);
        written.host.id.expect("filled in")
    };
    let one = id(machine("GPU_host.lan", "m1"));
    assert!(one.starts_with("gpu-host-lan-"), "{one}");
    assert_eq!(one, id(machine("GPU_host.lan", "m1")));
    assert_ne!(one, id(machine("GPU_host.lan", "m2")));
    for name in ["", "---", "ä", &"x".repeat(300)] {
        let id = id(machine(name, ""));
        assert!(config::checked::server_id(&id).is_ok(), "{name} became {id}");
    }
}

#[test]
fn the_example_has_known_keys_only() {
    let case = Case::new();
    case.write(&example::text(Path::new("/srv/\"chutes\"")));
    let (written, _) = config::read(&case.sources).expect("keys and types are good");
    assert_eq!(written.data, Path::new("/srv/\"chutes\""));
    assert!(written.coordinator.enabled);
}

fn chutes_agent(arguments: &[&str]) -> (bool, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_chutes-agent"))
        .args(arguments)
        .env_remove("CHUTES_AGENT_CONFIG")
        .output()
        .expect("the program runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (output.status.success(), text(output.stdout), text(output.stderr))
}

#[test]
fn config_check_prints_what_is_in_effect_and_no_secret() {
    let case = Case::new();
    let seed = "0101010101010101010101010101010101010101010101010101010101010101";
    std::fs::write(case.folder.path().join("seed"), seed).expect("our own folder");
    let file = case.file().display().to_string();
    let check = ["config", "check", "--config", &file];
    let (good, printed, complained) = chutes_agent(&check);
    assert!(good, "{complained}");
    assert!(!printed.contains(&seed[..16]), "the seed is printed");
    let printed = printed.replace(&case.folder.path().display().to_string(), "/etc/chutes-agent");
    assert_eq!(
        printed,
        include_str!("config/check.toml"),
        "the golden file is agent/tests/config/check.toml"
    );

    // A seed in the place of its path is not repeated either.
    let assignment = format!("miner.seed_file={seed}");
    let (good, printed, complained) = chutes_agent(&[&check[..], &["--set", &assignment]].concat());
    assert!(
        !good && complained.contains("miner.seed_file holds a seed"),
        "{complained}"
    );
    assert!(!printed.contains(&seed[..16]) && !complained.contains(&seed[..16]));
}

#[test]
fn every_command_explains_itself() {
    let mut commands = vec![
        "run",
        "init",
        "join",
        "rejoin",
        "restore",
        "snapshots",
        "recover",
        "config",
        "signer",
    ];
    if cfg!(feature = "dev") {
        commands.extend(["dev", "validator-stand-in"]);
    }
    for command in commands {
        let (good, printed, complained) = chutes_agent(&[command, "--help"]);
        assert!(good && printed.contains("Usage"), "{command}: {complained}");
    }
}

#[test]
fn init_writes_an_example_then_founds_and_leaves_what_exists() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (file, data) = (path("config.toml"), path("data"));
    let init = ["init", "--config", &file, "--data", &data];
    let (good, printed, complained) = chutes_agent(&init);
    assert!(
        good && printed.contains("fill in what is empty"),
        "{printed}{complained}"
    );
    let (good, _, complained) = chutes_agent(&init);
    assert!(
        !good && complained.contains("coordinator.advertise"),
        "{complained}"
    );
    let text = std::fs::read_to_string(&file).expect("written by init");
    std::fs::write(&file, text.replace("address = \"\"", "address = \"192.0.2.1\"")).expect("ours");
    let (good, printed, complained) = chutes_agent(&init);
    assert!(good && printed.contains("founded"), "{printed}{complained}");
    let read = |name: &str| std::fs::read(folder.path().join(name)).expect("written by init");
    let files = [
        "config.toml",
        "data/host/admission.json",
        "data/host/ca.key",
        "data/host/ca.pem",
        "data/host/host.key",
        "data/host/host.pem",
    ];
    let before = files.map(read);
    let (good, printed, complained) = chutes_agent(&init);
    assert!(good && printed.contains("left as it is"), "{printed}{complained}");
    assert!(before == files.map(read), "init changed what existed");

    // There is nothing to go on with, and a running agent is in the way.
    let recover = ["recover", "--config", &file, "--data", &data, "--cluster", "test"];
    let (good, _, complained) = chutes_agent(&recover);
    assert!(
        !good && complained.contains("has not received anything yet"),
        "{complained}"
    );
    let lock = agent::processes::Lock::take(&folder.path().join("data")).expect("nobody has it");
    let (good, _, complained) = chutes_agent(&recover);
    assert!(
        !good && complained.contains("stop the agent first"),
        "{complained}"
    );
    drop(lock);

    // A second cluster is not what somebody with a token wants.
    let (good, _, complained) = chutes_agent(&["join", "--config", &file, "--data", &data, "nonsense"]);
    assert!(!good && complained.contains("no join token"), "{complained}");
    let token = coordinator::join::Token {
        cluster: "other-1".to_owned(),
        invite: 1,
        secret: [1; 32],
        authority: [2; 32],
        doors: vec!["127.0.0.1:1".to_owned()],
    };
    let token = token.to_string();
    let (good, _, complained) = chutes_agent(&["join", "--config", &file, "--data", &data, &token]);
    assert!(!good && complained.contains("invites to other-1"), "{complained}");

    // As a chart does it: the token lies in a file, which may be gone once the host is in.
    let file_of_token = folder.path().join("token");
    std::fs::write(&file_of_token, format!("{token}\n")).expect("writable");
    let name = file_of_token.display().to_string();
    let mut join = vec!["join", "--config", &file, "--data", &data, "--token-file", &name];
    let (good, _, complained) = chutes_agent(&join);
    assert!(!good && complained.contains("invites to other-1"), "{complained}");
    std::fs::remove_file(&file_of_token).expect("it is there");
    let (good, _, complained) = chutes_agent(&join);
    assert!(!good && complained.contains("read the token in"), "{complained}");
    join.push("--if-needed");
    let (good, printed, complained) = chutes_agent(&join);
    assert!(
        good && printed.contains("belongs to the cluster"),
        "{printed} {complained}"
    );
    let (good, _, complained) = chutes_agent(&["join", "--config", &file, "--data", &data]);
    assert!(!good && complained.contains("<TOKEN"), "{complained}");
}
