//! Placeholder for the room `cache`.
