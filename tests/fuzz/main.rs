//! The fuzz targets without a fuzzer: every committed seed, and seeds with a few bytes changed. What `cargo fuzz` finds
//! becomes a seed and is tested here ever after. See `fuzz/README.md`.

#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../../fuzz/src/lib.rs"]
mod targets;

use std::{fs, path::Path};

use rand::{RngExt, SeedableRng, rngs::StdRng};

/// Changed inputs for each target; `TIDEMILL_FUZZ_RUNS` for more.
const RUNS: usize = 3_000;

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Cuts, copies, overwrites and inserts, mostly of bytes that mean something somewhere.
fn change(input: &mut Vec<u8>, others: &[Vec<u8>], random: &mut StdRng) {
    const TELLING: &[u8] = b"{}[]\",:\\\n\r\t /.@#?%+-0127efu\x00\x7f\x80\xbf\xc3\xe2\xed\xf0\xff";
    for _ in 0..random.random_range(1..5) {
        let at = random.random_range(0..=input.len());
        let until = random.random_range(at..=input.len().min(at + 12));
        match random.random_range(0..5) {
            0 => drop(input.drain(at..until)),
            1 => {
                let copy = input[at..until].to_vec();
                let to = random.random_range(0..=input.len());
                input.splice(to..to, copy);
            }
            2 => input.insert(at, random.random()),
            3 => input.insert(at, TELLING[random.random_range(0..TELLING.len())]),
            _ => {
                let other = &others[random.random_range(0..others.len())];
                let from = random.random_range(0..=other.len());
                let to = random.random_range(from..=other.len().min(from + 24));
                input.splice(at..until, other[from..to].iter().copied());
            }
        }
    }
}

fn run(target: &str, check: fn(&[u8])) {
    let runs = std::env::var("TIDEMILL_FUZZ_RUNS").map_or(RUNS, |text| text.parse().unwrap());
    let seeds = seeds(target);
    seeds.iter().for_each(|seed| check(seed));
    let mut random = StdRng::seed_from_u64(1);
    for _ in 0..runs {
        let mut input = seeds[random.random_range(0..seeds.len())].clone();
        change(&mut input, &seeds, &mut random);
        if std::panic::catch_unwind(|| check(&input)).is_err() {
            panic!("{target} fails with {:?}; put it under fuzz/seeds/{target}", input.escape_ascii().to_string());
        }
    }
}

macro_rules! targets {
    ($($name:ident),*) => {
        $(#[test]
        fn $name() {
            run(stringify!($name), targets::$name);
        })*
    };
}

targets!(jsonl_line, upload, page_token, resume_cursor, webhook_url, canonical_json, multipart, sse);
