//! Placeholder for the room `api`.
