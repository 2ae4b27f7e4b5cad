//! Writes results to a file or stdout: whole files, resumed by offset, or lines as they become durable, resumed by
//! cursor.

use std::{
    fs,
    io::{self, BufWriter, IsTerminal as _, Write},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use futures::FutureExt;
use tonic::Status;

use super::{
    client::{Client, patiently, retry},
    error, json, meter,
    printable::Escaping,
};
use crate::{api::LONGEST_MESSAGE, pb};

/// Times that a download is resumed without progress before it fails.
const TRIES: u32 = 8;
/// A wait between two results that is not reported.
const USUAL: Duration = Duration::from_secs(30);
/// Bytes collected per write; most result lines are shorter.
const BUFFER: usize = 128 * 1024;

/// A destination for results. A file gets its name when it is complete; until then, and after a failure, the old file
/// stays.
pub struct Output {
    to: BufWriter<Box<dyn Write + Send>>,
    /// The final name, and the temporary name until the file is complete.
    rename: Option<(PathBuf, PathBuf)>,
}

impl Output {
    /// A file, or stdout.
    ///
    /// # Errors
    /// The file can't be made.
    pub fn open(path: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = path else {
            let stdout = io::stdout();
            let to: Box<dyn Write + Send> =
                if stdout.is_terminal() { Box::new(Escaping::new(stdout)) } else { Box::new(stdout) };
            return Ok(Self { to: BufWriter::with_capacity(BUFFER, to), rename: None });
        };
        // Pipes and devices are written to directly.
        let special = fs::metadata(path).is_ok_and(|metadata| !metadata.is_file());
        let part = part_of(path);
        let (open, rename) =
            if special { (path, None) } else { (part.as_path(), Some((part.clone(), path.to_owned()))) };
        let file = match special {
            true => fs::OpenOptions::new().write(true).open(open),
            false => fs::File::create(open),
        };
        let file = file.with_context(|| path.display().to_string())?;
        Ok(Self { to: BufWriter::with_capacity(BUFFER, Box::new(file)), rename })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }

    /// Completes the output.
    ///
    /// # Errors
    /// It can't be written.
    pub fn finish(mut self) -> io::Result<()> {
        self.to.flush()?;
        match self.rename.take() {
            Some((part, whole)) => fs::rename(part, whole),
            None => Ok(()),
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Some((part, _)) = self.rename.take() {
            // Removes what a failed download left; if that fails, nothing is lost.
            let _ = fs::remove_file(part);
        }
    }
}

/// Refuses to write two outputs to one file: the second would replace the first.
///
/// # Errors
/// They name the same file, however it is spelled.
pub fn ensure_different(output: &Path, errors: &Path) -> anyhow::Result<()> {
    ensure!(
        !is_same_file(output, errors),
        "--output and --errors name the same file, {}; name two different files",
        errors.display()
    );
    Ok(())
}

/// Whether two paths lead to one file, by links or spelling, or whether one is the temporary name of the other.
fn is_same_file(one: &Path, other: &Path) -> bool {
    // A device or a pipe accepts both.
    let file = |path: &Path| fs::metadata(path).ok();
    if let (Some(one), Some(other)) = (file(one), file(other)) {
        let regular = one.is_file() && other.is_file();
        return regular && (one.dev(), one.ino()) == (other.dev(), other.ino());
    }
    let (one, other) = (resolved(one), resolved(other));
    one == other || part_of(&one) == other || one == part_of(&other)
}

/// A path with links and `..` resolved, also for a file that does not exist yet.
fn resolved(path: &Path) -> PathBuf {
    /// More links than any system follows.
    const LINKS: usize = 40;
    let mut path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for _ in 0..LINKS {
        if let Ok(whole) = fs::canonicalize(&path) {
            return whole;
        }
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return path };
        let folder = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
        match fs::read_link(&path) {
            Ok(target) => path = folder.join(target),
            Err(_) => return folder.join(name),
        }
    }
    path
}

/// The temporary name of a file until it is complete.
fn part_of(path: &Path) -> PathBuf {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    part.into()
}

/// Downloads a whole file, resuming after lost connections.
///
/// # Errors
/// There is no such file, the server stays away, or `output` can't be written.
pub async fn download(client: &Client, file_id: &str, mut output: Output) -> anyhow::Result<()> {
    let request = pb::GetFileRequest { file_id: file_id.to_owned() };
    let file = retry(|| async { client.batches().get_file(request.clone()).await }).await?;
    let bar = meter::bytes("downloading", u64::try_from(file.bytes).unwrap_or(0), client.json);
    let (mut offset, mut attempt) = (0, 0);
    loop {
        let before = offset;
        let status = match piece(client, file_id, &mut offset, &mut output, &bar).await? {
            Ok(()) if offset == file.bytes => break,
            Ok(()) => Status::unavailable(format!("the download ended early, at byte {offset} of {}", file.bytes)),
            Err(status) => status,
        };
        attempt = if offset > before { 1 } else { attempt + 1 };
        if attempt >= TRIES || !error::is_transient(&status) {
            return Err(status).with_context(|| format!("download of {file_id}"));
        }
        bar.suspend(|| say_away(&status, attempt));
        tokio::time::sleep(error::delay(&status, attempt, rand::random())).await;
    }
    bar.finish_and_clear();
    output.finish().context("writing the file")
}

/// Reads one stream of the file from `offset`, which it advances. The outer error means that `output` can't be written.
async fn piece(
    client: &Client,
    file_id: &str,
    offset: &mut i64,
    output: &mut Output,
    bar: &indicatif::ProgressBar,
) -> anyhow::Result<Result<(), Status>> {
    let request = pb::DownloadFileRequest { file_id: file_id.to_owned(), offset: *offset };
    let mut chunks = match client.batches().download_file(request).await {
        Ok(response) => response.into_inner(),
        Err(status) => return Ok(Err(status)),
    };
    loop {
        let chunk = match chunks.message().await {
            Ok(Some(chunk)) => chunk,
            Ok(None) => return Ok(Ok(())),
            Err(status) => return Ok(Err(status)),
        };
        if chunk.offset != *offset {
            bail!("the server sent byte {} where {offset} was next", chunk.offset);
        }
        output.write(&chunk.data).context("writing the file")?;
        *offset += i64::try_from(chunk.data.len())?;
        bar.set_position(u64::try_from(*offset)?);
    }
}

/// Destinations of streamed results.
pub struct Sinks {
    /// The lines that succeeded.
    pub output: Output,
    /// The failed lines. `None`: they are only counted.
    pub errors: Option<Output>,
    /// Whether to write every result, failed ones too, as a JSON object to `output`.
    pub json: bool,
    /// The number of failed lines so far.
    pub failed: u64,
}

impl Sinks {
    fn take(&mut self, result: &pb::BatchResult) -> io::Result<()> {
        self.failed += u64::from(!result.succeeded);
        if self.json {
            return self.output.write(format!("{}\n", json::of(result)).as_bytes());
        }
        let sink = if result.succeeded { Some(&mut self.output) } else { self.errors.as_mut() };
        match sink {
            Some(sink) => {
                sink.write(&result.line)?;
                sink.write(b"\n")
            }
            None => Ok(()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()?;
        self.errors.as_mut().map_or(Ok(()), Output::flush)
    }
}

/// Writes results as they become durable, until the batch ends. After a lost connection it resumes after the last line,
/// however long the server is unreachable.
///
/// # Errors
/// There is no such batch, or a sink can't be written.
pub async fn stream(client: &Client, batch_id: &str, sinks: &mut Sinks) -> anyhow::Result<()> {
    let (mut cursor, mut attempt) = (String::new(), 0);
    loop {
        let before = cursor.clone();
        let Err(status) = lines(client, batch_id, &mut cursor, sinks).await? else { return Ok(()) };
        attempt = if cursor == before { attempt + 1 } else { 1 };
        if !error::is_transient(&status) || (cursor.is_empty() && attempt >= TRIES) {
            return Err(status.into());
        }
        say_away(&status, attempt);
        tokio::time::sleep(error::delay(&status, attempt, rand::random())).await;
    }
}

/// Reports a lost connection once, and not a short loss.
fn say_away(status: &Status, attempt: u32) {
    if attempt == 2 {
        meter::note(&format!("the server can't be reached ({}), trying again", error::brief(status)));
    }
}

fn quiet(batch_id: &str, waited: Duration) -> String {
    format!(
        "no result for {} s: `tidemill batch get {batch_id}` says what the batch waits for; Ctrl-C leaves it running",
        waited.as_secs()
    )
}

/// Reads one stream of results from `cursor`, which it advances.
async fn lines(
    client: &Client,
    batch_id: &str,
    cursor: &mut String,
    sinks: &mut Sinks,
) -> anyhow::Result<Result<(), Status>> {
    let request = pb::StreamResultsRequest {
        batch_id: batch_id.to_owned(),
        cursor: cursor.clone(),
        follow: true,
        max_message_bytes: i64::try_from(LONGEST_MESSAGE)?,
    };
    let mut results = match client.batches().stream_results(request).await {
        Ok(response) => response.into_inner(),
        Err(status) => return Ok(Err(status)),
    };
    loop {
        // Flushed before waiting for more, but not after every line.
        let next = match results.message().now_or_never() {
            Some(next) => next,
            None => {
                sinks.flush()?;
                patiently(results.message(), |waited| {
                    // Between two lines of a slow model a shorter wait is usual.
                    if cursor.is_empty() || waited > USUAL {
                        meter::note(&quiet(batch_id, waited));
                    }
                })
                .await
            }
        };
        match next {
            Ok(Some(result)) => {
                sinks.take(&result)?;
                *cursor = result.cursor;
            }
            Ok(None) => {
                sinks.flush()?;
                return Ok(Ok(()));
            }
            Err(status) => return Ok(Err(status)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::fake::*, *};

    #[tokio::test]
    async fn a_download_resumes_where_the_connection_was_cut() {
        let data: Vec<u8> = (0..2_000_000u32).map(|i| (i % 251) as u8).collect();
        let (fake, url) = Fake::start(data.clone()).await;
        let url = cut_after(&url, 700_000).await;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        download(&client(&url), "file-1", Output::open(Some(&path)).unwrap()).await.unwrap();
        assert_eq!(fs::read(&path).unwrap(), data);
        let offsets = fake.log().downloads.clone();
        assert!(offsets[0] == 0 && offsets[1..].iter().all(|offset| *offset > 300_000), "{offsets:?}");
        assert!(offsets.len() >= 2, "{offsets:?}");
    }

    #[tokio::test]
    async fn a_stream_resumes_behind_the_last_line() {
        let (fake, url) = Fake::start("{\"n\":1}\n{\"n\":2}\n{\"n\":3}\n{\"n\":4}\n{\"n\":5}\n").await;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let output = Output::open(Some(&path)).unwrap();
        let mut sinks = Sinks { output, errors: None, json: false, failed: 0 };
        stream(&client(&url), "batch_1", &mut sinks).await.unwrap();
        sinks.output.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), fake.data);
        assert_eq!(fake.log().cursors, ["", "2", "4"]);
    }

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.jsonl");
        fs::write(&path, "old").unwrap();
        let mut failed = Output::open(Some(&path)).unwrap();
        failed.write(b"half").unwrap();
        drop(failed);
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        let mut output = Output::open(Some(&path)).unwrap();
        output.write(b"new").unwrap();
        output.finish().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
        assert!(Output::open(Some(&folder.path().join("no/such"))).is_err());
    }

    #[test]
    fn one_file_for_two_outputs_is_refused_however_it_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("there"), "").unwrap();
        fs::create_dir(at("sub")).unwrap();
        std::os::unix::fs::symlink("there", at("link")).unwrap();
        std::os::unix::fs::symlink("new", at("dangling")).unwrap();
        std::os::unix::fs::symlink("dangling", at("sub/../chain")).unwrap();
        std::os::unix::fs::symlink(".", at("here")).unwrap();
        fs::hard_link(at("there"), at("hard")).unwrap();
        for (one, other) in [
            ("there", "there"),
            ("there", "sub/../there"),
            ("there", "./there"),
            ("there", "link"),
            ("there", "hard"),
            ("here/there", "there"),
            ("new", "new"),
            ("new", "sub/../new"),
            ("new", "here/new"),
            ("new", "dangling"),
            ("new", "chain"),
            ("new", "new.part"),
            ("there", "there.part"),
        ] {
            for (one, other) in [(one, other), (other, one)] {
                let error = ensure_different(&at(one), &at(other)).unwrap_err().to_string();
                assert!(error.starts_with("--output and --errors name the same file"), "{one} {other}: {error}");
            }
        }
        for (one, other) in [("there", "new"), ("new", "sub/new"), ("no/such", "new"), ("link", "dangling")] {
            assert!(ensure_different(&at(one), &at(other)).is_ok(), "{one} {other}");
        }
        assert!(ensure_different(Path::new("/dev/null"), Path::new("/dev/null")).is_ok(), "a device takes both");
        assert!(ensure_different(Path::new("x"), &std::env::current_dir().unwrap().join("x")).is_err());
    }

    #[test]
    fn a_device_is_written_to() {
        let mut output = Output::open(Some(Path::new("/dev/null"))).unwrap();
        output.write(b"x").unwrap();
        output.finish().unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }

    #[test]
    fn lines_go_where_they_belong() {
        let folder = tempfile::tempdir().unwrap();
        let (good, bad) = (folder.path().join("good"), folder.path().join("bad"));
        let open = |path: &Path| Output::open(Some(path)).unwrap();
        let mut sinks = Sinks { output: open(&good), errors: Some(open(&bad)), json: false, failed: 0 };
        let result =
            |succeeded, line: &'static str| pb::BatchResult { succeeded, line: line.into(), ..Default::default() };
        for result in [result(true, "{\"a\":1}"), result(false, "{\"b\":2}"), result(true, "{\"c\":3}")] {
            sinks.take(&result).unwrap();
        }
        let Sinks { output, errors, failed, .. } = sinks;
        output.finish().unwrap();
        errors.unwrap().finish().unwrap();
        assert_eq!(fs::read_to_string(good).unwrap(), "{\"a\":1}\n{\"c\":3}\n");
        assert_eq!(fs::read_to_string(bad).unwrap(), "{\"b\":2}\n");
        assert_eq!(failed, 1);
    }
}
