//! Placeholder for the room `processes`.
