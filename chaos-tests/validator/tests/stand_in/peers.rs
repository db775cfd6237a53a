//! Interoperability with code that is not ours: the python-socketio client and the signatures of
//! substrate-interface. `chaos-tests/peers/install.sh` installs them; without it the test says what it could
//! not try, and fails when `REQUIRE_PEERS=1`.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::support::{World, quiet_scenario};

const CLIENT: &str = r#"
import asyncio, json, sys, time, urllib.request
import socketio
from substrateinterface import Keypair

api, polling = sys.argv[1], sys.argv[2] == "polling"
key = Keypair.create_from_seed("0x" + "01" * 32, ss58_format=42)
stranger = Keypair.create_from_seed("0x" + "09" * 32, ss58_format=42)
seen = []

def headers(key, purpose):
    nonce = str(int(time.time()))
    signature = key.sign(f"{key.ss58_address}:{nonce}:{purpose}".encode()).hex()
    return {"X-Chutes-Hotkey": key.ss58_address, "X-Chutes-Nonce": nonce, "X-Chutes-Signature": signature}

def act(action):
    request = urllib.request.Request(api + "/_stand_in/action", json.dumps(action).encode(),
                                     {"Content-Type": "application/json"})
    return urllib.request.urlopen(request).read()

def rows():
    request = urllib.request.Request(api + "/miner/chutes/", headers=headers(key, "miner"))
    return urllib.request.urlopen(request).read().decode()

async def main():
    if polling:
        sio = socketio.AsyncClient(reconnection=False)
        try:
            await sio.connect(api, transports=["polling"])
        except socketio.exceptions.ConnectionError:
            print(json.dumps({"polling": "refused"}))
        return
    sio = socketio.AsyncClient(reconnection_delay=1, reconnection_delay_max=1)
    arrived = asyncio.Event()

    @sio.on("*")
    async def anything(name, data):
        seen.append([name, data])
        arrived.set()

    @sio.event
    async def disconnect(*args):
        seen.append(["disconnected", None])
        arrived.set()

    async def until(test):
        async def wait():
            while not any(test(item) for item in seen):
                arrived.clear()
                await arrived.wait()
        await asyncio.wait_for(wait(), 20)

    await sio.connect(api, transports=["websocket"])
    await sio.emit("authenticate", headers(key, "sockets"))
    await until(lambda item: item[0] == "auth_success")
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, act, {"action": "publish_chute", "name": "first"})
    await until(lambda item: item[0] == "miner_broadcast" and item[1]["reason"] == "chute_created")
    answer = await sio.call("authenticate", headers(key, "sockets"), timeout=10)
    seen.append(["acknowledged", answer])
    # Several pings pass before the connection is cut; then the client comes back by itself.
    await asyncio.sleep(1.0)
    alive = sio.connected
    await loop.run_in_executor(None, act, {"action": "drop_sockets"})
    await until(lambda item: item[0] == "disconnected")
    while not sio.connected:
        await asyncio.sleep(0.05)
    await sio.emit("authenticate", headers(key, "sockets"))
    await loop.run_in_executor(None, act, {"action": "publish_chute", "name": "second"})
    await until(lambda item: item[0] == "miner_broadcast" and sum(
        1 for name, data in seen if name == "miner_broadcast" and data["reason"] == "chute_created") == 2)
    await sio.disconnect()

    refused = socketio.AsyncClient(reconnection=False)
    refused.on("auth_failed", lambda data: seen.append(["auth_failed", data]))
    gone = asyncio.Event()
    refused.on("disconnect", lambda *args: gone.set())
    await refused.connect(api, transports=["websocket"])
    await refused.emit("authenticate", headers(stranger, "sockets"))
    await asyncio.wait_for(gone.wait(), 20)
    stream = await loop.run_in_executor(None, rows)
    print(json.dumps({"seen": seen, "alive": alive, "rows": stream.count("data: {")}))

asyncio.run(main())
"#;

fn python() -> Option<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    let folder = std::env::var_os("CHUTES_PEERS").map_or_else(|| root.join("target/peers"), PathBuf::from);
    let python = folder.join("bin/python");
    if python.exists() {
        return Some(python);
    }
    assert!(
        std::env::var("REQUIRE_PEERS").as_deref() != Ok("1"),
        "no peers: run chaos-tests/peers/install.sh"
    );
    eprintln!("not tested: python-socketio client and substrate-interface signatures (no peers installed)");
    None
}

async fn run_client(world: &World, python: &PathBuf, mode: &str) -> Value {
    let output = tokio::process::Command::new(python)
        .args(["-c", CLIENT, &world.server.api_url, mode])
        .env_remove("HTTP_PROXY")
        .env_remove("http_proxy")
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(std::time::Duration::from_secs(90), output)
        .await
        .expect("in time")
        .expect("python runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(text.lines().last().expect("a line")).expect("JSON")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_client_is_understood() {
    let Some(python) = python() else { return };
    let mut scenario = quiet_scenario(vec![]);
    (scenario.socket.ping_interval_ms, scenario.socket.ping_timeout_ms) = (200, 2_000);
    let world = World::start(scenario).await;
    let told = run_client(&world, &python, "websocket").await;
    assert_eq!(told["alive"], true, "{told}");
    assert_eq!(told["rows"], 2, "signed by substrate-interface");
    let seen = told["seen"].as_array().expect("a list");
    let find = |name: &str| seen.iter().find(|item| item[0] == name).map(|item| &item[1]);
    assert_eq!(find("auth_success"), Some(&json!({"message": "Authenticated"})));
    assert_eq!(find("acknowledged"), Some(&json!(true)));
    let failed = find("auth_failed")
        .and_then(|data| data["error"].as_str())
        .expect("told");
    assert!(failed.contains("not registered"), "{failed}");
    let refused = run_client(&world, &python, "polling").await;
    assert_eq!(refused["polling"], "refused");
    world.server.stop().await;
}
