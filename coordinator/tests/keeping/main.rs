//! What is kept: snapshots away from the cluster and the way back, old data read for ever, and no secret anywhere.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod bucket;
mod directory;
mod golden;
mod member;
mod restore;
mod secrets;
mod store_of_objects;
