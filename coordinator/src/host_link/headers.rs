//! Signed registry headers, made here and pushed to hosts: GPU hosts hold no seed, and a blob request costs
//! no signature.

use std::sync::Arc;
use std::time::Duration;

use protocol::hotkey::Hotkey;
use protocol::link::RegistryHeaders;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::signer::{MessageKind, Sign};

/// Between two signatures.
const RENEW_EVERY: Duration = Duration::from_secs(60);
/// Pause after the signer did not answer.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// How long a host may use a set, in ms: half of what a validator accepts.
const LIFE_MS: u64 = 300_000;

/// Signs for all validators' registries until cancelled; sessions follow `publish`.
pub async fn publish(
    signer: Arc<dyn Sign>,
    clock: Arc<dyn Clock>,
    validators: Vec<Hotkey>,
    publish: watch::Sender<Vec<RegistryHeaders>>,
    cancel: CancellationToken,
) {
    loop {
        let pause = match sign(signer.as_ref(), clock.as_ref(), &validators).await {
            Ok(sets) => {
                publish.send_replace(sets);
                RENEW_EVERY
            }
            Err(error) => {
                tracing::warn!(%error, "registry headers were not signed; hosts go on with the last ones");
                RETRY_AFTER
            }
        };
        if cancel
            .run_until_cancelled(tokio::time::sleep(pause))
            .await
            .is_none()
        {
            return;
        }
    }
}

async fn sign(
    signer: &dyn Sign,
    clock: &dyn Clock,
    validators: &[Hotkey],
) -> Result<Vec<RegistryHeaders>, crate::signer::Error> {
    let expires_at = clock.now() + LIFE_MS;
    let headers = signer.to_validator(MessageKind::Registry).await?;
    let headers: Vec<(String, String)> = headers
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    let set = |validator: &Hotkey| RegistryHeaders {
        validator: validator.clone(),
        headers: headers.clone(),
        expires_at,
    };
    Ok(validators.iter().map(set).collect())
}
