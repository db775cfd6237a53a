//! Placeholder for the room `workloads`.
