use std::path::Path;

use sea_orm::{ConnectionTrait, Statement};
use tempfile::TempDir;

use super::*;
use crate::{
    domain::{Endpoint, Scope},
    ingest::{InlineRequest, LineReport},
};

struct Place {
    folder: TempDir,
    store: Store,
    blobs: Blobs,
    ingest: Ingest,
}

impl Place {
    async fn new(limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::sqlite(&folder.path().join("db")).await.unwrap();
        let blobs = Blobs::directory(&folder.path().join("blobs")).unwrap();
        let scratch = folder.path().join("scratch");
        std::fs::create_dir(&scratch).unwrap();
        let ingest = Ingest::new(store.clone(), blobs.clone(), limits, scratch);
        Self { folder, store, blobs, ingest }
    }

    async fn begin(&self, spec: NewUpload) -> Box<Upload> {
        match self.ingest.begin(spec).await.unwrap() {
            Begun::Upload(upload) => upload,
            Begun::Existing(file) => panic!("{file:?}"),
        }
    }

    async fn upload(&self, spec: NewUpload, file: &[u8], chunk: usize) -> Result<File, IngestError> {
        let mut upload = self.begin(spec).await;
        for chunk in file.chunks(chunk) {
            upload.write(Bytes::copy_from_slice(chunk)).await?;
        }
        upload.finish().await
    }

    /// The objects that are noted as garbage, due or not.
    async fn noted(&self) -> Vec<String> {
        let url = format!("sqlite://{}", self.folder.path().join("db").display());
        let database = sea_orm::Database::connect(url).await.unwrap();
        let sql = Statement::from_string(database.get_database_backend(), "SELECT object_key FROM garbage");
        let rows = database.query_all_raw(sql).await.unwrap();
        rows.iter().map(|row| row.try_get("", "object_key").unwrap()).collect()
    }

    /// No object, nothing half-written, no row, and the only note of garbage is one that is due.
    async fn assert_nothing_left(&self) {
        assert_eq!(self.store.count_files().await.unwrap(), 0);
        assert!(self.blobs.list("").await.unwrap().is_empty());
        assert_eq!(files_below(&self.folder.path().join("blobs")), 0);
        let noted = self.noted().await;
        assert_eq!(noted.len(), 1);
        assert_eq!(self.store.due_garbage(10).await.unwrap(), noted);
    }
}

fn files_below(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { files_below(&path) } else { 1 }).sum()
}

fn spec(request_id: Option<&str>) -> NewUpload {
    NewUpload {
        owner: "me".into(),
        filename: "in.jsonl".into(),
        request_id: request_id.map(str::to_owned),
        ..NewUpload::default()
    }
}

fn requests(n: usize, padding: usize) -> String {
    (0..n).fold(String::new(), |file, n| {
        let body = format!(r#"{{"model":"m{}","prompt":"{}"}}"#, n % 3, "x".repeat(padding));
        file + &format!(
            "{{\"custom_id\":\"id-{n}\",\"method\":\"POST\",\"url\":\"/v1/completions\",\"body\":{body}}}\n"
        )
    })
}

#[tokio::test]
async fn an_upload_becomes_a_file_with_its_segments() {
    let place = Place::new(Limits::default()).await;
    let text = requests(2_500, 4_000);
    let total_bytes = Some(text.len() as u64);
    let upload = place.upload(NewUpload { total_bytes, ..spec(None) }, text.as_bytes(), 70_001);
    fn on_any_thread<T: Send>(future: T) -> T {
        future
    }
    let file = on_any_thread(upload).await.unwrap();
    assert_eq!(place.store.file(&file.id, &Scope::All).await.unwrap().unwrap(), file);
    assert_eq!((file.bytes as usize, file.line_count), (text.len(), 2_500));
    assert_eq!((file.owner.as_str(), file.filename.as_str(), &file.kind), ("me", "in.jsonl", &FileKind::Input));
    assert_eq!(
        (file.models.as_slice(), file.endpoint),
        (&["m0", "m1", "m2"].map(String::from)[..], Some(Endpoint::Completions))
    );
    assert_eq!(place.blobs.get(file.object_key.as_deref().unwrap()).await.unwrap(), text);
    let segments = place.store.file_segments(&file.id).await.unwrap();
    assert_eq!(segments.iter().map(|segment| segment.length).sum::<i64>(), file.bytes);
    assert_eq!(segments.iter().map(|segment| segment.requests).sum::<i32>(), 2_500);
    assert!(segments.len() > 2);
    // Nothing notes the object as garbage any more.
    assert!(place.noted().await.is_empty());
}

#[tokio::test]
async fn a_bad_file_leaves_nothing() {
    let place = Place::new(Limits::default()).await;
    // Large enough that parts of the object are written before and after the bad line is seen.
    let text = requests(3_000, 4_000) + "{}\n" + &requests(2_000, 4_000);
    let error = place.upload(spec(None), text.as_bytes(), 1 << 20).await.unwrap_err();
    let IngestError::Invalid { errors, total } = error else { panic!("{error:?}") };
    assert_eq!((total, errors.len(), errors[0].line), (2_001, 100, 3_001));
    assert!(errors[1].message.starts_with("custom_id is already in line 1;"), "{:?}", errors[1]);
    place.assert_nothing_left().await;
}

#[tokio::test]
async fn a_dropped_upload_leaves_nothing() {
    let place = Place::new(Limits::default()).await;
    let mut upload = place.begin(spec(None)).await;
    upload.write(requests(3_000, 4_000).into()).await.unwrap();
    let key = upload.object_key.clone();
    assert!(place.store.due_garbage(10).await.unwrap().is_empty());
    drop(upload);
    // The clean-up runs by itself; that it has ended shows in the note of garbage.
    while place.store.due_garbage(10).await.unwrap() != [key.clone()] {
        tokio::task::yield_now().await;
    }
    place.assert_nothing_left().await;
}

/// What a killed process leaves is noted as garbage from before its first byte on.
#[tokio::test]
async fn an_upload_is_noted_before_it_writes() {
    let place = Place::new(Limits::default()).await;
    let upload = place.begin(spec(None)).await;
    assert_eq!(place.noted().await, std::slice::from_ref(&upload.object_key));
    assert!(place.store.due_garbage(10).await.unwrap().is_empty());
}

#[tokio::test]
async fn limits_and_sizes_are_kept() {
    let small = Limits { max_lines: 3, max_bytes: 100_000, ..Limits::default() };
    let place = Place::new(small).await;
    let error = place.upload(spec(None), requests(4, 1).as_bytes(), 50).await.unwrap_err();
    assert!(matches!(error, IngestError::TooManyLines { max: 3 }), "{error:?}");
    place.assert_nothing_left().await;

    let place = Place::new(small).await;
    let error = place.upload(spec(None), requests(1, 100_000).as_bytes(), 50_000).await.unwrap_err();
    assert!(matches!(error, IngestError::TooManyBytes { max: 100_000 }), "{error:?}");
    place.assert_nothing_left().await;
    let announced = place.ingest.begin(NewUpload { total_bytes: Some(100_001), ..spec(None) }).await;
    assert!(matches!(announced, Err(IngestError::TooManyBytes { .. })));

    let place = Place::new(small).await;
    let text = requests(2, 1);
    for expected in [text.len() as u64 - 1, text.len() as u64 + 1] {
        let announced = NewUpload { total_bytes: Some(expected), ..spec(None) };
        let error = place.upload(announced, text.as_bytes(), 50).await.unwrap_err();
        assert!(matches!(error, IngestError::SizeMismatch { expected: e, .. } if e == expected), "{error:?}");
    }
    let error = place.upload(spec(None), b"\n", 50).await.unwrap_err();
    assert!(matches!(error, IngestError::Empty), "{error:?}");
    assert_eq!(place.store.count_files().await.unwrap(), 0);
    assert!(place.blobs.list("").await.unwrap().is_empty());
}

#[tokio::test]
async fn the_same_request_id_gives_the_same_file() {
    let place = Place::new(Limits::default()).await;
    let mut late = place.begin(spec(Some("r"))).await;
    late.write(requests(2, 1).into()).await.unwrap();
    let first = place.upload(spec(Some("r")), requests(1, 1).as_bytes(), 50).await.unwrap();
    match place.ingest.begin(spec(Some("r"))).await.unwrap() {
        Begun::Existing(file) => assert_eq!(*file, first),
        Begun::Upload(_) => panic!("begun again"),
    }
    // One that had begun before the first was complete: its own object is let go of.
    let key = late.object_key.clone();
    assert_eq!(late.finish().await.unwrap(), first);
    assert_eq!(place.store.count_files().await.unwrap(), 1);
    assert_eq!(place.store.due_garbage(10).await.unwrap(), [key]);
    // Another owner's is another's.
    let other = NewUpload { owner: "you".into(), ..spec(Some("r")) };
    assert_ne!(place.upload(other, requests(1, 1).as_bytes(), 50).await.unwrap().id, first.id);
}

#[tokio::test]
async fn inline_requests_become_a_file() {
    let place = Place::new(Limits::default()).await;
    let request = |id: &str, body: &str| InlineRequest { custom_id: id.into(), body: body.to_owned().into() };
    let good = [request("a\n\"b", " {\"model\":\"m\",\r\n \"n\":1.0e2}\n"), request("c", r#"{"model":"n"}"#)];
    let file = place.ingest.inline(spec(Some("r")), Endpoint::Score, &good).await.unwrap();
    let bytes = place.blobs.get(file.object_key.as_deref().unwrap()).await.unwrap();
    let lines: Vec<_> = crate::domain::request_line::lines(&bytes)
        .map(|(_, line)| crate::domain::request_line::parse(line).unwrap())
        .collect();
    assert_eq!(lines[0].custom_id, "a\n\"b");
    assert_eq!(lines[0].body, "{\"model\":\"m\",   \"n\":1.0e2}");
    assert_eq!((lines.len(), lines[1].endpoint, file.line_count), (2, Endpoint::Score, 2));
    assert_eq!(place.ingest.inline(spec(Some("r")), Endpoint::Score, &good).await.unwrap(), file);

    let bad = [
        request("a", "{\"model\":\"m\",\"x\":\"\n\"}"),
        request("", r#"{"model":"m"}"#),
        request("b", r#"{"model":"m"}"#),
        request("c", r#"{"model":"m"},"url":"/v1/rerank""#),
        request("b", r#"{"model":"m"}"#),
    ];
    let error = place.ingest.inline(spec(None), Endpoint::Score, &bad).await.unwrap_err();
    let IngestError::Invalid { errors, total: 4 } = error else { panic!("{error:?}") };
    let found: Vec<_> = errors.iter().map(|LineReport { line, message, .. }| (*line, message.as_str())).collect();
    assert!(found[0].0 == 1 && found[0].1.starts_with("not valid JSON: a control character"), "{found:?}");
    assert!(found[1].0 == 2 && found[1].1.starts_with("custom_id is empty"), "{found:?}");
    assert!(found[2].0 == 4 && found[2].1.starts_with("not valid JSON: more text after the object"), "{found:?}");
    assert!(found[3].0 == 5 && found[3].1.starts_with("custom_id is already in line 3"), "{found:?}");

    let many = vec![request("a", "{}"); 1_001];
    let error = place.ingest.inline(spec(None), Endpoint::Score, &many).await.unwrap_err();
    assert!(matches!(error, IngestError::TooManyLines { max: 1_000 }));
    let large = [request("a", &" ".repeat(3 << 20))];
    let error = place.ingest.inline(spec(None), Endpoint::Score, &large).await.unwrap_err();
    assert!(matches!(error, IngestError::TooManyBytes { .. }));
}
