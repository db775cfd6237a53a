//! Placeholder for the room `registry`.
