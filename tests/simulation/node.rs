//! A node that runs one segment, step by step: what `scheduler::segment` and `scheduler::work` do, with a gap between any two
//! steps into which a fault may fall.

use rand::{RngExt, rngs::StdRng};
use tidemill::{
    blobs::{BlobError, Blobs},
    domain::{LineSet, TokenUsage, lifecycle::Ending},
    results::{self, PartBuilder, ReadError},
    scheduler::lines::{Lane, LineKey, WorkList},
    store::{ClaimedSegment, Commit, FinalObject, NewPart, Part, Store},
};

/// A call to the database under way.
#[derive(Clone, Debug)]
pub enum Call {
    Commit(NewPart),
    Finish { last: Option<NewPart>, object: FinalObject, superseded: Vec<String> },
    Drop(Vec<Part>),
    Release(i64),
    Fail,
}

/// What a call came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The run goes on.
    Goes,
    /// It is over.
    Over,
}

/// One segment at work.
#[derive(Debug)]
pub struct Runner {
    /// Which simulated node.
    pub node: usize,
    pub claimed: ClaimedSegment,
    /// None: it has still to read what is done.
    list: Option<WorkList>,
    number: u32,
    builder: PartBuilder,
    parts: Vec<NewPart>,
    /// The call whose answer it waits for.
    pub calling: Option<Call>,
    /// How the lines that are left are to end.
    pub ending: Option<Ending>,
}

impl Runner {
    pub fn new(node: usize, claimed: ClaimedSegment) -> Self {
        Self {
            node,
            ending: claimed.ending,
            claimed,
            list: None,
            number: 0,
            builder: PartBuilder::default(),
            parts: Vec::new(),
            calling: None,
        }
    }

    /// Objects whose tearing this run would notice: parts that it has not begun to end with.
    pub fn durable(&self) -> &[NewPart] {
        if matches!(self.calling, Some(Call::Finish { .. })) || self.parts.len() < 2 { &[] } else { &self.parts }
    }

    fn key(&mut self) -> String {
        self.number += 1;
        results::object_key(&self.claimed.segment, self.claimed.epoch, self.number)
    }

    /// One step of the run; `served` are the models that have a worker.
    pub async fn step(&mut self, store: &Store, blobs: &Blobs, served: i64, random: &mut StdRng) {
        let Some(list) = &mut self.list else {
            if self.calling.is_none() {
                self.begin(store, blobs).await;
            }
            return;
        };
        if let Some(ending) = self.ending {
            for key in list.unfinished() {
                let line = results::render_error(
                    &list.index(key).to_string(),
                    list.custom_id(key),
                    ending.error_code(),
                    ending.error_message(),
                );
                self.builder.fail(list.index(key), line);
                list.done(key);
            }
        } else {
            for _ in 0..random.random_range(0..3) {
                answer(list, &mut self.builder, served, random);
            }
        }
        if self.calling.is_some() {
            return;
        }
        let list = self.list.as_ref().unwrap();
        let stranded = list.open_models() & served == 0;
        let (open, mask) = (list.open(), list.open_models());
        if open == 0 {
            self.finish(blobs).await;
        } else if self.builder.lines() > 0 && random.random_bool(0.5) {
            let part = self.object(blobs).await;
            self.calling = Some(Call::Commit(part));
        } else if self.builder.lines() == 0 && random.random_bool(if stranded { 0.7 } else { 0.05 }) {
            self.calling = Some(Call::Release(mask));
        }
    }

    async fn object(&mut self, blobs: &Blobs) -> NewPart {
        let (object, part) = std::mem::take(&mut self.builder).build(self.key());
        blobs.put(&part.object_key, object).await.unwrap();
        part
    }

    /// Reads what is done; takes back what is torn.
    async fn begin(&mut self, store: &Store, blobs: &Blobs) {
        let segment = &self.claimed.segment;
        let (mut whole, mut torn) = (Vec::new(), Vec::new());
        for part in store.parts_of(segment).await.unwrap() {
            let length = part.content.output_bytes + part.content.error_bytes;
            match blobs.get(&part.content.object_key).await {
                Ok(object) if object.len() as u64 == length && crc32c::crc32c(&object) == part.content.crc32c => {
                    whole.push(part.content);
                }
                Ok(_) | Err(BlobError::Missing(_)) => torn.push(part),
                Err(error) => panic!("{error}"),
            }
        }
        if !torn.is_empty() {
            self.calling = Some(Call::Drop(torn));
            return;
        }
        for key in blobs.list(&results::folder(segment)).await.unwrap() {
            let old = results::epoch_of(&key).is_some_and(|epoch| epoch < self.claimed.epoch);
            if old && whole.iter().all(|part| part.object_key != key) {
                blobs.delete(&key).await.unwrap();
            }
        }
        let mut done = LineSet::default();
        for part in &whole {
            done.union(&part.completed);
            done.union(&part.failed);
        }
        let span = &self.claimed.span;
        let range = span.offset as u64..(span.offset + span.length) as u64;
        let Ok(input) = blobs.get_range(&self.claimed.object_key, range).await else { panic!("the input is gone") };
        self.list = Some(WorkList::read(input, &self.claimed.models, &done).unwrap());
        self.parts = whole;
    }

    async fn finish(&mut self, blobs: &Blobs) {
        let last = if self.builder.lines() > 0 { Some(self.object(blobs).await) } else { None };
        let key = self.key();
        let all: Vec<&NewPart> = self.parts.iter().chain(&last).collect();
        let object = match all.as_slice() {
            [only] => Ok(results::finished(only)),
            several => results::merge(blobs, several, key).await,
        };
        let superseded = if all.len() == 1 { vec![] } else { all.iter().map(|part| part.object_key.clone()).collect() };
        match object {
            Ok(object) => self.calling = Some(Call::Finish { last, object, superseded }),
            Err(ReadError::Corrupt(_) | ReadError::Blob(BlobError::Missing(_))) => self.again(),
            // The scheduler would try this again and again.
            Err(error) => panic!("a torn part looks like a blob store that is away: {error}"),
        }
    }

    /// From the beginning, under the same lease.
    fn again(&mut self) {
        self.list = None;
        self.builder = PartBuilder::default();
        self.parts.clear();
    }

    /// The answer to its call has come.
    pub fn answered(&mut self, commit: Commit) -> Next {
        let call = self.calling.take().expect("it waits for an answer");
        match (call, commit) {
            (_, Commit::Fenced) | (Call::Finish { .. } | Call::Release(_) | Call::Fail, Commit::Done) => {
                return Next::Over;
            }
            (_, Commit::Incomplete) => panic!("a line is lost"),
            (Call::Commit(part), Commit::Done) => self.parts.push(part),
            (Call::Drop(_), Commit::Done) => self.again(),
        }
        Next::Goes
    }
}

/// A worker takes a ready line of a served model, and answers it.
fn answer(list: &mut WorkList, builder: &mut PartBuilder, served: i64, random: &mut StdRng) {
    let with_lines: Vec<usize> =
        (0..list.models().len()).filter(|model| served & 1 << model != 0 && list.ready(*model) > 0).collect();
    if with_lines.is_empty() {
        return;
    }
    let model = with_lines[random.random_range(0..with_lines.len())];
    let key: LineKey = list.take(Lane { model, alone: false }).unwrap();
    let id = list.index(key).to_string();
    if random.random_bool(0.8) {
        let body = bytes::Bytes::from(format!(r#"{{"said":{}}}"#, random.random_range(0..1_000)));
        let reply = results::Reply { status: 200, request_id: None, body: &body, is_json: true, error: None };
        let usage = TokenUsage { input: 3, output: 4, total: 7, ..TokenUsage::default() };
        builder.complete(list.index(key), results::render_answer(&id, list.custom_id(key), reply), usage);
    } else {
        builder.fail(list.index(key), results::render_error(&id, list.custom_id(key), "worker_error", "no"));
    }
    list.done(key);
}
