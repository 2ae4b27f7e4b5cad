//! Where things are: which room may know which, read from the sources. A room knows only the rooms below it, so that a
//! change is felt above it and nowhere else.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "house/cycles.rs"]
mod cycles;
#[path = "house/matrix.rs"]
mod matrix;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// The rooms of `src/`, from the top down, as `docs/design.md` has them. Each may use those on lines below its own, and of
/// its own line only itself.
const ROOMS: &[&[&str]] = &[
    &["main"],
    &["cli"],
    &["app"],
    &["api"],
    &["service"],
    &["access"],
    &["upkeep"],
    &["progress"],
    &["scheduler"],
    &["engines"],
    &["delivery", "fleet", "ingest", "sim"],
    &["objects"],
    &["results"],
    &["store"],
    &["blobs"],
    &["fault"],
    &["telemetry"],
    &["config"],
    &["https", "supervise"],
    &["words"],
    &["ambient"],
    &["domain"],
];
/// Arrows that point up all the same, each with what would have to move.
const KNOWN: &[(&str, &str)] = &[
    // The retry schedule is checked where the other settings are.
    ("config", "delivery"),
];

/// Every source of a room, without its comments and its tests.
fn sources() -> Vec<(String, PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut found) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.file_name().unwrap().to_str().unwrap();
            if !name.ends_with(".rs") || name == "tests.rs" {
                continue;
            }
            let inside = path.strip_prefix(&root).unwrap();
            let room = inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
            let text = fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
            let code = code.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n");
            found.push((room, inside.to_owned(), code));
        }
    }
    assert!(found.len() > 150, "only {} sources", found.len());
    found
}

/// The first names of paths that begin with `crate::`, those in braces too.
fn used(code: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        let word = |text: &str| -> String {
            text.trim_start().chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect()
        };
        let Some(list) = rest.strip_prefix('{') else {
            names.insert(word(rest));
            continue;
        };
        let (mut depth, mut item) = (0, String::new());
        for letter in list.chars() {
            match letter {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    names.insert(word(&item));
                    item.clear();
                    continue;
                }
                _ => {}
            }
            item.push(letter);
        }
        names.insert(word(&item));
    }
    names.remove("");
    names
}

#[test]
fn no_room_knows_one_above_it() {
    let floor: BTreeMap<&str, usize> =
        (0..).zip(ROOMS).flat_map(|(floor, rooms)| rooms.iter().map(move |room| (*room, floor))).collect();
    let (mut wrong, mut known) = (BTreeSet::new(), BTreeSet::new());
    for (room, path, code) in sources() {
        if room == "lib" {
            continue;
        }
        let Some(own) = floor.get(room.as_str()) else { panic!("{room} has no place in ROOMS") };
        // Names that are no rooms are macros and generated code.
        for other in used(&code) {
            let Some(theirs) = floor.get(other.as_str()) else { continue };
            if other == room || theirs > own {
                continue;
            }
            match KNOWN.iter().find(|(from, to)| (*from, *to) == (room.as_str(), other.as_str())) {
                Some(arrow) => drop(known.insert(*arrow)),
                None => drop(wrong.insert(format!("{} uses {other}", path.display()))),
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(known.len(), KNOWN.len(), "an arrow of KNOWN has gone: take it out");
}

/// Whether a word stands in code as a name of its own.
fn names(code: &str, word: &str) -> bool {
    let is_part = |letter: char| letter.is_alphanumeric() || letter == '_';
    code.match_indices(word).any(|(at, _)| {
        !code[..at].chars().next_back().is_some_and(is_part)
            && (word.ends_with("::") || !code[at + word.len()..].chars().next().is_some_and(is_part))
    })
}

/// The files outside `where_allowed` that name one of the words.
fn elsewhere(words: &[&str], where_allowed: impl Fn(&str, &str) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for (room, path, code) in sources() {
        let path = path.to_str().unwrap();
        if where_allowed(&room, path) {
            continue;
        }
        found.extend(words.iter().filter(|word| names(&code, word)).map(|word| format!("{path} names {word}")));
    }
    found
}

#[test]
fn grpc_is_known_to_its_door_and_its_client_only() {
    let wire = ["tonic", "tonic_types", "prost", "prost_types", "pb"];
    // `lib.rs` holds the generated code. The server's errors name the reflection's, and its health is gRPC's.
    let found = elsewhere(&wire, |room, path| {
        matches!(room, "cli" | "lib") || path.starts_with("api/grpc/") || path == "api/server.rs"
    });
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn http_is_known_to_the_doors_and_clients_only() {
    let found = elsewhere(&["axum"], |room, _| matches!(room, "api" | "sim" | "cli"));
    assert!(found.is_empty(), "{found:#?}");
    let found = elsewhere(&["http::", "hyper"], |room, _| !matches!(room, "service" | "access" | "domain" | "store"));
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn sql_is_the_stores() {
    let found = elsewhere(&["sea_orm"], |room, _| room == "store");
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn the_domain_knows_no_io() {
    // Addresses of std::net are not IO.
    let io = ["tokio", "std::fs", "TcpStream", "TcpListener", "UdpSocket", "ToSocketAddrs"];
    let found = elsewhere(&io, |room, _| room != "domain");
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn the_domain_reads_no_clock_and_draws_no_lots() {
    // `std::time::Instant` as an argument is fine.
    let found = elsewhere(
        &["SystemTime", "Instant::now", "Timestamp::now", "generate", "rand", "uuid", "Uuid", "getrandom", "OsRng"],
        |room, _| room != "domain",
    );
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn the_reader_of_sources_sees_what_is_there() {
    let code = "use crate::{\n    a::{B, c::D},\n    e,\n    f as g,\n};\nlet x = crate::h::I; crate::{j}";
    assert_eq!(used(code).iter().map(String::as_str).collect::<Vec<_>>(), ["a", "e", "f", "h", "j"]);
    assert!(
        names("http::HeaderMap", "http::") && names("http::{HeaderMap}", "http::") && !names("my_http::X", "http::")
    );
    assert!(names("use tonic::Status;", "Status") && !names("StatusCode", "Status") && !names("my_pb::x", "pb"));
}
