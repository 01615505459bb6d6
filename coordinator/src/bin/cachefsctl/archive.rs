//! `load` and `export`: images as tars. `load` also takes the directory of an OCI layout.

use std::ffi::OsStr;
use std::io::{IsTerminal, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::bail;
use bytes::Bytes;
use clap::Args;
use coordinator_api::Client;
use coordinator_api::client::Download;
use coordinator_api::job::JobList;
use futures::{StreamExt, TryStreamExt};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tempfile::NamedTempFile;
use tokio::io::AsyncRead;
use tokio::task::JoinHandle;
use tokio_util::io::ReaderStream;

use crate::interrupt::{Interrupted, Interrupts};
use crate::output::{Output, size, warn};
use crate::progress::follow;
use crate::pull::finish;

/// The arguments of `load`.
#[derive(Args)]
pub(crate) struct Load {
    /// The archive, compressed or not, or the directory of an OCI layout
    file: PathBuf,
    /// Name for an image that has none in the archive
    #[arg(long, value_name = "IMAGE")]
    name: Option<String>,
}

/// The arguments of `export`.
#[derive(Args)]
pub(crate) struct Export {
    /// The image
    image: String,
    /// The archive to write, for its owner alone; a file that is replaced keeps its mode
    file: PathBuf,
}

const BLOCK: usize = 256 << 10;

/// A progress bar on a terminal, a hidden one elsewhere.
fn bar(output: Output, length: Option<u64>, what: &str) -> ProgressBar {
    if output == Output::Json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = length.map_or_else(ProgressBar::no_length, ProgressBar::new);
    let style = ProgressStyle::with_template(
        "{msg} [{bar:30}] {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}",
    );
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
    bar.set_message(what.to_owned());
    bar
}

/// The archive that is sent to the coordinator.
struct Source {
    reader: Box<dyn AsyncRead + Send + Sync + Unpin>,
    length: Option<u64>,
    /// The task that packs a directory while it is sent.
    packing: Option<JoinHandle<std::io::Result<()>>>,
}

impl Source {
    async fn open(path: &Path) -> anyhow::Result<Source> {
        if path == Path::new("-") {
            return Ok(Source { reader: Box::new(tokio::io::stdin()), length: None, packing: None });
        }
        let file = tokio::fs::File::open(path).await;
        let file = file.map_err(|error| anyhow::anyhow!("cannot open {}: {error}", path.display()))?;
        let metadata = file.metadata().await?;
        if metadata.is_dir() {
            Source::packed(path)
        } else {
            Ok(Source { reader: Box::new(file), length: Some(metadata.len()), packing: None })
        }
    }

    /// Packs the directory of an OCI layout into a tar while it is read.
    fn packed(path: &Path) -> anyhow::Result<Source> {
        if !path.join("index.json").is_file() {
            bail!("{} is a directory without index.json, so no OCI layout: give one, or an archive", path.display());
        }
        let (reader, writer) = std::io::pipe()?;
        let path = path.to_owned();
        let packing = tokio::task::spawn_blocking(move || {
            let mut tar = tar::Builder::new(std::io::BufWriter::with_capacity(BLOCK, writer));
            // The coordinator reads members in place, so each must be stored completely.
            tar.sparse(false);
            tar.append_dir_all("", &path)?;
            tar.into_inner()?.flush()
        });
        let reader = tokio::fs::File::from_std(std::fs::File::from(OwnedFd::from(reader)));
        Ok(Source { reader: Box::new(reader), length: None, packing: Some(packing) })
    }
}

/// Sends the archive, then waits for its jobs.
pub(crate) async fn load(client: &Client, output: Output, arguments: Load) -> anyhow::Result<()> {
    let path = &arguments.file;
    let Source { reader, length, packing } = Source::open(path).await?;
    let progress = bar(output, length, "sending");
    let counted = progress.clone();
    let blocks = ReaderStream::with_capacity(reader, BLOCK).inspect_ok(move |block| counted.inc(block.len() as u64));
    let body = BodyExt::boxed(StreamBody::new(blocks.map(|block| block.map(Frame::data))));
    let answer = client.load(arguments.name.as_deref(), body).await;
    progress.finish_and_clear();
    if let Some(packing) = packing {
        // If the coordinator refuses, the pipe closes early, which is not the directory's fault.
        let packed = packing.await?.or_else(|error| match error.kind() {
            std::io::ErrorKind::BrokenPipe => Ok(()),
            _ => Err(error),
        });
        packed.map_err(|error| anyhow::anyhow!("cannot read the OCI layout {}: {error}", path.display()))?;
    }
    let JobList { jobs, left_out, .. } = answer?;
    left_out.iter().for_each(|image| warn(output, image));
    let jobs = follow(client, jobs, output).await?;
    finish(output, jobs)
}

/// Where the export goes: into something that exists and is not a regular file, such as a pipe or standard output, or into a file
/// that gets its name only once it is complete.
enum Sink {
    Through(Box<dyn Write>),
    File { partial: NamedTempFile, path: PathBuf },
}

/// How many bytes of the target's name an unfinished file's name begins with: names have at most 255 bytes.
const NAME_MAX: usize = 200;

/// An unfinished file beside `path` that only its owner may read. It is removed unless it is renamed.
fn partial(path: &Path) -> anyhow::Result<NamedTempFile> {
    let Some(name) = path.file_name() else { bail!("{} names no file: name one", path.display()) };
    let name = name.as_bytes();
    let mut prefix = OsStr::from_bytes(&name[..name.len().min(NAME_MAX)]).to_owned();
    prefix.push(".");
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let made = tempfile::Builder::new().prefix(&prefix).suffix(".partial").tempfile_in(directory);
    made.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            anyhow::anyhow!("cannot write {}: its directory does not exist", path.display())
        }
        _ => anyhow::anyhow!("cannot write {}: {error}", path.display()),
    })
}

/// The file that a path refers to, with links resolved; `None` if it does not exist.
fn existing(path: &Path) -> anyhow::Result<Option<(PathBuf, std::fs::Metadata)>> {
    match path.canonicalize() {
        Ok(path) => {
            let metadata = path.metadata()?;
            Ok(Some((path, metadata)))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => bail!("cannot write {}: {error}", path.display()),
    }
}

impl Sink {
    /// The sink at `path`. Signals that ask for an end are watched for before an unfinished file exists, so that none leaves one
    /// behind. A pipe has nothing to clean up, and must end even while its reader blocks it: for it they keep their default action.
    fn open(path: &Path) -> anyhow::Result<(Sink, Option<Interrupts>)> {
        if path == Path::new("-") {
            if std::io::stdout().is_terminal() {
                bail!("refusing to write an archive to a terminal: redirect it or name a file");
            }
            return Ok((Sink::Through(Box::new(std::io::stdout())), None));
        }
        let existing = existing(path)?;
        let path = match &existing {
            Some((_, metadata)) if metadata.is_dir() => {
                bail!("{} is a directory: name a file in it", path.display());
            }
            Some((path, metadata)) if !metadata.is_file() => {
                let file = std::fs::File::options().write(true).open(path);
                let file = file.map_err(|error| anyhow::anyhow!("cannot write {}: {error}", path.display()))?;
                return Ok((Sink::Through(Box::new(file)), None));
            }
            Some((path, _)) => path,
            None => path,
        };
        let interrupts = Interrupts::watch()?;
        let partial = partial(path)?;
        if let Some((_, metadata)) = &existing {
            partial.as_file().set_permissions(metadata.permissions())?;
        }
        Ok((Sink::File { partial, path: path.to_owned() }, Some(interrupts)))
    }

    fn write(&mut self, bytes: &Bytes) -> std::io::Result<()> {
        match self {
            Sink::Through(writer) => writer.write_all(bytes),
            Sink::File { partial, .. } => partial.write_all(bytes),
        }
    }

    fn finish(self) -> std::io::Result<()> {
        match self {
            Sink::Through(mut writer) => writer.flush(),
            Sink::File { partial, path } => {
                partial.as_file().sync_all()?;
                partial.persist(path).map(drop).map_err(|error| error.error)
            }
        }
    }
}

/// Writes the image's tar.
pub(crate) async fn export(client: &Client, output: Output, arguments: Export) -> anyhow::Result<()> {
    let Export { image, file } = arguments;
    let download = client.export(&image).await?;
    let progress = bar(output, download.length, "writing");
    let (mut sink, mut interrupts) = Sink::open(&file)?;
    let interrupted = async {
        match &mut interrupts {
            Some(interrupts) => interrupts.next().await,
            None => std::future::pending().await,
        }
    };
    let written = tokio::select! {
        written = copy(download, &mut sink, &progress) => written?,
        exit = interrupted => {
            return Err(Interrupted::new(exit, format!("interrupted before {} was whole", file.display())).into());
        }
    };
    sink.finish().map_err(|error| anyhow::anyhow!("cannot write {}: {error}", file.display()))?;
    progress.finish_and_clear();
    if file == Path::new("-") {
        return Ok(());
    }
    let report = json!({ "image": image, "file": file.display().to_string(), "bytes": written });
    output.print(&report, |_| format!("{image} is in {} ({})", file.display(), size(written)))
}

async fn copy(mut download: Download, sink: &mut Sink, progress: &ProgressBar) -> anyhow::Result<u64> {
    let mut written = 0;
    while let Some(bytes) = download.next().await? {
        sink.write(&bytes).map_err(|error| anyhow::anyhow!("cannot write the archive: {error}"))?;
        written += bytes.len() as u64;
        progress.set_position(written);
    }
    Ok(written)
}
