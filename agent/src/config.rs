//! Settings: each room has its own `Config` in its own terms; this room joins them.
//!
//! Reading order: [`units`] (durations and sizes as people write them).

pub mod units;
