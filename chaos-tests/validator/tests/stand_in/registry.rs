//! The registry from outside, and egress of a chute.

use protocol::signing::{Purpose, Tail, headers_to_validator};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{Flow, World, chute, now, quiet_scenario};

#[tokio::test(flavor = "multi_thread")]
async fn images_are_served_to_who_signs() {
    let mut scenario = quiet_scenario(vec![chute("echo")]);
    scenario.redirect_blobs = false;
    let world = World::start(scenario).await;
    let get = async |method: &str, path: &str, range: Option<&str>| {
        let mut headers = headers_to_validator(&world.miner, now(), &Tail::Purpose(Purpose::Registry));
        if let Some(range) = range {
            headers.push(("range", range.to_owned()));
        }
        let mut request = world
            .client
            .request(method.parse().expect("a method"), world.url(path));
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let response = request.send().await.expect("an answer");
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        (status, headers, response.bytes().await.expect("a body"))
    };
    let (status, text) = world
        .send("GET", "/v2/acme/app/manifests/1.0", vec![], None)
        .await;
    assert_eq!((status, text.as_str()), (401, ""));
    assert_eq!(get("GET", "/v2/", None).await.0, 200);
    assert_eq!(get("PUT", "/v2/acme/app/manifests/1.0", None).await.0, 403);
    assert_eq!(get("GET", "/v2/acme/app/manifests/2.0", None).await.0, 404);
    let (status, head, body) = get("HEAD", "/v2/acme/app/manifests/1.0", None).await;
    assert_eq!((status, body.len()), (200, 0));
    let digest = head["docker-content-digest"].to_str().expect("text");
    let (status, _, manifest) = get("GET", &format!("/v2/acme/app/manifests/{digest}"), None).await;
    assert_eq!(status, 200);
    assert_eq!(
        format!("sha256:{}", hex::encode(Sha256::digest(&manifest))),
        digest
    );
    let manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
    for blob in [&manifest["config"], &manifest["layers"][0]] {
        let path = format!("/v2/acme/app/blobs/{}", blob["digest"].as_str().expect("text"));
        let (status, _, bytes) = get("GET", &path, None).await;
        assert_eq!(
            (status, bytes.len() as u64),
            (200, blob["size"].as_u64().expect("a size"))
        );
        assert_eq!(
            format!("sha256:{}", hex::encode(Sha256::digest(&bytes))),
            blob["digest"]
        );
    }
    let layer = format!(
        "/v2/acme/app/blobs/{}",
        manifest["layers"][0]["digest"].as_str().expect("text")
    );
    let (status, headers, bytes) = get("GET", &layer, Some("bytes=10-19")).await;
    assert_eq!((status, bytes.len()), (206, 10));
    assert!(
        headers["content-range"]
            .to_str()
            .expect("text")
            .starts_with("bytes 10-19/")
    );
    assert_eq!(get("GET", &layer, Some("bytes=999999-")).await.0, 416);
    let sent = world.control("score").await["image_bytes_sent"]
        .as_u64()
        .expect("a number");
    assert!(sent >= manifest["layers"][0]["size"].as_u64().expect("a size") + 10);
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_can_be_redirected_to_storage() {
    let world = World::start(quiet_scenario(vec![chute("echo")])).await;
    let (_, manifest) = world
        .call("GET", "/v2/acme/app/manifests/1.0", Purpose::Registry)
        .await;
    let manifest: Value = serde_json::from_str(&manifest).expect("JSON");
    let digest = manifest["layers"][0]["digest"].as_str().expect("text");
    let headers = headers_to_validator(&world.miner, now(), &Tail::Purpose(Purpose::Registry));
    let mut request = world
        .client
        .get(world.url(&format!("/v2/acme/app/blobs/{digest}")));
    for (name, value) in headers {
        request = request.header(name, value);
    }
    let response = request.send().await.expect("an answer");
    assert_eq!(response.status(), 307);
    let location = response.headers()["location"].to_str().expect("text").to_owned();
    let stored = world.client.get(&location).send().await.expect("an answer");
    let bytes = stored.bytes().await.expect("a body");
    assert_eq!(format!("sha256:{}", hex::encode(Sha256::digest(&bytes))), digest);
    let forged = location.replace("signature=", "signature=0");
    assert_eq!(
        world.client.get(forged).send().await.expect("an answer").status(),
        403
    );
    world.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chute_tells_which_sites_it_reached() {
    let world = World::start(quiet_scenario(vec![chute("echo")])).await;
    let gpus = world.verified_gpus(1).await;
    let allowed = world
        .server
        .sites
        .iter()
        .find(|site| site.allowed)
        .expect("a site")
        .clone();
    let proxy = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a free port");
    let address = proxy.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut client, _)) = proxy.accept().await {
            let mut request = vec![0; 1024];
            let length = client.read(&mut request).await.expect("a request");
            let line = String::from_utf8_lossy(&request[..length]).into_owned();
            if line.starts_with(&format!("CONNECT {}:443 ", allowed.name)) {
                client
                    .write_all(b"HTTP/1.1 200 OK\r\n\r\n")
                    .await
                    .expect("written");
                let mut site = tokio::net::TcpStream::connect(allowed.address)
                    .await
                    .expect("listens");
                // Ends when the site does; who closes first is of no interest here.
                let copied = tokio::io::copy_bidirectional(&mut client, &mut site).await;
                drop(copied);
            } else {
                client
                    .write_all(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 3\r\n\r\nno\n")
                    .await
                    .expect("written");
            }
        }
    });
    let chute = world.chute_id("echo").await;
    let (_, config) = world.launch_config(&format!("chute_id={chute}")).await;
    let token = config["token"].as_str().expect("text");
    let proxy = Some(format!("http://{address}"));
    let (container, _) = world.run_chute("echo", &gpus, Flow::Token(token), proxy).await;
    world
        .until("both sites were tried", async |world| {
            assert!(!container.is_finished(), "the container ended");
            let score = world.control("score").await;
            (score["egress_allowed"] == 1 && score["egress_denied"] == 1).then_some(())
        })
        .await;
    assert_eq!(world.control("score").await["egress_wrong"], 0);
    container.abort();
    world.server.stop().await;
}
