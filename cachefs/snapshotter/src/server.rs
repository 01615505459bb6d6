//! The socket on which containerd finds the service.

use std::fs::{self, Permissions};
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::service::Service;
use crate::snapshotter::Snapshotter;
use crate::wire::snapshots_server::SnapshotsServer;

/// Why the service ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Another process listens there.
    #[error("{} is in use: another snapshotter listens there", .0.display())]
    InUse(PathBuf),
    /// The path is something else.
    #[error("{} is there and is no socket: remove it or choose another path", .0.display())]
    Occupied(PathBuf),
    /// It cannot be listened on.
    #[error("cannot listen on {}: {source}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The database must be opened again.
    #[error(
        "the snapshots' metadata could not be written, and takes nothing until the snapshotter is started again: see that its disk is well and has room"
    )]
    Broken,
    /// Serving failed.
    #[error("the snapshots service ended: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// How long requests may take to end when the service stops.
const DRAIN: Duration = Duration::from_secs(10);

/// Listens on `path`, for this user alone. A socket that nobody listens on any more is replaced.
pub fn listen(path: &Path) -> Result<UnixListener, ServeError> {
    let failed = |source| ServeError::Listen { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => return Err(ServeError::Occupied(path.to_owned())),
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            return Err(ServeError::InUse(path.to_owned()));
        }
        Ok(_) => fs::remove_file(path).map_err(failed)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// Serves until `stop`; requests that are under way come to their end, if they do so in [`DRAIN`].
pub async fn serve(
    listener: UnixListener,
    snapshotter: Arc<Snapshotter>,
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let service = Service::new(snapshotter);
    let broken = service.broken();
    let server = Server::builder().add_service(SnapshotsServer::new(service));
    let (tell, told) = oneshot::channel();
    let stop = async move {
        stop.await;
        let _ = tell.send(());
    };
    let late = async move {
        let _ = told.await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        served = server.serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop) => Ok(served?),
        () = late => Ok(()),
        () = broken.notified() => Err(ServeError::Broken),
    }
}
