//! Placeholder for the room `identity`.
