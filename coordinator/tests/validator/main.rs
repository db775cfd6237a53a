//! What speaks to a validator, from outside: the REST client, the socket, and both against code that is not ours.

mod client;
mod peers;
mod socket;
