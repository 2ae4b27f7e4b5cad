//! Uploads in parts: their rows and objects, whatever ends them.

use std::time::Duration;

use futures::future::join_all;
use tidemill::{
    domain::{Completion, PartedUpload, Scope, Timestamp, UploadId, UploadPart, UploadPartId, UploadState},
    store::{CancelledUpload, EndedUploads, InsertedFile, InsertedPart, NewPartedUpload, Origin},
};

use crate::fixture::{Db, new_file, spans};

const ENOUGH: u64 = 1_000_000;

async fn begin(db: &Db, owner: &str) -> PartedUpload {
    let new = NewPartedUpload {
        owner: owner.into(),
        filename: "ü.jsonl".into(),
        bytes: 30,
        file_expires_after: Some(Duration::from_secs(3_600)),
    };
    db.store.begin_parted_upload(&new).await.unwrap()
}

fn part(bytes: i64) -> UploadPart {
    let id = UploadPartId::generate();
    let object_key = format!("uploads/x/{id}");
    UploadPart { id, bytes, crc32c: u32::MAX, object_key, created_at: Timestamp(7) }
}

/// Adds a part as ingest does.
async fn add(db: &Db, to: &PartedUpload, part: &UploadPart) -> InsertedPart {
    db.store.begin_upload(&part.object_key).await.unwrap();
    db.store.insert_upload_part(&to.id, part, &Scope::All, ENOUGH).await.unwrap()
}

/// The objects that are garbage.
async fn garbage(db: &Db) -> i64 {
    db.number("SELECT COUNT(*) FROM garbage").await
}

async fn an_upload_becomes_one_file_and_its_parts_go_with_it(db: Db) {
    let upload = begin(&db, "ana").await;
    assert_eq!(
        (&upload.state, upload.expires_at.since(upload.created_at)),
        (&UploadState::Pending, Duration::from_secs(86_400))
    );
    let (one, two) = (part(10), part(20));
    assert_eq!((add(&db, &upload, &one).await, add(&db, &upload, &two).await), (InsertedPart::New, InsertedPart::New));
    assert_eq!(db.store.upload_parts(&upload.id).await.unwrap(), [one, two]);
    assert_eq!(garbage(&db).await, 0, "a row names each");
    // Several calls complete it at the same time, over several connections.
    let stores = [db.store.clone(), db.another().await];
    let completion = Completion { upload: upload.id.clone(), parts: "of these".into() };
    let made = join_all((0..6).map(|turn| {
        let (store, completion) = (stores[turn % 2].clone(), &completion);
        async move {
            let file = new_file("ana", 1, &["m"]);
            store.begin_upload(file.object_key.as_deref().unwrap()).await.unwrap();
            let origin = Origin { completes: Some(completion), ..Origin::default() };
            (store.insert_file(&file, origin, &spans(1)).await.unwrap(), file)
        }
    }))
    .await;
    let mut files = made.into_iter().filter(|(made, _)| match made {
        InsertedFile::New => true,
        InsertedFile::UploadEnded => false,
        InsertedFile::Existing(_) => panic!("there is no request id"),
    });
    let file = files.next().unwrap().1;
    assert!(files.next().is_none());
    assert_eq!((db.store.count_files().await.unwrap(), db.number("SELECT COUNT(*) FROM file_segments").await), (1, 1));
    let state = UploadState::Completed { file: file.id, parts: "of these".into() };
    let found = db.store.parted_upload(&upload.id, &Scope::Of("ana".into())).await.unwrap();
    assert_eq!(found, Some(PartedUpload { state, ..upload.clone() }));
    assert!(db.store.upload_parts(&upload.id).await.unwrap().is_empty());
    assert_eq!(garbage(&db).await, 2 + 5, "its parts, and what the losers wrote");
    // It takes nothing any more.
    assert!(matches!(add(&db, &upload, &part(1)).await, InsertedPart::Ended(_)));
    let cancelled = db.store.cancel_parted_upload(&upload.id, &Scope::All).await.unwrap();
    assert!(matches!(cancelled, CancelledUpload::Ended(_)));
}

async fn another_owners_upload_is_not_there(db: Db) {
    let upload = begin(&db, "ana").await;
    let bob = Scope::Of("bob".into());
    assert_eq!(db.store.parted_upload(&upload.id, &bob).await.unwrap(), None);
    let inserted = db.store.insert_upload_part(&upload.id, &part(1), &bob, ENOUGH).await.unwrap();
    assert_eq!(inserted, InsertedPart::NotFound);
    assert_eq!(db.store.cancel_parted_upload(&upload.id, &bob).await.unwrap(), CancelledUpload::NotFound);
    let completion = Completion { upload: upload.id.clone(), parts: "x".into() };
    let origin = Origin { completes: Some(&completion), ..Origin::default() };
    let made = db.store.insert_file(&new_file("bob", 1, &["m"]), origin, &spans(1)).await.unwrap();
    assert!(matches!(made, InsertedFile::UploadEnded));
    assert_eq!((db.store.count_files().await.unwrap(), db.number("SELECT COUNT(*) FROM upload_parts").await), (0, 0));
    assert_eq!(db.store.parted_upload(&upload.id, &Scope::All).await.unwrap(), Some(upload));
    assert_eq!(db.store.parted_upload(&UploadId::generate(), &Scope::All).await.unwrap(), None);
}

async fn parts_have_a_limit_together(db: Db) {
    let upload = begin(&db, "").await;
    let add = async |bytes| db.store.insert_upload_part(&upload.id, &part(bytes), &Scope::All, 30).await.unwrap();
    assert_eq!(
        [add(10).await, add(21).await, add(20).await, add(1).await],
        [InsertedPart::New, InsertedPart::TooLarge, InsertedPart::New, InsertedPart::TooLarge]
    );
    db.execute("UPDATE uploads SET parts = 10000, part_bytes = 0").await;
    assert_eq!(add(1).await, InsertedPart::TooMany);
}

async fn what_is_not_completed_goes_when_it_is_cancelled_or_its_time_is_up(db: Db) {
    let (given_up, late, waits) = (begin(&db, "").await, begin(&db, "").await, begin(&db, "").await);
    for upload in [&given_up, &late, &waits] {
        assert_eq!(add(&db, upload, &part(5)).await, InsertedPart::New);
    }
    for _ in 0..2 {
        let cancelled = db.store.cancel_parted_upload(&given_up.id, &Scope::All).await.unwrap();
        let CancelledUpload::Cancelled(cancelled) = cancelled else { panic!("{cancelled:?}") };
        assert_eq!(cancelled.state, UploadState::Cancelled);
    }
    assert_eq!(garbage(&db).await, 1);
    assert_eq!(db.store.end_due_uploads(9).await.unwrap(), EndedUploads::default());
    db.execute(&format!("UPDATE uploads SET expires_at = 1 WHERE id = '{}'", late.id)).await;
    // Before the sweep comes by, too.
    assert_eq!(db.store.parted_upload(&late.id, &Scope::All).await.unwrap().unwrap().state, UploadState::Expired);
    assert!(matches!(add(&db, &late, &part(1)).await, InsertedPart::Ended(_)));
    let ended = db.store.end_due_uploads(9).await.unwrap();
    // Its time was up more than a day ago.
    assert_eq!(ended, EndedUploads { expired: 1, forgotten: 1 });
    assert_eq!(garbage(&db).await, 3, "the parts, and the one that came late");
    assert_eq!(db.store.parted_upload(&late.id, &Scope::All).await.unwrap(), None);
    assert_eq!(db.number("SELECT COUNT(*) FROM upload_parts").await, 1);
    assert_eq!(db.store.parted_upload(&waits.id, &Scope::All).await.unwrap(), Some(waits));
    // What ended lately is remembered.
    assert_eq!(db.number("SELECT COUNT(*) FROM uploads").await, 2);
}

on_both_databases!(
    an_upload_becomes_one_file_and_its_parts_go_with_it,
    another_owners_upload_is_not_there,
    parts_have_a_limit_together,
    what_is_not_completed_goes_when_it_is_cancelled_or_its_time_is_up,
);
