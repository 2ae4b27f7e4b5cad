//! Who calls, and how much they may ask: a rule here knows nothing of gRPC or HTTP.
//!
//! - [`Caller`], [`Role`]: who calls and what they may do. [`Tokens`]: the token file. `peer`: who is at the other end of
//!   a connection.
//! - [`Limiter`]: what one caller may ask of this server. Behind it `quota`: how much of one kind at a time, and `places`:
//!   whose upload gives way. `pace`: how slow an upload may be.
//! - [`Denied`] and [`LimitReached`] say why not.

mod caller;
mod limits;
mod pace;
mod peer;
mod places;
mod quota;
mod refusal;
mod tokens;

pub use caller::{Caller, Role};
pub use limits::{Admitted, CallerLimits, Limiter, Work};
pub use pace::{IDLE, LEAST, LONGEST, LOOK, Pace, Received};
pub use peer::Peer;
pub use places::Place;
pub use quota::{Account, Held};
pub use refusal::{Denied, LimitReached};
pub use tokens::{Tokens, TokensError, hash_token};
