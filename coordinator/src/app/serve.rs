//! Runs one coordinator from start to end: the store, the lease, the listeners.
//!
//! ```text
//! open store and database ─> try for the lease once ─> listen ─┬─ leading: run jobs, merge traces, renew the lease
//!                                                             └─ standby: answer questions, follow the leader's handover log,
//!                                                                         try again every second
//! ```
//!
//! A leader that finds itself replaced, or that cannot renew for as long as a lease lives, stops: a supervisor that restarts it
//! (systemd) makes it a standby. A full disk is no reason to stop: the fence was seen to hold, nobody else can write either, and
//! people need the API to make room. A clean stop gives the lease up, so that the next leader need not wait.
//!
//! - `leader`: from the first attempt to take the lease until it stops leading. `heartbeat`: the thread that renews the lease.
//!   `listen`: the sockets. `upkeep`: the leader's periodic checks.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::Mutex;
use store::catalogue::Catalogue;
use store::layout::is_of_the_volume;
use store::publisher::{Candidacy, Candidate, create, write_new_superblock};
use store::reader::Store;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::app::config::{Config, CreateStore, Salvage};
use crate::app::error::{ServeError, first_failure, make_directory};
use crate::app::private_directory::{self, PrivateError};
use crate::http::api_state::{ApiState, Leadership};
use crate::http::auth::Auth;
use crate::http::bodies;
use crate::http::connections::{Connections, raise_descriptor_limit};
use crate::http::counts::Counts;
use crate::http::handlers::profiles;
use crate::http::mirror::Plains;
use crate::http::router::router;
use crate::http::streams::Streams;
use crate::identity::tokens::Tokens;
use crate::registries::blob_cache::BlobCache;
use crate::registries::limits::Limits;
use crate::registries::oci::docker_config::CredentialStore;
use crate::registries::oci::registry::OciRegistry;
use crate::state::clock::SystemClock;
use crate::state::events::Events;
use crate::state::replicated::ReplicatedState;
use crate::state::state_db::StateDb;
use crate::state::state_db::database::StateDatabase;

use crate::app::leader::{FirstTry, LeaderContext, blocking};
use crate::app::listen::listen;

/// How long open connections may take to end after a stop.
const GRACE: Duration = Duration::from_secs(5);

/// Opens the store for reading. Creates it first if that is wanted and safe.
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

/// Whether a directory has the subdirectories that only a store has.
fn was_store(path: &Path) -> bool {
    ["catalogue", "layers", "packs", "lease"].iter().all(|name| path.join(name).is_dir())
}

/// Writes a superblock with the identity that the coordinator's database remembers. Without one it gets a new identity, and hosts
/// then take the store for another one.
fn salvage_superblock(config: &Config) -> Result<Store, ServeError> {
    private_directory::make(&config.state)?;
    let known = ReplicatedState::identity(&StateDatabase::open(&config.state)?)?;
    write_new_superblock(&config.store, known)?;
    let whose = if known.is_some() { "as this coordinator's database knows it" } else { "with a new identity" };
    tracing::warn!("the superblock of {} was written anew, {whose}", config.store.display());
    Ok(Store::open(&config.store)?)
}

/// The present catalogue. If it is damaged and salvaging is allowed, an empty one until it is salvaged.
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

fn is_empty(path: &Path) -> bool {
    std::fs::read_dir(path).is_ok_and(|mut entries| entries.all(|e| e.is_ok_and(|e| is_of_the_volume(&e.file_name()))))
}

/// Creates or checks the directories that only this coordinator may access.
fn make_private_directories(config: &Config) -> Result<(), PrivateError> {
    let (spool, blobs) = (config.state.join("spool"), config.state.join("blobs"));
    let wants_blobs = config.blob_cache > 0 || blobs.exists();
    let all = [&config.state, &spool].into_iter().chain(wants_blobs.then_some(&blobs));
    all.into_iter().try_for_each(|directory| private_directory::make(directory))
}

/// Where logins of registries are read.
fn credentials(config: &Config) -> CredentialStore {
    match &config.docker_config {
        Some(path) => tracing::info!("logins of registries are read from {}", path.display()),
        None => tracing::warn!("no logins of registries are looked for: give --docker-config"),
    }
    CredentialStore { config: config.docker_config.clone() }
}

/// Opens the cache of layers as registries sent them.
fn blob_cache(config: &Config) -> Result<BlobCache, ServeError> {
    let path = config.state.join("blobs");
    BlobCache::open(&path, config.blob_cache).map_err(|source| ServeError::Directory { path, source })
}

/// Serves until `stop`. Returns an error if it has to end earlier.
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), ServeError> {
    let descriptors = raise_descriptor_limit();
    let store = open_store(&config)?;
    make_private_directories(&config)?;
    let database = Arc::new(StateDatabase::open(&config.state)?);
    let shared = Arc::new(ReplicatedState::new(database, store.clone(), config.handover_key));
    let state_db: Arc<dyn StateDb> = Arc::clone(&shared) as _;
    let originals = Arc::new(blob_cache(&config)?);
    let limits = Arc::new(Limits::new(Arc::new(SystemClock), config.parallel_layers));
    let registry =
        OciRegistry::new(&config.transport, credentials(&config), store.clone(), Arc::clone(&limits)).map(Arc::new)?;
    let events = Arc::new(Events::open(Arc::clone(&state_db))?);
    let tokens = Arc::new(Tokens::open(Arc::clone(&state_db))?);
    let (leadership, watching) = watch::channel(Leadership::Standby { leader: None });
    let candidate = Candidate::new(&config.store, &config.name)?.above(shared.newest()?.epoch);
    let mut candidate = if config.salvage == Salvage::Allowed { candidate.salvaging() } else { candidate };
    // The first attempt precedes the listeners: whoever starts the only coordinator finds it leading. The catalogue that it has
    // read is not read again.
    let first = blocking(move || Ok((candidate.attempt()?, candidate))).await.map_err(first_failure)?;
    let catalogue = match &first {
        (Candidacy::Leading(publisher), _) => publisher.catalogue(),
        (Candidacy::Standby { .. }, _) => first_catalogue(&store, &config)?,
    };
    let app = Arc::new(ApiState {
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
        auth: Auth::new(config.local_access.clone(), Arc::clone(&tokens), Arc::clone(&events)),
        events: Arc::clone(&events),
        stopping: stop.clone(),
        leadership: watching,
    });
    let context =
        LeaderContext { config: config.clone(), shared, tokens, events, registry, limits, originals, leadership };
    let first = match first {
        (Candidacy::Leading(publisher), _) => FirstTry::Leading(context.become_leader(*publisher, &stop).await?),
        (Candidacy::Standby { holder, epoch }, candidate) => {
            context.stand_by(&holder, epoch);
            context.follow().await;
            FirstTry::Standby(candidate)
        }
    };
    let connections = Connections::new(descriptors, nix::unistd::Uid::effective().as_raw());
    let mut listeners = listen(&config, router(app), connections, &stop).await?;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let result = context.lead(first, &stop).await;
    stop.cancel();
    let ended = async { while listeners.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(GRACE, ended).await;
    let _ = std::fs::remove_file(&config.socket);
    result
}
