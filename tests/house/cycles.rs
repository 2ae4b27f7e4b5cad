//! No two files of a room import each other, directly or through others.
//!
//! A folder's own file (`mod.rs`, or `board.rs` beside `board/`) is left out: it is the face of the files below it, so it
//! names them, and they may name what it defines. What it only passes on counts as an import of the file that defines it.

use std::collections::{BTreeMap, BTreeSet};

use crate::sources;

type Path = Vec<String>;

/// An import: the path as written, and the name by which the file knows it.
#[derive(Debug, PartialEq, Eq)]
struct Import {
    path: Path,
    name: String,
    /// Whether it is a `use`, which others may import in turn.
    is_use: bool,
}

fn segments(text: &str) -> Path {
    text.split("::").map(str::trim).filter(|segment| !segment.is_empty()).map(str::to_owned).collect()
}

/// Adds the paths of a tree such as `a::{b, c::{self, d as e}}`.
fn spread(before: &[String], tree: &str, all: &mut Vec<Import>) {
    let tree = tree.trim();
    let mut path = before.to_vec();
    let Some((head, list)) = tree.split_once('{') else {
        let (text, name) = tree.split_once(" as ").map_or((tree, None), |(text, name)| (text, Some(name.trim())));
        path.extend(segments(text));
        if path.len() > 1 && path.last().is_some_and(|last| last == "self") {
            path.pop();
        }
        if let Some(last) = path.last() {
            let name = name.unwrap_or(last).to_owned();
            all.push(Import { path, name, is_use: true });
        }
        return;
    };
    path.extend(segments(head));
    let list = &list[..list.rfind('}').unwrap_or(list.len())];
    let (mut depth, mut from) = (0, 0);
    for (at, letter) in list.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                spread(&path, &list[from..at], all);
                from = at + 1;
            }
            _ => {}
        }
    }
    spread(&path, &list[from..], all);
}

/// What a file imports: its `use`s, and paths in its code that begin with `crate`, `super` or the name of a file below it.
fn imports(code: &str, below: &BTreeSet<String>) -> Vec<Import> {
    let mut all = Vec::new();
    let mut rest = String::new();
    let mut statement: Option<String> = None;
    for line in code.lines() {
        let begins = {
            let line = line.trim_start();
            let line = line.strip_prefix("pub").map_or(line, |line| match line.strip_prefix('(') {
                Some(line) => line.split_once(')').map_or(line, |(_, line)| line),
                None => line,
            });
            line.trim_start().strip_prefix("use ").map(str::to_owned)
        };
        let text = match (&mut statement, begins) {
            (Some(text), _) => {
                text.push_str(line);
                text.clone()
            }
            (None, Some(text)) => text,
            (None, None) => {
                rest.push_str(line);
                rest.push('\n');
                continue;
            }
        };
        match text.split_once(';') {
            Some((tree, _)) => {
                spread(&[], tree, &mut all);
                statement = None;
            }
            None => statement = Some(text),
        }
    }
    let is_part = |letter: char| letter.is_alphanumeric() || letter == '_' || letter == ':';
    for word in rest.split(|letter| !is_part(letter)) {
        let path = segments(word);
        if path.len() > 1 && !word.starts_with(':') {
            let first = path[0].as_str();
            if matches!(first, "crate" | "super") || below.contains(first) {
                let name = path[path.len() - 1].clone();
                all.push(Import { path, name, is_use: false });
            }
        }
    }
    all
}

struct House {
    /// The imports of each file.
    files: BTreeMap<Path, Vec<Import>>,
}

impl House {
    fn of(sources: &[(Path, String)]) -> Self {
        let names: BTreeSet<&Path> = sources.iter().map(|(file, _)| file).collect();
        let below = |file: &Path| -> BTreeSet<String> {
            let is_below = |other: &&&Path| other.len() == file.len() + 1 && other.starts_with(file);
            names.iter().filter(is_below).map(|other| other[file.len()].clone()).collect()
        };
        let files = sources.iter().map(|(file, code)| (file.clone(), imports(code, &below(file)))).collect();
        Self { files }
    }

    /// A path from the root of the crate. None: it leads out of the crate.
    fn absolute(&self, file: &Path, path: &Path) -> Option<Path> {
        let ups = path.iter().take_while(|segment| *segment == "super").count();
        match path[0].as_str() {
            "crate" => Some(path[1..].to_vec()),
            "self" => Some([file, &path[1..]].concat()),
            "super" => Some([&file[..file.len().checked_sub(ups)?], &path[ups..]].concat()),
            first => {
                let inside = [file.as_slice(), &[first.to_owned()]].concat();
                self.files.contains_key(&inside).then(|| [file, path.as_slice()].concat())
            }
        }
    }

    /// The file that defines what a path names.
    fn home(&self, path: &Path, depth: u32) -> Option<Path> {
        let file =
            (1..=path.len()).rev().map(|length| path[..length].to_vec()).find(|file| self.files.contains_key(file))?;
        let Some(name) = path.get(file.len()) else { return Some(file) };
        let passed_on = self.files[&file].iter().filter(|import| import.is_use && import.name == *name);
        for import in passed_on.filter(|_| depth > 0) {
            if let Some(there) = self.absolute(&file, &import.path).filter(|there| there != path)
                && let Some(home) = self.home(&there, depth - 1)
            {
                return Some(home);
            }
        }
        Some(file)
    }

    /// The other files of its room that a file imports.
    fn arrows(&self, file: &Path) -> BTreeSet<Path> {
        let homes = self.files[file].iter().filter_map(|import| self.home(&self.absolute(file, &import.path)?, 8));
        homes.filter(|home| home[0] == file[0] && !home.starts_with(file) && !file.starts_with(home)).collect()
    }

    /// The groups of files each of which imports all others of its group, directly or not.
    fn cycles(&self) -> Vec<BTreeSet<Path>> {
        let arrows: BTreeMap<&Path, BTreeSet<Path>> = self.files.keys().map(|file| (file, self.arrows(file))).collect();
        let reach = |from: &Path| {
            let (mut seen, mut next) = (BTreeSet::new(), vec![from.clone()]);
            while let Some(file) = next.pop() {
                next.extend(arrows[&file].iter().filter(|to| seen.insert((*to).clone())).cloned());
            }
            seen
        };
        let reached: BTreeMap<&Path, BTreeSet<Path>> = self.files.keys().map(|file| (file, reach(file))).collect();
        let mut cycles = BTreeSet::new();
        for (file, seen) in &reached {
            if seen.contains(*file) {
                cycles
                    .insert(seen.iter().filter(|to| reached[to].contains(*file)).cloned().collect::<BTreeSet<Path>>());
            }
        }
        cycles.into_iter().collect()
    }
}

fn names(cycle: &BTreeSet<Path>) -> Vec<String> {
    cycle.iter().map(|file| file.join("::")).collect()
}

/// All files, each with its code.
fn files() -> Vec<(Path, String)> {
    let mut all = Vec::new();
    for (_, path, code) in sources() {
        let mut file: Path =
            path.iter().map(|part| part.to_str().unwrap().trim_end_matches(".rs").to_owned()).collect();
        file.pop_if(|last| last == "mod");
        if !matches!(file[0].as_str(), "lib" | "main") {
            all.push((file, code));
        }
    }
    all
}

#[test]
fn no_files_of_a_room_import_each_other() {
    let cycles: Vec<Vec<String>> = House::of(&files()).cycles().iter().map(names).collect();
    assert!(cycles.is_empty(), "these files import each other: {cycles:#?}");
}

/// The protocols of `src/api`. What several of them share is beside them.
const PROTOCOLS: [&str; 3] = ["anthropic", "grpc", "openai"];

#[test]
fn no_protocol_knows_another() {
    let house = House::of(&files());
    let protocol = |file: &Path| {
        let name = (file[0] == "api").then(|| file.get(1)).flatten();
        name.filter(|name| PROTOCOLS.contains(&name.as_str())).cloned()
    };
    let (mut seen, mut wrong) = (0, Vec::new());
    for file in house.files.keys() {
        let Some(own) = protocol(file) else { continue };
        seen += 1;
        let others = house.arrows(file).into_iter().filter(|to| protocol(to).is_some_and(|other| other != own));
        wrong.extend(others.map(|to| format!("{} uses {}", file.join("::"), to.join("::"))));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(seen > 20, "only {seen} files of protocols");
}

#[test]
fn the_finder_of_cycles_finds_them() {
    let cycles = |files: &[(&str, &str)]| -> Vec<Vec<String>> {
        let files: Vec<_> = files.iter().map(|(file, code)| (segments(file), (*code).to_owned())).collect();
        House::of(&files).cycles().iter().map(names).collect()
    };
    let none: Vec<Vec<String>> = Vec::new();
    // Straight, and through a folder's own file that only passes it on.
    assert_eq!(
        cycles(&[("r", ""), ("r::a", "use super::b::X;"), ("r::b", "use super::a::{self, Y};")]),
        [["r::a", "r::b"]]
    );
    let face = "mod a;\nmod b;\npub use a::Y;\npub use b::X as Z;";
    let both =
        [("r", face), ("r::a", "use crate::r::Z;"), ("r::b", "pub(super) use super::{\n    Y,\n    other::W,\n};")];
    assert_eq!(cycles(&both), [["r::a", "r::b"]]);
    // Without a use, and over three.
    let three =
        [("r", ""), ("r::a", "fn f() { super::b::g(); }"), ("r::b", "use super::c;"), ("r::c", "use crate::r::a::f;")];
    assert_eq!(cycles(&three), [["r::a", "r::b", "r::c"]]);
    // What the folder's own file defines all may use, and a file may use those below it.
    assert_eq!(
        cycles(&[("r", "mod a;\nuse a::f;\nstruct X;"), ("r::a", "use super::X;"), ("r::b", "use super::a;")]),
        none
    );
    assert_eq!(cycles(&[("r::a", "use a::Y;"), ("r::a::b", "use super::Z;"), ("r::c", "use super::a::Z;")]), none);
    // Another room's files are not this test's business.
    assert_eq!(cycles(&[("r::a", "use crate::s::b::X;"), ("s::b", "use crate::r::a::Y;")]), none);
}
