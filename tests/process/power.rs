//! The power is cut: whatever was not fsynced may be gone, names and bytes. What was acknowledged is there all the same, every
//! row's object is whole, and the batch completes.

use std::{path::Path, time::Duration};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use sea_orm::{ConnectionTrait, Statement};
use tidemill::{
    blobs::{BlobError, Blobs},
    domain::{BatchId, FileId, Scope, SegmentIndex},
    fault::Fault,
    pb::{BatchStatus, CreateBatchRequest, GetBatchRequest, WebhookConfig, create_batch_request::Input},
    sim::SimConfig,
    store::{BatchFilter, DeliveryFilter, FileFilter, Store},
};

use crate::support::direct;
use crate::{
    assert_complete,
    disk::Disk,
    input,
    receiver::{Receiver, SECRET},
    server::Server,
    try_upload, worker,
};

const LINES: usize = 1_100;

/// What somebody has been told.
#[derive(Default)]
struct Told {
    file: Option<String>,
    batch: Option<String>,
    /// Lines with a result, as a call has answered.
    finished: i64,
    completed: bool,
    /// The receiver has got so many attempts of the one delivery.
    attempts: usize,
}

/// What a power cut has taken.
#[derive(Default)]
struct Losses(Vec<String>);

impl Losses {
    /// What of `told` is gone, and rows and objects that do not fit together. No server runs on the folder meanwhile.
    async fn of(data: &Path, objects: &Path, told: &Told) -> Vec<String> {
        let file = data.join("tidemill.db");
        let (mut losses, store) = (Self::default(), Store::sqlite(&file).await.unwrap());
        let blobs = Blobs::shared_directory(objects).unwrap();
        losses.uploads(&store, &blobs, &noted(&file).await).await;
        for batch in store.batches(&BatchFilter::within(Scope::All), None, 10).await.unwrap() {
            losses.results(&store, &blobs, &batch.id).await;
        }
        losses.told(&store, told).await;
        store.close().await;
        losses.0
    }

    async fn object(&mut self, blobs: &Blobs, key: &str, length: u64, crc: Option<u32>) {
        match blobs.get(key).await {
            Ok(bytes) if bytes.len() as u64 == length && crc.is_none_or(|crc| crc32c::crc32c(&bytes) == crc) => {}
            Ok(_) => self.0.push(format!("{key} is torn, and a row names it")),
            Err(BlobError::Missing(_)) => self.0.push(format!("{key} is gone, and a row names it")),
            Err(error) => panic!("{error}"),
        }
    }

    async fn uploads(&mut self, store: &Store, blobs: &Blobs, noted: &[String]) {
        let mut named = noted.to_vec();
        for file in store.files(&FileFilter::within(Scope::All), None, 10).await.unwrap() {
            if let Some(key) = file.object_key {
                self.object(blobs, &key, file.bytes as u64, Some(crc32c::crc32c(input(LINES).as_bytes()))).await;
                named.push(key);
            }
        }
        let orphans = blobs.list("inputs").await.unwrap().into_iter().filter(|key| !named.contains(key));
        self.0.extend(orphans.map(|key| format!("{key} will never be deleted")));
    }

    async fn results(&mut self, store: &Store, blobs: &Blobs, id: &BatchId) {
        let mut ended = Vec::new();
        for segment in store.segments(id, SegmentIndex(0), 1_000).await.unwrap() {
            if let Some(key) = &segment.object_key {
                self.object(blobs, key, segment.output_bytes + segment.error_bytes, None).await;
                ended.push(segment.span.index);
            }
        }
        for part in store.parts_from(id, 0, 10_000).await.unwrap() {
            if !ended.contains(&part.segment) {
                let part = part.content;
                self.object(blobs, &part.object_key, part.output_bytes + part.error_bytes, Some(part.crc32c)).await;
            }
        }
    }

    async fn told(&mut self, store: &Store, told: &Told) {
        if let Some(id) = &told.file
            && store.file(&FileId::from_text(id), &Scope::All).await.unwrap().is_none()
        {
            self.0.push("the file's row".to_owned());
        }
        let Some(id) = told.batch.as_ref().map(BatchId::from_text) else { return };
        match store.batch(&id, &Scope::All).await.unwrap() {
            None => self.0.push("the batch's row".to_owned()),
            Some(batch) => {
                let finished = batch.counts.completed + batch.counts.failed;
                if finished < told.finished {
                    self.0.push(format!("{} of {} lines with a result", told.finished - finished, told.finished));
                }
                if told.completed && !batch.status.is_terminal() {
                    self.0.push("the batch's end".to_owned());
                }
            }
        }
        let filter = DeliveryFilter { batch_id: Some(id), ..DeliveryFilter::within(Scope::All) };
        let mut attempts = 0;
        for delivery in store.deliveries(&filter, None, 10).await.unwrap() {
            attempts += store.attempts(&delivery.id, &Scope::All).await.unwrap().len();
        }
        if attempts < told.attempts {
            self.0.push(format!("{} of {} attempts", told.attempts - attempts, told.attempts));
        }
    }
}

/// Objects that are to be deleted some time.
async fn noted(file: &Path) -> Vec<String> {
    let raw = direct::connect(format!("sqlite://{}", file.display())).await;
    let all = Statement::from_string(raw.get_database_backend(), "SELECT object_key FROM garbage");
    let all = raw.query_all_raw(all).await.unwrap().iter().map(|row| row.try_get("", "object_key").unwrap()).collect();
    raw.close().await.unwrap();
    all
}

/// A server on a disk whose power can be cut.
struct World {
    server: Server,
    disk: Disk,
    receiver: Receiver,
    /// Where the objects are, below the server's folder.
    objects: &'static str,
    told: Told,
}

impl World {
    async fn start(ignores: Option<&'static str>, dies: Option<(Fault, u32)>) -> Self {
        let mut world = Self::new(ignores).await;
        let dies = dies.map(|(fault, visit)| ("TIDEMILL_FAULT".to_owned(), format!("{}:{visit}", fault.name())));
        world.server.environment.extend(dies);
        world.server.restart().await;
        world
    }

    /// Not started yet.
    async fn new(ignores: Option<&'static str>) -> Self {
        let config = SimConfig { latency: Duration::from_millis(20), max_num_seqs: 32, ..SimConfig::default() };
        let (_, worker) = worker(config).await;
        let flags = [
            "--worker",
            &worker,
            "--flush-interval",
            "50ms",
            "--webhook-allow-cidr",
            "127.0.0.0/8",
            "--webhook-retry-schedule",
            "1s,2s,4s",
        ];
        let mut server = Server::new(&flags);
        let disk = Disk::new(server.folder(), ignores);
        server.environment = disk.environment();
        Self { server, disk, receiver: Receiver::start(200).await, objects: "blobs", told: Told::default() }
    }

    async fn submit(&mut self) -> Result<(), tonic::Status> {
        let mut client = self.server.client().await;
        let file = try_upload(&mut client, input(LINES), "file").await?;
        self.told.file = Some(file.clone());
        let webhook =
            WebhookConfig { url: self.receiver.url.clone(), secret: SECRET.into(), ..WebhookConfig::default() };
        let request = CreateBatchRequest {
            input: Some(Input::InputFileId(file)),
            request_id: "once".into(),
            webhook: Some(webhook),
            ..CreateBatchRequest::default()
        };
        self.told.batch = Some(client.create_batch(request).await?.into_inner().id);
        Ok(())
    }

    async fn ask(&mut self) {
        let batch_id = self.told.batch.clone().unwrap();
        let batch = self.server.client().await.get_batch(GetBatchRequest { batch_id }).await.unwrap().into_inner();
        let counts = batch.request_counts.unwrap();
        self.told.finished = counts.completed + counts.failed;
        self.told.completed = batch.status() == BatchStatus::Completed;
        self.told.attempts = self.receiver.received().len();
    }

    /// What a cut loses. The server's process is gone already.
    async fn cut(&mut self, chance: f64, random: &mut StdRng) -> Vec<String> {
        self.told.attempts = self.receiver.received().len();
        self.disk.cut(self.server.folder(), chance, random);
        let folder = self.server.folder();
        let losses = Losses::of(&folder.join(self.server.data), &folder.join(self.objects), &self.told).await;
        // Looking at a database writes to it.
        self.disk.write_back(folder);
        losses
    }
}

/// How likely it is that what was not synced is there all the same. One of those is nothing but a `kill -9`.
async fn survives(chance: f64, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let mut world = World::start(None, None).await;
    world.submit().await.unwrap();
    let mut cuts = 0;
    while !world.told.completed {
        // Cut at a moment of no meaning; later, where the machine is too slow to get any further in that time.
        let longest = 400 << (cuts / 20).min(5);
        tokio::time::sleep(Duration::from_millis(random.random_range(0..longest))).await;
        world.ask().await;
        world.server.kill().await;
        assert_eq!(world.cut(chance, &mut random).await, Vec::<String>::new(), "lost at cut {cuts}, seed {seed}");
        world.server.restart().await;
        cuts += 1;
        assert!(cuts < 200, "no cut lets it get any further");
    }
    world.receiver.wait(1).await;
    world.server.kill().await;
    assert_eq!(world.cut(chance, &mut random).await, Vec::<String>::new(), "lost at the last cut, seed {seed}");
    world.server.restart().await;
    assert_complete(&mut world.server.client().await, world.told.batch.as_ref().unwrap(), LINES).await;
    println!("{cuts} cuts, seed {seed}");
    world.server.kill().await;
}

fn seed() -> u64 {
    std::env::var("TIDEMILL_SEED").map_or_else(|_| rand::random(), |text| text.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_synced_is_not_needed() {
    survives(0.0, seed()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_else_the_disk_may_have_written_harms_nothing() {
    survives(0.5, seed()).await;
}

impl World {
    async fn completes(&mut self) {
        self.submit().await.unwrap();
        while !self.told.completed {
            tokio::time::sleep(Duration::from_millis(50)).await;
            self.ask().await;
        }
        self.server.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn new_folders_are_durable_too() {
    let mut world = World::new(None).await;
    world.server.data = "new/data";
    world.objects = "objects/of/tidemill";
    let url = format!("file://{}/{}", world.server.folder().display(), world.objects);
    world.server.environment.push(("TIDEMILL_BLOBS".into(), url));
    world.server.restart().await;
    world.completes().await;
    assert_eq!(world.cut(0.0, &mut StdRng::seed_from_u64(0)).await, Vec::<String>::new());
}

/// This test could fail: a disk that lies is found out.
async fn is_noticed(ignores: &'static str) {
    let mut world = World::start(Some(ignores), None).await;
    world.completes().await;
    let losses = world.cut(0.0, &mut StdRng::seed_from_u64(0)).await;
    assert!(!losses.is_empty(), "the {ignores} were never synced");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_syncs_no_file_is_noticed() {
    is_noticed("files").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_syncs_no_folder_is_noticed() {
    is_noticed("folders").await;
}

/// Between any two writes, a row never names an object that is not there, and no object is without a row or a note.
#[cfg(debug_assertions)]
#[tokio::test(flavor = "multi_thread")]
async fn the_object_is_there_before_its_row() {
    let points = [
        (Fault::UploadObject, 1),
        (Fault::PartObject, 2),
        (Fault::PartRow, 2),
        (Fault::SegmentFinish, 1),
        (Fault::MergedObject, 1),
        (Fault::SegmentFinished, 1),
        (Fault::DeliveryAttempt, 1),
        (Fault::DeliveryAnswered, 1),
    ];
    for (point, visit) in points {
        let mut world = World::start(None, Some((point, visit))).await;
        // It may die before it answers.
        let _ = world.submit().await;
        world.server.died().await;
        let losses = world.cut(0.0, &mut StdRng::seed_from_u64(0)).await;
        assert_eq!(losses, Vec::<String>::new(), "lost at {}", point.name());
    }
}
