//! A validator stand-in and a chute stand-in that speak the real protocol.
