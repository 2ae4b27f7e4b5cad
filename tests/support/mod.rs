//! What several test binaries share.

pub mod direct;
#[allow(dead_code)] // not all do
pub mod patience;
#[allow(dead_code)] // few binaries do
pub mod ports;
pub mod postgres;
#[allow(dead_code)] // few binaries do
pub mod rivals;
