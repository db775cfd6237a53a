//! Placeholder for the room `validator`.
