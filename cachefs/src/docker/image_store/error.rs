//! What can go wrong with an image store; the message of each error is one sentence.

use std::path::PathBuf;

use crate::docker::files::FileError;
use crate::docker::mount::MountError;
use crate::os::private_files::Refusal;

/// Why the directory cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The mount cannot be used.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The directory cannot be used.
    #[error("{} cannot hold an image store: {refusal}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        refusal: Refusal,
    },
    /// Another process keeps the directory.
    #[error("{} is kept by another cachefs image-store: give each its own directory", .0.display())]
    Kept(PathBuf),
    /// A file cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] store::Error),
}
