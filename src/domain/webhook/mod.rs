//! Webhooks, as far as the store needs them: events, targets, bodies, and the lifecycle of a delivery. No IO.

mod attempt;
mod canonical;
mod config;
mod event;
mod payload;
mod progress;
mod secret;
mod state;

pub use attempt::{AttemptError, AttemptOutcome, AttemptResult, ErrorKind};
pub use canonical::Json;
pub use config::{
    DEFAULT_MAX_ATTEMPTS, DEFAULT_TIMEOUT, Defaults, Invalid, MAX_ATTEMPTS, MAX_URL_BYTES, OLD_URL_KEY, TIMEOUT_RANGE,
    WebhookConfig, WebhookTarget, target_of,
};
pub use event::{EventFilter, UnknownEvents, WebhookEvent};
pub use payload::{Payload, test_payload};
pub use progress::{PROGRESS_INTERVAL, PROGRESS_LIFETIME, PROGRESS_PERCENT, ProgressMark};
pub use secret::{BadSecret, SealedSecret, Secret};
pub use state::{Delivery, DeliveryRefusal, DeliveryState, DeliveryStep, DeliveryTrigger, Effect, apply};
