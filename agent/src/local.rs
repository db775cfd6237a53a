//! Placeholder for the room `local`.
