//! Runs one segment from its claim to its end: reads and verifies what is already done, and leaves the rest to
//! [`Work`].

use std::time::Duration;

use bytes::Bytes;
use tokio::{task::spawn_blocking, time::Instant};

use super::{
    Control,
    checkpoint::{Checkpoint, Stop},
    lines::WorkList,
    run::{Ended, Run},
    troubles::On,
    work::{self, Work},
};
use crate::{
    blobs::BlobError,
    domain::{BatchError, LineSet},
    fleet::Held,
    results::{self, PartBuilder},
    store::{Commit, NewPart, Part},
};

/// How often a node that does not find a batch's input gives the segment back, before it fails the batch: the objects may
/// come back, or another node may see them. With [`super::aside`]'s waits these are some 7 s.
const MISSES: u32 = 3;
/// How often a segment's parts may read back as something else than what was written before its batch is failed. Each time its
/// lines are run again, and a blob store that garbles everything would keep GPUs at work until the window closes.
const TORN_LIMIT: u32 = 5;
/// The wait before such lines run again; it doubles each time.
const TORN_WAIT: Duration = Duration::from_millis(500);
impl Run {
    /// Runs the segment until it ends.
    pub async fn run(mut self) -> Ended {
        let checkpoint = Checkpoint::new(
            self.store.clone(),
            self.blobs.clone(),
            self.claimed.segment.clone(),
            self.claimed.epoch,
            self.control.clone(),
            self.troubles.clone(),
        );
        // Object names are never used twice within an epoch, whatever is written again.
        let (mut number, mut torn) = (0, 0);
        let mut incomplete = false;
        loop {
            let why = match self.attempt(&checkpoint, &mut number).await {
                Ok(ended) => return ended,
                Err(Stop::Lost) => return Ended::Lost,
                Err(Stop::Broken(what)) => return Ended::Broken(what),
                Err(Stop::Torn) => match self.pause_after_torn(&checkpoint, &mut torn).await {
                    Some(ended) => return ended,
                    None => continue,
                },
                Err(Stop::Incomplete) if !incomplete => {
                    incomplete = true;
                    match self.drop_all_parts(&checkpoint).await {
                        Ok(()) => continue,
                        Err(Stop::Refused(what)) => refused(what),
                        Err(Stop::Broken(what)) => return Ended::Broken(what),
                        Err(Stop::Lost | Stop::Torn | Stop::Incomplete) => return Ended::Lost,
                    }
                }
                Err(Stop::Incomplete) => "the results do not have one line for each request".to_owned(),
                Err(Stop::Refused(what)) => refused(what),
            };
            let message = format!("{why}. This is a bug in tidemill; the server's log has the details");
            let error = BatchError { code: "internal_error".into(), message, line: 0, param: String::new() };
            return self.fail(&checkpoint, error).await;
        }
    }

    /// Waits before lines are run again whose results were garbled in the blob store, and the batch says so meanwhile. At the
    /// limit it fails the batch. Returns how the run has ended, if it has.
    async fn pause_after_torn(&mut self, checkpoint: &Checkpoint, torn: &mut u32) -> Option<Ended> {
        *torn += 1;
        let what = format!("results that were read back differed from what was written, {torn} times");
        if *torn >= TORN_LIMIT {
            let error = BatchError {
                code: "results_damaged".into(),
                message: format!("{}: {what}; check the blob store", self.claimed.segment),
                line: 0,
                param: String::new(),
            };
            return Some(self.fail(checkpoint, error).await);
        }
        let wait = TORN_WAIT * 2u32.saturating_pow(*torn - 1);
        let _stuck = self.troubles.stuck(&self.claimed.segment, On::BlobStore, "keep results", what);
        let before = *self.control.borrow();
        // No command makes the run wait.
        let _ = tokio::time::timeout(wait, self.control.wait_for(|now| *now != before)).await;
        (*self.control.borrow() == Control::Abandon).then_some(Ended::Lost)
    }

    async fn attempt(&mut self, checkpoint: &Checkpoint, number: &mut u32) -> Result<Ended, Stop> {
        let parts = self.whole_parts(checkpoint).await?;
        let mut done = LineSet::default();
        for part in &parts {
            done.union(&part.completed);
            done.union(&part.failed);
        }
        let list = match self.input(checkpoint).await? {
            Ok(bytes) => {
                let models = self.claimed.models.clone();
                // Megabytes of JSON are parsed and sorted.
                let read = spawn_blocking(move || WorkList::read(bytes, &models, &done)).await;
                read.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
                    .map_err(|error| Unreadable { message: error.to_string(), is_missing: false })
            }
            Err(message) => Err(Unreadable { message, is_missing: true }),
        };
        let list = match list {
            Ok(list) => list,
            Err(Unreadable { message, is_missing: true }) if self.missed < MISSES => {
                let (segment, epoch) = (&self.claimed.segment, self.claimed.epoch);
                tracing::warn!(%segment, message, "the batch's input can't be read; it is tried again, here or on another server");
                let release = || self.store.release_segment(segment, epoch, self.claimed.span.models);
                checkpoint.patiently("give a segment back", release).await?;
                return Ok(Ended::Missing);
            }
            Err(Unreadable { message, .. }) => {
                tracing::error!(segment = %self.claimed.segment, message, "the batch's input can't be read");
                let error =
                    BatchError { code: "input_unreadable".into(), message, line: 0, param: "input_file_id".into() };
                return Ok(self.fail(checkpoint, error).await);
            }
        };
        let mut work = Work {
            endpoint: self.claimed.endpoint,
            rank: super::rank(
                &self.options.weights,
                &self.claimed.owner,
                self.claimed.priority,
                self.claimed.expires_at,
            ),
            list,
            peers: Vec::new(),
            salt: work::salt(&self.claimed.segment),
            doubtful: Vec::new(),
            apart: Vec::new(),
            run: self,
            checkpoint,
            number,
            builder: PartBuilder::default(),
            held: Held::default(),
            largest: 0,
            oldest: None,
            started: Instant::now(),
            stranded: None,
            parts,
        };
        let ended = work.send_all().await?;
        match ended {
            Ended::Finished => work.finish().await,
            Ended::Released => work.release().await,
            Ended::Lost | Ended::Missing | Ended::Stuck | Ended::Broken(_) => Ok(ended),
        }
    }

    async fn fail(&self, checkpoint: &Checkpoint, error: BatchError) -> Ended {
        let fail = || self.store.fail_batch(&self.claimed.segment, self.claimed.epoch, error.clone());
        match checkpoint.patiently("fail a batch", fail).await {
            Ok(_) | Err(Stop::Lost | Stop::Torn | Stop::Incomplete) => Ended::Lost,
            Err(Stop::Refused(_) | Stop::Broken(_)) => Ended::Stuck,
        }
    }

    /// Drops everything finished of the segment, because something in it does not match its row.
    async fn drop_all_parts(&self, checkpoint: &Checkpoint) -> Result<(), Stop> {
        let segment = &self.claimed.segment;
        let parts = checkpoint.patiently("read the parts", || self.store.parts_of(segment)).await?;
        let drop = || self.store.drop_parts(segment, self.claimed.epoch, &parts);
        match checkpoint.patiently("drop parts", drop).await? {
            Commit::Done => Ok(()),
            Commit::Fenced | Commit::Incomplete => Err(Stop::Lost),
        }
    }

    /// The segment's parts. Those whose objects are torn or missing are dropped.
    async fn whole_parts(&self, checkpoint: &Checkpoint) -> Result<Vec<NewPart>, Stop> {
        let segment = &self.claimed.segment;
        let parts = checkpoint.patiently("read the parts", || self.store.parts_of(segment)).await?;
        let (mut whole, mut torn): (Vec<Part>, Vec<Part>) = (Vec::new(), Vec::new());
        for part in parts {
            let read = || async {
                match self.blobs.get(&part.content.object_key).await {
                    Err(BlobError::Missing(_)) => Ok(None),
                    other => other.map(Some),
                }
            };
            let object = checkpoint.patiently("read a part", read).await?;
            if object.is_some_and(|object| is_whole(&part.content, &object)) {
                whole.push(part);
            } else {
                torn.push(part);
            }
        }
        if !torn.is_empty() {
            tracing::error!(%segment, parts = torn.len(), "parts are torn or missing; their lines are run again");
            let drop = || self.store.drop_parts(segment, self.claimed.epoch, &torn);
            if checkpoint.patiently("drop torn parts", drop).await? == Commit::Fenced {
                return Err(Stop::Lost);
            }
        }
        if self.claimed.epoch.0 > 1 {
            self.remove_orphans(&whole).await;
        }
        Ok(whole.into_iter().map(|part| part.content).collect())
    }

    /// Deletes objects that an earlier owner wrote and did not live to name. It can't name them any more either: its epoch
    /// is over. What can't be deleted now lies there until the segment is claimed again, or until its batch has ended: then
    /// a sweep looks for it.
    async fn remove_orphans(&self, named: &[Part]) {
        let Ok(keys) = self.blobs.list(&results::folder(&self.claimed.segment)).await else { return };
        let orphans: Vec<String> = keys
            .into_iter()
            .filter(|key| results::epoch_of(key).is_some_and(|epoch| epoch < self.claimed.epoch))
            .filter(|key| named.iter().all(|part| part.content.object_key != *key))
            .collect();
        if !orphans.is_empty() {
            tracing::info!(segment = %self.claimed.segment, ?orphans, "objects of a crashed owner are deleted");
            self.blobs.delete_all(orphans).await;
        }
    }

    /// The segment's bytes, or why they can't be read.
    async fn input(&self, checkpoint: &Checkpoint) -> Result<Result<Bytes, String>, Stop> {
        let span = &self.claimed.span;
        let size = |value: i64| u64::try_from(value).unwrap_or(0);
        let range = size(span.offset)..size(span.offset + span.length);
        let read = || async {
            match self.blobs.get_range(&self.claimed.object_key, range.clone()).await {
                Err(BlobError::Missing(_)) => Ok(None),
                other => other.map(Some),
            }
        };
        let bytes = checkpoint.patiently("read the input", read).await?;
        Ok(match bytes {
            None => Err("the input file's object is missing".into()),
            Some(bytes) if bytes.len() as u64 != size(span.length) => {
                Err("the input file's object is truncated".into())
            }
            Some(bytes) if span.crc32c.is_some_and(|expected| expected != crc32c::crc32c(&bytes)) => Err(format!(
                "the input file's object has changed since it was uploaded: in lines {} to {}",
                span.first_line,
                span.first_line + i64::from(span.line_span) - 1
            )),
            Some(bytes) => Ok(bytes),
        })
    }
}

/// Why a segment can't be run.
struct Unreadable {
    message: String,
    /// Whether its bytes are missing; another node may have them, or they may come back.
    is_missing: bool,
}

/// Why a batch fails whose writes are refused.
fn refused(what: &str) -> String {
    format!("the server can't {what}: its database refuses that permanently")
}

fn is_whole(part: &NewPart, object: &[u8]) -> bool {
    object.len() as u64 == part.output_bytes + part.error_bytes && crc32c::crc32c(object) == part.crc32c
}
