//! Each test that `docs/reliability.md` names exists.

use std::{
    fs,
    path::{Path, PathBuf},
};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// What stands in backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The text of a source, or of all sources below a folder.
fn text(of: &Path) -> String {
    if !of.is_dir() {
        return fs::read_to_string(of).unwrap_or_default();
    }
    fs::read_dir(of).unwrap().map(|entry| text(&entry.unwrap().path())).collect()
}

/// Whether a source has a test, or a module of tests, of this name. A macro may make tests of a list of names: `tests!(a, b)`.
fn has(text: &str, name: &str) -> bool {
    let is_part = |letter: char| letter.is_alphanumeric() || letter == '_';
    let ends = |rest: &str| !rest.starts_with(is_part);
    let declared = ["fn", "mod"]
        .iter()
        .any(|word| text.match_indices(&format!("{word} {name}")).any(|(at, found)| ends(&text[at + found.len()..])));
    let lists =
        text.lines().filter_map(|line| line.split_once("!(")).filter(|(macro_name, _)| !macro_name.contains(' '));
    declared || lists.map(|(_, list)| list).any(|list| list.split([',', ')']).any(|one| one.trim() == name))
}

#[test]
fn the_tests_of_the_fault_matrix_exist() {
    let matrix = fs::read_to_string(root().join("docs/reliability.md")).unwrap();
    let (mut checked, mut missing) = (0, Vec::new());
    for (number, line) in (1..).zip(matrix.lines()).filter(|(_, line)| line.starts_with('|')) {
        // A cell that begins with a path names tests: a path, then tests in it, then maybe another path.
        for cell in line.split(" | ").map(str::trim_start) {
            if !cell.starts_with("`tests/") && !cell.starts_with("`src/") {
                continue;
            }
            let mut source = (String::new(), String::new());
            for word in quoted(cell) {
                let name = word.rsplit("::").next().unwrap();
                if word.contains('/') {
                    source = (word.to_owned(), text(&root().join(word)));
                    if source.1.is_empty() {
                        missing.push(format!("line {number}: {word}"));
                    }
                } else if name.chars().all(|letter| letter.is_ascii_lowercase() || letter == '_' || letter.is_numeric())
                {
                    checked += 1;
                    if !has(&source.1, name) {
                        missing.push(format!("line {number}: {} {word}", source.0));
                    }
                }
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
    assert!(checked > 250, "only {checked} names were found");
}

#[test]
fn a_test_is_found_by_its_whole_name() {
    assert!(has("async fn a_b() {}", "a_b") && !has("async fn a_bc() {}", "a_b") && !has("let a_b = 1;", "a_b"));
    assert!(has("tests!(a, b);", "b") && !has("tests!(a, bc);", "b") && !has("    assert!(a, b);", "b"));
}
