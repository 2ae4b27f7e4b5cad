//! Webhooks: what to tell, signed, retried, dead-lettered.
