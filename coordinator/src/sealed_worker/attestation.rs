//! The attestation service of a sealed worker (`validator-protocol`, section 8.2): `GET /server/devices`, signed by the
//! miner. Its certificate is its own: what it is worth the validator finds out, by the hash of its key in the worker's
//! quote. A false answer here gets the worker refused there.

use std::time::Duration;

use protocol::gpu::DeviceInfo;
use protocol::id::GpuId;
use reqwest::redirect::Policy;
use serde_json::{Map, Value, json};
use tokio::time::{sleep, timeout};

use super::Error;
use crate::signer::{MessageKind, Sign};

/// The service begins late, so it is asked again.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_secs(3);
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Ten GPUs at most, of a few hundred bytes each.
const BODY_BYTES_MAX: u64 = 256 * 1024;

/// The GPUs of the worker at this address.
///
/// # Errors
/// [`Error::Unavailable`]: nobody answers there, or not with GPUs.
pub async fn devices(signer: &dyn Sign, address: &str, port: u16) -> Result<Vec<DeviceInfo>, Error> {
    let mut tries = 0;
    loop {
        tries += 1;
        match ask(signer, address, port).await {
            Ok(devices) => return Ok(devices),
            Err(error) if tries == TRIES => return Err(error),
            Err(error) => tracing::debug!(address, %error, "an attestation service is asked again"),
        }
        sleep(PAUSE).await;
    }
}

async fn ask(signer: &dyn Sign, address: &str, port: u16) -> Result<Vec<DeviceInfo>, Error> {
    let host = if address.contains(':') {
        format!("[{address}]")
    } else {
        address.to_owned()
    };
    let url = format!("https://{host}:{port}/server/devices");
    let failed = |why: String| Error::Unavailable(format!("attestation service {url}: {why}"));
    // Fails when a provider is installed already: then that one is used.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder()
        .danger_accept_invalid_certs(true)
        .redirect(Policy::none())
        .no_proxy()
        .build();
    let client = client.map_err(|error| failed(error.to_string()))?;
    let headers = signer.to_validator(MessageKind::AttestedDevices).await;
    let mut request = client.get(&url);
    for (name, value) in headers.map_err(|error| failed(error.to_string()))? {
        request = request.header(name, value);
    }
    let answer = async {
        let mut response = request
            .send()
            .await
            .map_err(|error| failed(error.without_url().to_string()))?;
        if !response.status().is_success() {
            return Err(failed(format!("it answers {}", response.status())));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response
            .chunk()
            .await
            .map_err(|error| failed(error.without_url().to_string()))?
        {
            body.extend_from_slice(&chunk);
            if body.len() as u64 > BODY_BYTES_MAX {
                return Err(failed("its answer is too long".to_owned()));
            }
        }
        Ok(body)
    };
    let body = timeout(ANSWER_MAX, answer).await;
    let body = body.map_err(|_| failed(format!("no answer within {ANSWER_MAX:?}")))??;
    read(&body).map_err(failed)
}

fn read(body: &[u8]) -> Result<Vec<DeviceInfo>, String> {
    let rows: Vec<Map<String, Value>> =
        serde_json::from_slice(body).map_err(|error| format!("its answer is no list of GPUs: {error}"))?;
    let devices: Vec<DeviceInfo> = rows.into_iter().map(device).collect::<Result<_, _>>()?;
    if devices.is_empty() {
        return Err("it lists no GPU".to_owned());
    }
    Ok(devices)
}

/// A GPU; what may be left out and is, is 0.
fn device(mut row: Map<String, Value>) -> Result<DeviceInfo, String> {
    let said = row.get("uuid").and_then(Value::as_str).unwrap_or_default();
    let uuid = GpuId::from_device_uuid(said).map_err(|error| format!("GPU {said}: {error}"))?;
    row.insert("uuid".to_owned(), json!(uuid));
    for key in ["processors", "max_threads_per_processor"] {
        let value = row.entry(key).or_insert(Value::Null);
        if value.is_null() {
            *value = json!(0);
        }
    }
    serde_json::from_value(Value::Object(row)).map_err(|error| format!("GPU {uuid}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_read_whatever_is_left_out_and_bad_ones_are_named() {
        let row = |more: &str| {
            format!(
                r#"[{{"uuid":"GPU-aabbccdd-0011-2233-4455-66778899eeff","name":"NVIDIA H200","memory":150000000000,"clock_rate":1980000.0{more}}}]"#
            )
        };
        let read = |text: &str| read(text.as_bytes());
        let few = read(&row("")).expect("it has what is needed");
        assert_eq!((few[0].processors, few[0].clock_rate_khz), (0, 1_980_000));
        let all = read(&row(
            r#","processors":132,"max_threads_per_processor":2048,"sxm":true"#,
        ));
        let all = all.expect("more is no harm");
        assert_eq!((all[0].processors, all[0].max_threads_per_processor), (132, 2048));
        for (text, why) in [
            ("[]", "lists no GPU"),
            ("{}", "no list of GPUs"),
            (&row("").replace("GPU-aabb", "GPU-xxyy"), "GPU-xxyy"),
            (
                &row("").replace("1980000.0", "-1"),
                "clock_rate is not a sensible number",
            ),
        ] {
            let error = read(text).expect_err("it is of no use");
            assert!(error.contains(why), "{error}");
        }
    }
}
