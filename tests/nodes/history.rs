//! What must be true of a batch when all is over, whatever happened meanwhile; asked of the nodes as any client could.
//! Only the epochs of parts, which no client sees, are read in the database.

use std::collections::{BTreeMap, HashMap};

use sea_orm::{ConnectionTrait, DatabaseBackend, DatabaseConnection, Statement};
use serde_json::Value;
use tidemill::pb::{BatchStatus, CreateBatchRequest};
use tokio::task::JoinHandle;

use crate::calls::{Anybody, State, of_file};
use crate::support::direct;

/// A batch that a test has created, with those who follow it to its end.
pub struct Submitted {
    pub id: String,
    lines: usize,
    watcher: JoinHandle<Vec<State>>,
    follower: JoinHandle<BTreeMap<String, usize>>,
}

/// So many request lines. Their answers differ in length, so that one given to another line is noticed.
pub fn input(lines: usize) -> String {
    (0..lines)
        .map(|number| {
            let tokens = answer_tokens(number);
            format!(
                r#"{{"custom_id":"r{number}","method":"POST","url":"/v1/chat/completions","body":{{"model":"sim","messages":[{{"role":"user","content":"number {number}"}}],"max_tokens":{tokens}}}}}"#
            ) + "\n"
        })
        .collect()
}

pub fn answer_tokens(number: usize) -> usize {
    number % 7 + 1
}

/// Uploads, creates, and begins to watch and to follow.
pub async fn submit(anybody: &Anybody, lines: usize, name: &str) -> Submitted {
    submit_as(anybody, lines, name, |request| request).await
}

/// The same, and what creates the batch is changed first.
pub async fn submit_as(
    anybody: &Anybody,
    lines: usize,
    name: &str,
    change: impl Fn(CreateBatchRequest) -> CreateBatchRequest,
) -> Submitted {
    let file = anybody.upload(&input(lines), &format!("file-{name}")).await;
    let request = change(of_file(&file, name));
    let id = anybody.create_from(&request).await;
    assert_eq!(anybody.create_from(&request).await, id, "the same request id is the same batch, on every node");
    Submitted::of(anybody, id, lines)
}

impl Submitted {
    /// Begins to watch and to follow a batch of so many lines of [`input`].
    pub fn of(anybody: &Anybody, id: String, lines: usize) -> Self {
        let watcher = tokio::spawn(anybody.clone().watch(id.clone()));
        let follower = tokio::spawn(anybody.clone().follow(id.clone()));
        Self { id, lines, watcher, follower }
    }

    /// Waits for the end and checks all of it. Returns the state in which it ended.
    pub async fn check(self, anybody: &Anybody) -> BatchStatus {
        let states = self.watcher.await.unwrap();
        let followed = self.follower.await.unwrap();
        let batch = anybody.get(&self.id).await;
        let status = batch.status();
        check_states(&states, status);

        let (output, error) = (read(anybody, &batch.output_file_id).await, read(anybody, &batch.error_file_id).await);
        let wanted: Vec<String> = (0..self.lines).map(|number| format!("r{number}")).collect();
        let mut found: Vec<usize> = output.iter().chain(&error).map(number_of).collect();
        for lines in [&output, &error] {
            assert!(lines.iter().map(number_of).is_sorted(), "lines come in input order");
        }
        found.sort_unstable();
        assert_eq!(found, (0..self.lines).collect::<Vec<_>>(), "{}: every line exactly once", self.id);
        let tokens = |line: &Value, name: &str| line["response"]["body"]["usage"][name].as_u64().unwrap();
        for line in &output {
            assert_eq!(
                tokens(line, "completion_tokens"),
                answer_tokens(number_of(line)) as u64,
                "its own answer: {line}"
            );
        }
        match status {
            BatchStatus::Completed => assert!(error.is_empty(), "{:?}", error.first()),
            BatchStatus::Cancelled => {
                assert!(error.iter().all(|line| line["error"]["code"] == "batch_cancelled"), "{:?}", error.first());
            }
            other => panic!("{} ended as {other:?}: {batch:?}", self.id),
        }

        let counts = batch.request_counts.unwrap();
        let found = (counts.total, counts.completed, counts.failed);
        assert_eq!(found, (self.lines as i64, output.len() as i64, error.len() as i64), "the totals add up");
        let total: u64 = output.iter().map(|line| tokens(line, "total_tokens")).sum();
        assert_eq!(batch.usage.unwrap().total_tokens, total as i64, "the tokens add up");

        assert!(followed.values().all(|times| *times == 1), "no result was streamed twice");
        let mut streamed: Vec<&String> = followed.keys().collect();
        let mut wanted: Vec<&String> = wanted.iter().collect();
        streamed.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(streamed, wanted, "every result was streamed");
        status
    }
}

/// The states that one watcher was told of: each once, in order, to the end.
pub fn check_states(states: &[State], last: BatchStatus) {
    for pair in states.windows(2) {
        assert!(pair[0].revision < pair[1].revision && pair[0].sequence < pair[1].sequence, "{states:?}");
    }
    let path: &[BatchStatus] = match last {
        BatchStatus::Cancelled => {
            &[BatchStatus::Validating, BatchStatus::InProgress, BatchStatus::Cancelling, BatchStatus::Cancelled]
        }
        _ => &[BatchStatus::Validating, BatchStatus::InProgress, BatchStatus::Finalizing, BatchStatus::Completed],
    };
    let told: Vec<BatchStatus> = states.iter().map(|state| state.status).collect();
    // The watcher came after the first of them.
    assert!(path.ends_with(&told) && !told.is_empty(), "{told:?}");
}

/// The log of all state changes holds each once, and every watcher was told what it holds.
pub async fn check_events(anybody: &Anybody, watched: &[(String, BatchStatus)]) {
    let mut by_batch: HashMap<String, Vec<State>> = HashMap::new();
    let ended = |states: &[State], (id, status): &(String, BatchStatus)| {
        states.iter().any(|state| state.batch == *id && state.status == *status)
    };
    for state in anybody.all_states(1, |states| watched.iter().all(|batch| ended(states, batch))).await {
        by_batch.entry(state.batch.clone()).or_default().push(state);
    }
    for (id, status) in watched {
        check_states(&by_batch[id], *status);
        assert_eq!(by_batch[id].len(), 4, "{id}: from the first state to the last");
    }
}

/// Nobody has written under an epoch that was over: among a segment's parts, in commit order, epochs never go back.
pub async fn check_epochs(database: &str) {
    let sql = "SELECT count(*) AS n FROM (SELECT epoch, lag(epoch) OVER (PARTITION BY batch_id, segment_idx ORDER BY seq) \
               AS before FROM parts) AS p WHERE before > epoch";
    assert_eq!(ask(database, sql).await, 0, "a part of an epoch that was over");
}

/// How many times any segment was claimed beyond its first.
pub async fn claimed_again(database: &str) -> i64 {
    ask(database, "SELECT coalesce(sum(epoch - 1), 0)::bigint AS n FROM segments WHERE epoch > 1").await
}

/// As [`count`], on a connection of its own.
pub async fn ask(database: &str, sql: &str) -> i64 {
    let connection = direct::connect(database).await;
    let answer = count(&connection, sql).await;
    connection.close().await.unwrap();
    answer
}

/// The one number, `n`, that the query yields.
pub async fn count(connection: &DatabaseConnection, sql: &str) -> i64 {
    let row = connection.query_one_raw(Statement::from_string(DatabaseBackend::Postgres, sql)).await.unwrap().unwrap();
    row.try_get("", "n").unwrap()
}

async fn read(anybody: &Anybody, file_id: &str) -> Vec<Value> {
    if file_id.is_empty() {
        return Vec::new();
    }
    let bytes = anybody.download(file_id).await;
    bytes.split_inclusive(|byte| *byte == b'\n').map(|line| serde_json::from_slice(line).unwrap()).collect()
}

fn number_of(line: &Value) -> usize {
    line["custom_id"].as_str().unwrap()[1..].parse().unwrap()
}
