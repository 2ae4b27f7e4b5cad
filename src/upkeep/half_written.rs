//! Removes files of a directory that a killed process left half written.

use std::time::Duration;

use futures::{FutureExt, future::BoxFuture};

use super::{Sweep, SweepError, Swept};
use crate::blobs::Blobs;

const EVERY: Duration = Duration::from_secs(3_600);

pub(super) struct HalfWritten {
    blobs: Blobs,
}

impl HalfWritten {
    pub(super) fn new(blobs: &Blobs) -> Self {
        Self { blobs: blobs.clone() }
    }
}

impl Sweep for HalfWritten {
    fn name(&self) -> &'static str {
        "half-written"
    }

    fn every(&self) -> Duration {
        EVERY
    }

    fn tick(&mut self) -> BoxFuture<'_, Result<Swept, SweepError>> {
        async {
            let files = self.blobs.remove_half_written().await.map_err(|error| SweepError::Here(error.to_string()))?;
            if files > 0 {
                tracing::info!(files, "files that a killed process had left half written are removed");
            }
            Ok(Swept::all(files as u64))
        }
        .boxed()
    }
}
