//! Placeholder for the room `link`.
