//! What speaks to a validator, from outside: the REST client, the socket, and both against code that is not ours.

mod client;
mod peers;
mod socket;

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Waits until a task that was told to stop has ended.
pub(crate) async fn ended(task: JoinHandle<()>, within: Duration) {
    timeout(within, task)
        .await
        .expect("it ends")
        .expect("it does not panic");
}
