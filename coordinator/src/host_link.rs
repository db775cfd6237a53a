//! Placeholder for the room `host_link`.
