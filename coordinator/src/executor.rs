//! Placeholder for the room `executor`.
