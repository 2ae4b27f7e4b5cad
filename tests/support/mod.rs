//! What several test binaries share.

pub mod postgres;
#[allow(dead_code)] // few binaries do
pub mod rivals;
