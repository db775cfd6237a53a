//! Tries the sites that the chute's code names, through the proxy that the container was given, and tells
//! its log and the stand-in what came of it. The code carries one line such as
//! `# egress: {"allowed": ["https://models.example"], "forbidden": ["https://forbidden.example"]}`.

use std::io;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::chute::Log;
use crate::chute::settings::{LaunchToken, Settings};

const MARK: &str = "# egress: ";
const TIMEOUT: Duration = Duration::from_secs(15);

/// Sites to try.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct Probes {
    allowed: Vec<String>,
    forbidden: Vec<String>,
}

/// Reads the line from the code; none, when there is none or it is malformed.
pub(crate) fn probes(code: &str) -> Probes {
    code.lines()
        .find_map(|line| line.strip_prefix(MARK))
        .and_then(|json| serde_json::from_str(json).ok())
        .unwrap_or_default()
}

/// Tries all sites, one after the other. Without a proxy there is nothing to try.
pub(crate) async fn try_all(settings: &Settings, token: Option<&LaunchToken>, probes: &Probes, log: &Log) {
    let Some(proxy) = &settings.proxy else {
        log.say("no proxy, so no site is tried".to_owned());
        return;
    };
    let allowed = probes.allowed.iter().map(|site| (site, true));
    let forbidden = probes.forbidden.iter().map(|site| (site, false));
    for (site, should_reach) in allowed.chain(forbidden) {
        let outcome = match tokio::time::timeout(TIMEOUT, reach(proxy, site)).await {
            Ok(Ok(greeting)) => Ok(greeting),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("timed out".to_owned()),
        };
        let reached = outcome.is_ok();
        let (Ok(detail) | Err(detail)) = outcome;
        log.say(format!("egress {site} reached={reached}: {}", detail.trim()));
        if let Some(token) = token {
            report(token, site, should_reach, reached, &detail).await;
        }
    }
}

/// Connects by the proxy and reads the site's greeting.
async fn reach(proxy: &str, site: &str) -> io::Result<String> {
    let proxy = proxy
        .strip_prefix("http://")
        .unwrap_or(proxy)
        .trim_end_matches('/');
    let name = site
        .strip_prefix("https://")
        .unwrap_or(site)
        .trim_end_matches('/');
    let mut stream = TcpStream::connect(proxy).await?;
    let connect = format!("CONNECT {name}:443 HTTP/1.1\r\nHost: {name}:443\r\n\r\n");
    stream.write_all(connect.as_bytes()).await?;
    let head = read_head(&mut stream).await?;
    let status = head.lines().next().unwrap_or_default().to_owned();
    if status.split_whitespace().nth(1) != Some("200") {
        let mut body = vec![];
        if let Err(error) = (&mut stream).take(512).read_to_end(&mut body).await {
            tracing::debug!(%error, "the refusal was cut");
        }
        let reason = String::from_utf8_lossy(&body).trim().to_owned();
        return Err(io::Error::other(format!("{status} {reason}")));
    }
    let request = format!("GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = vec![];
    stream.take(4096).read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    match answer.split_once("\r\n\r\n") {
        Some((_, body)) => Ok(body.to_owned()),
        None => Err(io::Error::other("the site did not answer")),
    }
}

async fn read_head(stream: &mut TcpStream) -> io::Result<String> {
    let mut head = vec![];
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() == 8192 {
            return Err(io::Error::other("the proxy's answer is too long"));
        }
        head.push(stream.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// Tells the stand-in, which no real validator would ask for.
async fn report(token: &LaunchToken, site: &str, should_reach: bool, reached: bool, detail: &str) {
    let Some((base, _)) = token.url.split_once("/instances/") else {
        return;
    };
    let body = json!({
        "config_id": token.config, "site": site, "should_reach": should_reach, "reached": reached,
        "detail": detail,
    });
    let sent = async {
        let client = reqwest::Client::builder().no_proxy().timeout(TIMEOUT).build()?;
        client
            .post(format!("{base}/_stand_in/chute_report"))
            .json(&body)
            .send()
            .await?
            .error_for_status()
    };
    if let Err(error) = sent.await {
        tracing::warn!(%error, "the stand-in was not told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_stand_in_one_line_of_the_code() {
        let code = "import x\n# egress: {\"allowed\":[\"https://a\"],\"forbidden\":[]}\n";
        assert_eq!(probes(code).allowed, ["https://a"]);
        assert_eq!(probes("import x\n"), Probes::default());
        assert_eq!(probes("# egress: {"), Probes::default());
    }
}
