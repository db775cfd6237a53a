//! Placeholder for the room `leader`.
