//! Placeholder for the room `egress`.
