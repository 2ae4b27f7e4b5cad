//! Pages of batches and files: whatever the filters, each match once, newest first.

use std::collections::BTreeMap;

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use tidemill::{
    domain::{Batch, BatchId, BatchStatus, Endpoint, FileId, Scope},
    store::{BatchFilter, FileFilter, PageOrder},
};

use crate::fixture::{Db, new_batch};

on_both_databases!(every_filter_finds_each_match_once_newest_first, every_purpose_finds_its_files);

const OWNERS: [&str; 2] = ["a", "b"];
const ENDPOINTS: [Endpoint; 2] = [Endpoint::ChatCompletions, Endpoint::Messages];
const MODELS: [&str; 3] = ["m", "n", "o"];

fn pairs(random: &mut StdRng, share: f64) -> BTreeMap<String, String> {
    let mut pairs = BTreeMap::new();
    for name in ["x", "y"] {
        if random.random_bool(share) {
            let value = if random.random_bool(0.7) { "often" } else { "seldom" };
            pairs.insert(name.to_owned(), value.to_owned());
        }
    }
    pairs
}

/// Batches of two owners, of some models, with some metadata, in all the states that a batch stays in by itself.
async fn populate(db: &Db, random: &mut StdRng) -> Vec<(Batch, Vec<String>, BTreeMap<String, String>)> {
    let mut all = Vec::new();
    for _ in 0..60 {
        let owner = *OWNERS.choose(random).unwrap();
        let models: Vec<&str> = MODELS.into_iter().filter(|_| random.random_bool(0.5)).collect();
        let models = if models.is_empty() { vec!["m"] } else { models };
        let file = db.file_of(owner, 1, &models).await;
        let mut new = new_batch(&file.id);
        new.owner = (*owner).into();
        new.endpoint = *ENDPOINTS.choose(random).unwrap();
        new.metadata = pairs(random, 0.7);
        let metadata = new.metadata.clone();
        let batch = db.create(new).await;
        match random.random_range(0..4) {
            0 => {}
            1 => drop(db.store.cancel_batch(&batch.id, &Scope::All).await.unwrap()),
            2 => {
                db.store.cancel_batch(&batch.id, &Scope::All).await.unwrap();
                let claimed = db.claim(&batch.id).await;
                db.finish(&claimed).await;
            }
            _ => {
                let claimed = db.claim(&batch.id).await;
                db.finish(&claimed).await;
            }
        }
        all.push((db.get(&batch.id).await, models.into_iter().map(str::to_owned).collect(), metadata));
    }
    all.reverse();
    all
}

async fn every_filter_finds_each_match_once_newest_first(db: Db) {
    let seed = rand::random();
    let mut random = StdRng::seed_from_u64(seed);
    let all = populate(&db, &mut random).await;
    let mut found = 0;
    for _ in 0..150 {
        let filter = BatchFilter {
            scope: random.random_bool(0.5).then(|| (*OWNERS.choose(&mut random).unwrap()).to_owned()).into(),
            statuses: BatchStatus::ALL.into_iter().filter(|_| random.random_bool(0.3)).collect(),
            endpoint: random.random_bool(0.3).then(|| *ENDPOINTS.choose(&mut random).unwrap()),
            model: random.random_bool(0.3).then(|| (*MODELS.choose(&mut random).unwrap()).to_owned()),
            metadata: pairs(&mut random, 0.3),
        };
        let expected: Vec<&BatchId> = all
            .iter()
            .filter(|(batch, models, metadata)| {
                filter.scope.sees(&batch.owner)
                    && filter.endpoint.is_none_or(|endpoint| batch.endpoint == endpoint)
                    && (filter.statuses.is_empty() || filter.statuses.contains(&batch.status))
                    && filter.model.as_ref().is_none_or(|model| models.contains(model))
                    && filter.metadata.iter().all(|(name, value)| metadata.get(name) == Some(value))
            })
            .map(|(batch, ..)| &batch.id)
            .collect();
        let size = random.random_range(1..20);
        let mut pages: Vec<BatchId> = Vec::new();
        let order = if random.random_bool(0.7) { PageOrder::Newest } else { PageOrder::Oldest };
        loop {
            let page = db.store.batches_in(&filter, order, pages.last(), size).await.unwrap();
            assert!(page.len() as u64 <= size);
            let last = (page.len() as u64) < size;
            pages.extend(page.into_iter().map(|batch| batch.id));
            if last {
                break;
            }
        }
        if order == PageOrder::Oldest {
            pages.reverse();
        }
        assert_eq!(pages.iter().collect::<Vec<_>>(), expected, "seed {seed}: {filter:?} by {size}");
        found += pages.len();
    }
    assert!(found > 100, "seed {seed}: hardly anything was ever found");
}

async fn every_purpose_finds_its_files(db: Db) {
    let mut random = StdRng::seed_from_u64(7);
    let all = populate(&db, &mut random).await;
    for owner in [None, Some("a"), Some("b")] {
        for purpose in [None, Some("batch"), Some("batch_output")] {
            let filter = FileFilter { scope: owner.map(str::to_owned).into(), purpose: purpose.map(str::to_owned) };
            let mut pages: Vec<FileId> = Vec::new();
            loop {
                let page = db.store.files(&filter, pages.last(), 7).await.unwrap();
                let last = page.len() < 7;
                assert!(page.iter().all(|file| purpose.is_none_or(|purpose| file.kind.purpose() == purpose)));
                assert!(page.iter().all(|file| owner.is_none_or(|owner| file.owner.as_str() == owner)));
                pages.extend(page.into_iter().map(|file| file.id));
                if last {
                    break;
                }
            }
            assert!(pages.is_sorted_by(|one, other| one > other), "newest first, each once");
            let theirs = all.iter().filter(|(batch, ..)| owner.is_none_or(|owner| batch.owner.as_str() == owner));
            let results: usize = theirs
                .clone()
                .map(|(batch, ..)| [&batch.output_file_id, &batch.error_file_id].into_iter().flatten().count())
                .sum();
            let (inputs, results) = match purpose {
                None => (theirs.count(), results),
                Some("batch") => (theirs.count(), 0),
                Some(_) => (0, results),
            };
            assert_eq!(pages.len(), inputs + results, "{filter:?}");
        }
    }
}
