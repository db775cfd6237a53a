//! Runs arithmetic that takes long (GPU proofs on the CPU) away from the threads that serve connections.

/// Runs `work` on a thread of its own.
///
/// # Panics
/// When `work` panics: arithmetic that cannot go on is a fault in the stand-in.
#[expect(
    clippy::disallowed_methods,
    reason = "the seam for long arithmetic; the stand-ins are never simulated"
)]
pub(crate) async fn away<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
