//! `tidemill files …`

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{
    client::{Client, retry},
    json,
    meter::note,
    out,
    results::{self, Output},
    upload::Upload,
};
use crate::pb;

/// Commands for files.
#[derive(Debug, Subcommand)]
pub enum FilesCommand {
    /// Upload a JSONL file of requests. Prints the file's id.
    #[command(
        after_help = "Example:\n  id=$(tidemill files upload requests.jsonl) && tidemill batch submit $id --watch"
    )]
    Upload(UploadArgs),
    /// List files, newest first.
    List(ListArgs),
    /// Show a file.
    Get(Id),
    /// Download a file.
    Download(DownloadArgs),
    /// Delete a file. Fails while an unfinished batch reads it.
    Delete(Id),
}

/// Selects a file.
#[derive(Debug, Args)]
pub struct Id {
    /// The file's id: file-…
    #[arg(value_name = "FILE_ID")]
    id: String,
}

/// Arguments of `files upload`.
#[derive(Debug, Args)]
pub struct UploadArgs {
    /// JSONL file of requests; "-" for stdin.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The file's name on the server. Default: its local name.
    #[arg(long, value_name = "NAME")]
    filename: Option<String>,
    /// Makes the upload safe to repeat: the same id returns the same file.
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    /// Delete the file this long after the upload, 1h to 30d [default: never].
    #[arg(long, value_name = "SPAN", value_parser = super::submit::expiry)]
    expires_after: Option<std::time::Duration>,
}

/// Filters for `files list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Only files with this purpose: batch for uploads, batch_output for results.
    #[arg(long, default_value = "", hide_default_value = true)]
    purpose: String,
    /// The most files to list.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
}

/// Arguments of `files download`.
#[derive(Debug, Args)]
pub struct DownloadArgs {
    /// The file's id: file-…
    #[arg(value_name = "FILE_ID")]
    id: String,
    /// File to write to. Default: stdout.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Runs a command.
///
/// # Errors
/// What went wrong, for people.
pub async fn run(command: FilesCommand, client: &Client) -> anyhow::Result<()> {
    match command {
        FilesCommand::Upload(args) => {
            let file = Upload::open(&args.file)
                .await?
                .named(args.filename)
                .expiring(args.expires_after)
                .send(client, args.request_id)
                .await?;
            if client.json {
                out::line(json::of(&file))?;
            } else {
                out::line(&file.id)?;
                note(&format!("{} requests, {} bytes", file.line_count, file.bytes));
            }
        }
        FilesCommand::List(args) => list(args, client).await?,
        FilesCommand::Get(Id { id }) => {
            let request = pb::GetFileRequest { file_id: id };
            let file = retry(|| async { client.batches().get_file(request.clone()).await }).await?;
            if client.json {
                out::line(json::of(&file))?;
            } else {
                out::line(out::file(&file))?;
            }
        }
        FilesCommand::Download(args) => {
            results::download(client, &args.id, Output::open(args.output.as_deref())?).await?;
        }
        FilesCommand::Delete(Id { id }) => {
            // Not repeated, because after a lost answer the second call would not find the file.
            client.batches().delete_file(pb::DeleteFileRequest { file_id: id }).await?;
        }
    }
    Ok(())
}

async fn list(args: ListArgs, client: &Client) -> anyhow::Result<()> {
    let mut request = pb::ListFilesRequest { page_size: 0, page_token: String::new(), purpose: args.purpose };
    let (mut left, mut rows) = (args.limit, Vec::new());
    while left > 0 {
        request.page_size = i32::try_from(left.min(1_000))?;
        let page = retry(|| async { client.batches().list_files(request.clone()).await }).await?;
        left = left.saturating_sub(u32::try_from(page.files.len())?);
        for file in &page.files {
            if client.json {
                out::line(json::of(file))?;
            } else {
                rows.push(row(file));
            }
        }
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    if !client.json {
        out::table(["FILE", "PURPOSE", "LINES", "BYTES", "CREATED", "NAME"], &rows)?;
    }
    Ok(())
}

fn row(file: &pb::File) -> [String; 6] {
    [
        file.id.clone(),
        file.purpose.clone(),
        file.line_count.to_string(),
        file.bytes.to_string(),
        json::time(file.create_time.as_ref()).unwrap_or_default(),
        file.filename.clone(),
    ]
}
