//! Placeholder for the room `gpu`.
