//! What the domain does not read by itself: this machine's clock, and random numbers. Everything else gets times, ids and
//! secrets as arguments, or makes them here, so that [`crate::domain`] decides the same in every run.

use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;
use zeroize::Zeroizing;

use crate::domain::{
    BatchId, DeadLetterId, DeliveryId, FileId, NodeId, RetryJobId, Timestamp, UploadId, UploadPartId,
    WebhookEndpointId, WorkerId, webhook::Secret,
};

impl Timestamp {
    /// This machine's clock. Leases and windows use the database's clock instead ([`crate::store`]).
    #[must_use]
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
    }
}

macro_rules! generate {
    ($($id:ident),*) => {
        $(impl $id {
            /// A new id. Ids made later sort after those made earlier (UUID version 7, RFC 9562).
            #[must_use]
            pub fn generate() -> Self {
                Self::from_text(format!("{}{}", Self::PREFIX, Uuid::now_v7().simple()))
            }
        })*
    };
}

generate!(
    BatchId,
    DeadLetterId,
    DeliveryId,
    FileId,
    NodeId,
    RetryJobId,
    UploadId,
    UploadPartId,
    WebhookEndpointId,
    WorkerId
);

impl Secret {
    /// A new `whsec_…` secret from 32 random bytes.
    #[must_use]
    pub fn generate() -> Self {
        Self::of_key(&Zeroizing::new(rand::random()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generated_secret_is_new_each_time() {
        assert_ne!(Secret::generate(), Secret::generate());
    }

    #[test]
    fn ids_say_what_they_name_and_sort_by_age() {
        let ids: Vec<BatchId> = (0..100).map(|_| BatchId::generate()).collect();
        assert!(ids.iter().all(|id| id.as_str().starts_with("batch_")) && ids.is_sorted(), "{ids:?}");
        assert!(FileId::generate().as_str().starts_with("file-"));
    }
}
