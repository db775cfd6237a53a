//! Placeholder for the room `telemetry`.
