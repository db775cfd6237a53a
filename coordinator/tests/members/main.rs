//! Members as they run, in one process over loopback: founding, joining, moving the lead, removing, coming back, moving
//! to another address, going on alone, another authority, another hotkey, nodes that enter by themselves; and what is
//! refused at the door.

mod cluster;
mod door;
mod handing_over;
mod hotkey;
mod joining;
mod launching;
mod moving;
mod nodes;
mod observing;
mod recovery;
mod rotation;

/// Far above what is needed, on machines that have much else to do.
pub(crate) const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// Waits until `look` finds something.
pub(crate) async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let found = tokio::time::timeout(PATIENCE, found).await;
    found.unwrap_or_else(|_| panic!("not in time: {what}"))
}
