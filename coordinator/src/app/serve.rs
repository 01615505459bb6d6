//! One coordinator from start to end: the store, the lease, the listeners.
//!
//! ```text
//! open store and database ─> try for the lease once ─> listen ─┬─ leading: run jobs, merge traces, renew the lease
//!                                                             └─ standby: answer questions, follow the leader's ledger,
//!                                                                         try again every second
//! ```
//!
//! A leader that finds itself replaced, or that cannot renew for as long as a lease lives, stops: a program with
//! restarts (systemd) then stands by. A full disk is no reason to stop: the fence was still seen to hold, nobody else can
//! write either, and people need the API to make room. A clean stop gives the lease up, so that the next one need not wait.
//!
//! - `reign`: from the first try for the lease to the end of leading. `heartbeat`: the thread that renews it. `listen`: the sockets.
//!   `tend`: what a leader looks after.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::Mutex;
use store::catalogue::Catalogue;
use store::layout::is_of_the_volume;
use store::lease::TIME_TO_LIVE;
use store::publisher::{Candidacy, Candidate, create, write_new_superblock};
use store::reader::Store;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::app::config::{Config, CreateStore, Salvage};
use crate::app::listener::ListenError;
use crate::app::private_directory::{self, PrivateError};
use crate::http::auth::Gate;
use crate::http::bodies;
use crate::http::connections::{Connections, raise_descriptor_limit};
use crate::http::handlers::profiles;
use crate::http::handlers::status::Counts;
use crate::http::mirror::Plains;
use crate::http::streams::Streams;
use crate::http::{App, Leadership, router};
use crate::identity::tokens::Tokens;
use crate::registries::blob_cache::BlobCache;
use crate::registries::limits::Limits;
use crate::registries::oci::client::OciRegistry;
use crate::registries::oci::docker_config::CredentialStore;
use crate::registries::oci::transport::TransportError;
use crate::state::clock::SystemClock;
use crate::state::events::Events;
use crate::state::replicated::ReplicatedState;
use crate::state::state_db::database::StateDatabase;
use crate::state::state_db::{StateDb, StateError};

use crate::app::leader::{Candidacy0, LeaderContext, blocking};
use crate::app::listen::listen;

/// How long open connections may take to end after a stop.
const GRACE: Duration = Duration::from_secs(5);

/// Why a coordinator does not run, or does not go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The store.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The catalogue.
    #[error(
        "{0}: start once with --salvage-catalogue to go on with what can be read, then run cachefsctl fsck --rebuild"
    )]
    Catalogue(store::Error),
    /// The superblock and its copy.
    #[error(
        "{0}, and its copy is lost too, but the directory has a store's directories: start once with --salvage-superblock to write it anew"
    )]
    Superblock(store::Error),
    /// A directory that is not ours alone.
    #[error(transparent)]
    Private(#[from] PrivateError),
    /// The journal.
    #[error(transparent)]
    StateDb(#[from] StateError),
    /// HTTP's own setup.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A directory that cannot be made.
    #[error("cannot create directory {}: {source}; create it or choose another one", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// An address that cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The thread that renews the lease.
    #[error(
        "the thread that renews the lease cannot be started: {0}; raise the number of processes that this user may have"
    )]
    Thread(io::Error),
    /// The lease could not be renewed in time.
    #[error("the lease on the store could not be renewed for {} seconds ({last}): check the shared disk and start again", TIME_TO_LIVE.as_secs())]
    LeaseLost {
        /// The last failure.
        last: store::Error,
    },
}

/// Opens the store for reading, making it first where that is wanted and safe.
fn open_store(config: &Config) -> Result<Store, ServeError> {
    if config.create == CreateStore::WithDirectory {
        make_directory(&config.store)?;
    }
    match Store::open(&config.store) {
        Err(store::Error::NotAStore { .. }) if is_empty(&config.store) => {
            create(&config.store)?;
            tracing::info!("{} is a new store", config.store.display());
            Ok(Store::open(&config.store)?)
        }
        Err(error @ (store::Error::NotAStore { .. } | store::Error::Corrupt { .. })) if was_store(&config.store) => {
            match config.salvage_superblock {
                Salvage::Refused => Err(ServeError::Superblock(error)),
                Salvage::Allowed => salvage_superblock(config),
            }
        }
        other => Ok(other?),
    }
}

/// Whether a directory has what only a store has.
fn was_store(path: &Path) -> bool {
    ["catalogue", "layers", "packs", "lease"].iter().all(|name| path.join(name).is_dir())
}

/// Writes a superblock with the identity that our database knows, or a new one, by which hosts take the store for another.
fn salvage_superblock(config: &Config) -> Result<Store, ServeError> {
    private_directory::make(&config.state)?;
    let known = ReplicatedState::identity(&StateDatabase::open(&config.state)?)?;
    write_new_superblock(&config.store, known)?;
    let whose = if known.is_some() { "as this coordinator's database knows it" } else { "with a new identity" };
    tracing::warn!("the superblock of {} was written anew, {whose}", config.store.display());
    Ok(Store::open(&config.store)?)
}

/// The catalogue as it is now; an empty one until a damaged one is salvaged, if that is wanted.
fn first_catalogue(store: &Store, config: &Config) -> Result<Catalogue, ServeError> {
    match store.catalogue() {
        Ok(catalogue) => Ok(catalogue),
        Err(error) if config.salvage == Salvage::Allowed => {
            tracing::warn!("{error}: going on with what can be read");
            Ok(Catalogue::default())
        }
        Err(source) => Err(ServeError::Catalogue(source)),
    }
}

/// Damage that is met when the lease is first taken is the catalogue's: nothing else is read then.
pub(super) fn first_failure(error: store::Error) -> ServeError {
    match error {
        error if error.is_of_object() && !matches!(error, store::Error::Unsupported { .. }) => {
            ServeError::Catalogue(error)
        }
        error => error.into(),
    }
}

fn is_empty(path: &Path) -> bool {
    std::fs::read_dir(path).is_ok_and(|mut entries| entries.all(|e| e.is_ok_and(|e| is_of_the_volume(&e.file_name()))))
}

pub(super) fn make_directory(path: &Path) -> Result<(), ServeError> {
    private_directory::make_public(path).map_err(|source| ServeError::Directory { path: path.to_owned(), source })
}

/// The directories that are ours alone.
fn make_private_directories(config: &Config) -> Result<(), PrivateError> {
    let (spool, blobs) = (config.state.join("spool"), config.state.join("blobs"));
    let wants_blobs = config.blob_cache > 0 || blobs.exists();
    let all = [&config.state, &spool].into_iter().chain(wants_blobs.then_some(&blobs));
    all.into_iter().try_for_each(|directory| private_directory::make(directory))
}

/// Serves until `stop`; an error if it must end before.
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), ServeError> {
    let descriptors = raise_descriptor_limit();
    let store = open_store(&config)?;
    make_private_directories(&config)?;
    let database = Arc::new(StateDatabase::open(&config.state)?);
    let shared = Arc::new(ReplicatedState::new(database, store.clone(), config.handover_key));
    let state_db: Arc<dyn StateDb> = Arc::clone(&shared) as _;
    match &config.docker_config {
        Some(path) => tracing::info!("logins of registries are read from {}", path.display()),
        None => tracing::warn!("no logins of registries are looked for: give --docker-config"),
    }
    let credentials = CredentialStore { config: config.docker_config.clone() };
    let directory = config.state.join("blobs");
    let originals = BlobCache::open(&directory, config.blob_cache)
        .map_err(|source| ServeError::Directory { path: directory.clone(), source })?;
    let originals = Arc::new(originals);
    let limits = Arc::new(Limits::new(Arc::new(SystemClock), config.parallel_layers));
    let registry = Arc::new(OciRegistry::new(&config.transport, credentials, store.clone(), Arc::clone(&limits))?);
    let events = Arc::new(Events::open(Arc::clone(&state_db))?);
    let tokens = Arc::new(Tokens::open(Arc::clone(&state_db))?);
    let (leadership, watching) = watch::channel(Leadership::Standby { leader: None });
    let candidate = Candidate::new(&config.store, &config.name)?.above(shared.newest()?.epoch);
    let mut candidate = if config.salvage == Salvage::Allowed { candidate.salvaging() } else { candidate };
    // Before anybody can ask: whoever starts the only coordinator finds it leading. What it has read by then is not read again.
    let first = blocking(move || Ok((candidate.attempt()?, candidate))).await.map_err(first_failure)?;
    let catalogue = match &first {
        (Candidacy::Leading(publisher), _) => publisher.catalogue(),
        (Candidacy::Standby { .. }, _) => first_catalogue(&store, &config)?,
    };
    let app = Arc::new(App {
        originals: Arc::clone(&originals),
        catalogue: Mutex::new(catalogue),
        counts: Counts::default(),
        bodies: bodies::room(),
        traces: profiles::room(),
        plains: Plains::default(),
        streams: Streams::new(store.clone()),
        store,
        store_path: config.store.clone(),
        state_path: config.state.clone(),
        name: config.name.clone(),
        started_at: Timestamp::now(),
        gate: Gate::new(config.local_access.clone(), Arc::clone(&tokens), Arc::clone(&events)),
        events: Arc::clone(&events),
        stopping: stop.clone(),
        leadership: watching,
    });
    let throne =
        LeaderContext { config: config.clone(), shared, tokens, events, registry, limits, originals, leadership };
    let first = match first {
        (Candidacy::Leading(publisher), _) => Candidacy0::Leading(throne.become_leader(*publisher, &stop).await?),
        (Candidacy::Standby { holder, epoch }, candidate) => {
            throne.stand_by(&holder, epoch);
            throne.follow().await;
            Candidacy0::Standby(candidate)
        }
    };
    let connections = Connections::new(descriptors, nix::unistd::Uid::effective().as_raw());
    let mut listeners = listen(&config, router(app), connections, &stop).await?;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let result = throne.reign(first, &stop).await;
    stop.cancel();
    let ended = async { while listeners.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(GRACE, ended).await;
    let _ = std::fs::remove_file(&config.socket);
    result
}
