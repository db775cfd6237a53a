//! The chute stand-in: plays the container of a chute.

use std::collections::BTreeMap;

/// Runs the container's program with these arguments and environment.
///
/// # Errors
/// With a chain of reasons.
#[expect(clippy::unused_async, reason = "the container's flow awaits")]
pub async fn run(args: Vec<String>, environment: BTreeMap<String, String>) -> anyhow::Result<()> {
    anyhow::bail!(
        "{} arguments and {} variables: not a container yet",
        args.len(),
        environment.len()
    )
}
