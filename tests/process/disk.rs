//! A disk whose power can be cut: what was not fsynced may be gone. `kill -9` does not show that, since the kernel keeps
//! what a process has written. `disk.c` does, from within the server: it keeps what was fsynced beside the real files.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};

use rand::{RngExt, rngs::StdRng};
use tempfile::TempDir;

/// What a disk writes at once, or not at all.
const PAGE: usize = 4096;

/// What the disk below a server's data directory has for certain.
pub struct Disk {
    /// See `disk.c`.
    kept: TempDir,
    library: PathBuf,
    /// What it says it has written, and has not.
    ignores: Option<&'static str>,
}

/// What each inode is now.
type Now = HashMap<u64, PathBuf>;

impl Disk {
    /// An empty one for this folder. `ignores`: `files` or `folders`, whose syncs it only pretends.
    pub fn new(folder: &Path, ignores: Option<&'static str>) -> Self {
        let kept = tempfile::tempdir_in(folder.parent().unwrap()).unwrap();
        let library = kept.path().join("disk.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/process/disk.c");
        // Whoever builds tidemill has a C compiler: SQLite is C.
        let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
        let mut compile = Command::new(&compiler);
        compile.args(["-O1", "-shared", "-fPIC", "-o"]).arg(&library).args([source, "-ldl"]);
        assert!(compile.status().unwrap_or_else(|error| panic!("{compiler}: {error}")).success());
        let disk = Self { kept, library, ignores };
        disk.write_back(folder);
        disk
    }

    /// What the server's process needs.
    pub fn environment(&self) -> Vec<(String, String)> {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let mut all =
            vec![("LD_PRELOAD".into(), text(&self.library)), ("TIDEMILL_TEST_DISK".into(), text(self.kept.path()))];
        all.extend(self.ignores.map(|what| ("TIDEMILL_TEST_DISK_IGNORES".into(), what.into())));
        all
    }

    /// Cuts the power of a folder whose server was killed. What was not synced is there after it with this chance, each name
    /// and each page for itself. Afterwards comes [`Disk::write_back`].
    pub fn cut(&self, folder: &Path, chance: f64, random: &mut StdRng) {
        let mut now = Now::from([(inode(folder), folder.to_owned())]);
        walk(folder, &mut |path, inode| drop(now.insert(inode, path.to_owned())));
        let left = tempfile::tempdir_in(folder.parent().unwrap()).unwrap();
        self.rebuild(inode(folder), left.path(), &now, chance, random);
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
        }
        for entry in fs::read_dir(left.path()).unwrap() {
            let entry = entry.unwrap();
            fs::rename(entry.path(), folder.join(entry.file_name())).unwrap();
        }
    }

    fn rebuild(&self, of: u64, into: &Path, now: &Now, chance: f64, random: &mut StdRng) {
        let kept = self.names(of);
        let mut names: BTreeMap<String, u64> = BTreeMap::new();
        let mut current = BTreeMap::new();
        if let Some(path) = now.get(&of) {
            for entry in fs::read_dir(path).unwrap() {
                let entry = entry.unwrap();
                current.insert(entry.file_name().into_string().unwrap(), inode(&entry.path()));
            }
        }
        let all: BTreeSet<&String> = kept.keys().chain(current.keys()).collect();
        for name in all {
            let (old, new) = (kept.get(name), current.get(name));
            let inode = if old != new && random.random_bool(chance) { new } else { old };
            names.extend(inode.map(|inode| (name.clone(), *inode)));
        }
        for (name, inode) in names {
            let path = into.join(name);
            let is_folder = match now.get(&inode) {
                Some(now) => now.is_dir(),
                None => self.kept.path().join(format!("d{inode}")).exists(),
            };
            if is_folder {
                fs::create_dir(&path).unwrap();
                self.rebuild(inode, &path, now, chance, random);
            } else {
                fs::write(path, self.content(inode, now, chance, random)).unwrap();
            }
        }
    }

    fn names(&self, inode: u64) -> BTreeMap<String, u64> {
        let text = fs::read_to_string(self.kept.path().join(format!("d{inode}"))).unwrap_or_default();
        text.lines()
            .map(|line| {
                let (inode, name) = line.split_once(' ').unwrap();
                (name.to_owned(), inode.parse().unwrap())
            })
            .collect()
    }

    fn content(&self, inode: u64, now: &Now, chance: f64, random: &mut StdRng) -> Vec<u8> {
        // Never synced: a name without bytes.
        let old = fs::read(self.kept.path().join(format!("f{inode}"))).unwrap_or_default();
        let Some(path) = now.get(&inode) else { return old };
        let new = fs::read(path).unwrap();
        let mut content = vec![0; if random.random_bool(chance) { new.len() } else { old.len() }];
        for (page, bytes) in content.chunks_mut(PAGE).enumerate() {
            let from = if random.random_bool(chance) { &new } else { &old };
            let start = (page * PAGE).min(from.len());
            let end = (start + bytes.len()).min(from.len());
            bytes[..end - start].copy_from_slice(&from[start..end]);
        }
        content
    }

    /// All that is there now is on the disk.
    pub fn write_back(&self, folder: &Path) {
        for entry in fs::read_dir(self.kept.path()).unwrap() {
            let path = entry.unwrap().path();
            if path != self.library {
                fs::remove_file(path).unwrap();
            }
        }
        let write = |kind: char, inode: u64, content: &[u8]| {
            fs::write(self.kept.path().join(format!("{kind}{inode}")), content).unwrap();
        };
        let mut folders = vec![folder.to_owned()];
        walk(folder, &mut |path, inode| {
            if path.is_dir() {
                folders.push(path.to_owned());
            } else {
                write('f', inode, &fs::read(path).unwrap());
            }
        });
        for folder in folders {
            let mut names = String::new();
            for entry in fs::read_dir(&folder).unwrap() {
                let entry = entry.unwrap();
                names.push_str(&format!("{} {}\n", inode(&entry.path()), entry.file_name().to_str().unwrap()));
            }
            write('d', inode(&folder), names.as_bytes());
        }
    }
}

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

/// Everything below a folder.
fn walk(folder: &Path, visit: &mut impl FnMut(&Path, u64)) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        visit(&path, inode(&path));
        if path.is_dir() {
            walk(&path, visit);
        }
    }
}
