//! The policy by example, by property and in virtual time.

mod examples;
mod machine;
mod night;
mod properties;
