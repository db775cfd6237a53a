//! The registry proxy from outside: its door, its admin socket, redirects, and skopeo as a client.

mod admin;
mod door;
mod fake_upstream;
mod peers;
mod redirect;
mod skopeo;
