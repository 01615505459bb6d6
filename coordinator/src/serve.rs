//! One coordinator from start to end: the store, the lease, the listeners.
//!
//! ```text
//! open store and journal ─> try for the lease once ─> listen ─┬─ leading: run jobs, merge traces, renew the lease
//!                                                             └─ standby: answer questions, try again every second
//! ```
//!
//! A leader that finds itself replaced, or that cannot renew for as long as a lease lives, stops: a program with
//! restarts (systemd) then stands by. A full disk is no reason to stop: the fence was still seen to hold, nobody else can
//! write either, and people need the API to make room. A clean stop gives the lease up, so that the next one need not wait.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use jiff::Timestamp;
use parking_lot::Mutex;
use store::catalogue::Catalogue;
use store::lease::TIME_TO_LIVE;
use store::publisher::{Candidacy, Candidate, Publisher, create};
use store::reader::Store;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::access::Peer;
use crate::blob_cache::BlobCache;
use crate::board::Board;
use crate::clock::SystemClock;
use crate::config::{Config, CreateStore, Listen, Salvage, Security};
use crate::dispatch::Dispatcher;
use crate::events::Events;
use crate::fsck::Fsck;
use crate::garbage::Garbage;
use crate::hosts::Hosts;
use crate::journal::rocks::RocksJournal;
use crate::journal::{Journal, JournalError};
use crate::limits::Limits;
use crate::listener::{Certificate, ListenError, SocketAccess, TlsListener, bind, bind_socket};
use crate::profiles::{Inbox, Profiles};
use crate::pull::Puller;
use crate::registry::credentials::CredentialStore;
use crate::registry::oci::OciRegistry;
use crate::registry::transport::TransportError;
use crate::scheduler::{Parts, Scheduler};
use crate::server::gate::Gate;
use crate::server::{App, Leader, Leadership, router};
use crate::settings::{SettingsBook, SettingsParts};
use crate::tokens::Tokens;

/// How often a standby looks whether the store is free.
const TRY_AGAIN: Duration = Duration::from_secs(1);
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
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
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
        other => Ok(other?),
    }
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
fn first_failure(error: store::Error) -> ServeError {
    match error {
        store::Error::Corrupt { .. } => ServeError::Catalogue(error),
        error => error.into(),
    }
}

fn is_empty(path: &Path) -> bool {
    std::fs::read_dir(path).is_ok_and(|mut entries| entries.all(|e| e.is_ok_and(|e| e.file_name() == "lost+found")))
}

fn make_directory(path: &Path) -> Result<(), ServeError> {
    std::fs::create_dir_all(path).map_err(|source| ServeError::Directory { path: path.to_owned(), source })
}

/// Everything that leading needs and standing by does not.
struct Throne {
    config: Config,
    journal: Arc<dyn Journal>,
    events: Arc<Events>,
    registry: Arc<OciRegistry>,
    limits: Arc<Limits>,
    originals: Arc<BlobCache>,
    leadership: watch::Sender<Leadership>,
}

/// Serves until `stop`; an error if it must end before.
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), ServeError> {
    let store = open_store(&config)?;
    make_directory(&config.state)?;
    make_directory(&config.state.join("spool"))?;
    let journal: Arc<dyn Journal> = Arc::new(RocksJournal::open(&config.state)?);
    let credentials = CredentialStore { config: config.docker_config.clone() };
    let directory = config.state.join("blobs");
    let originals = BlobCache::open(&directory, config.blob_cache)
        .map_err(|source| ServeError::Directory { path: directory.clone(), source })?;
    let originals = Arc::new(originals);
    let limits = Arc::new(Limits::new(Arc::new(SystemClock), config.parallel_layers));
    let registry = Arc::new(OciRegistry::new(&config.transport, credentials, store.clone(), Arc::clone(&limits))?);
    let events = Arc::new(Events::open(Arc::clone(&journal))?);
    let tokens = Arc::new(Tokens::open(Arc::clone(&journal))?);
    let (leadership, watching) = watch::channel(Leadership::Standby { leader: None });
    let app = Arc::new(App {
        originals: Arc::clone(&originals),
        catalogue: Mutex::new(first_catalogue(&store, &config)?),
        store,
        store_path: config.store.clone(),
        state_path: config.state.clone(),
        name: config.name.clone(),
        started_at: Timestamp::now(),
        gate: Gate::new(config.local_access.clone(), tokens, Arc::clone(&events)),
        events: Arc::clone(&events),
        stopping: stop.clone(),
        leadership: watching,
    });
    let throne = Throne { config: config.clone(), journal, events, registry, limits, originals, leadership };
    let candidate = Candidate::new(&config.store, &config.name)?;
    let mut candidate = if config.salvage == Salvage::Allowed { candidate.salvaging() } else { candidate };
    // Before anybody can ask: whoever starts the only coordinator finds it leading.
    let first = blocking(move || Ok((candidate.attempt()?, candidate))).await.map_err(first_failure)?;
    let first = match first {
        (Candidacy::Leading(publisher), _) => Seat::Leading(throne.prepare(*publisher, &stop)?),
        (Candidacy::Standby { holder, epoch }, candidate) => {
            throne.stand_by(&holder, epoch);
            Seat::Standby(candidate)
        }
    };
    let mut listeners = listen(&config, router(app), &stop).await?;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let result = throne.reign(first, &stop).await;
    stop.cancel();
    let ended = async { while listeners.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(GRACE, ended).await;
    let _ = std::fs::remove_file(&config.socket);
    result
}

/// What the first try for the lease gave.
enum Seat {
    Leading(Reign),
    Standby(Candidate),
}

/// A leader's parts.
struct Reign {
    publisher: Arc<Publisher>,
    dispatcher: Dispatcher,
    scheduler: Arc<Scheduler>,
    profiles: Arc<Profiles>,
    inbox: Inbox,
    garbage: Arc<Garbage>,
    hosts: Arc<Hosts>,
}

/// Runs work that blocks on the shared disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, store::Error> + Send + 'static,
) -> Result<T, store::Error> {
    let crashed = |_| store::Error::corrupt("this coordinator", "a thread of it crashed: see its log");
    tokio::task::spawn_blocking(work).await.map_err(crashed)?
}

impl Throne {
    fn stand_by(&self, holder: &str, epoch: u64) {
        let next = Leadership::Standby { leader: Some((holder.to_owned(), epoch)) };
        let news =
            !matches!(&*self.leadership.borrow(), Leadership::Standby { leader: Some((_, known)) } if *known == epoch);
        self.leadership.send_replace(next);
        if news {
            tracing::info!("standing by: {holder} leads {} (epoch {epoch})", self.config.store.display());
        }
    }

    /// Takes up the jobs that the journal holds, and tells the API.
    fn prepare(&self, publisher: Publisher, stop: &CancellationToken) -> Result<Reign, ServeError> {
        tracing::info!("leading {} (epoch {})", self.config.store.display(), publisher.epoch());
        let publisher = Arc::new(publisher);
        let board =
            Arc::new(Board::open_with(Arc::clone(&self.journal), Arc::new(SystemClock), Arc::clone(&self.limits))?);
        let spools = self.config.state.join("spool");
        sweep(&spools, &board.spools());
        let journal = Arc::clone(&self.journal);
        let puller = Puller::new(Arc::clone(&publisher), journal, Arc::clone(&self.limits));
        let puller = Arc::new(puller.keeping(Arc::clone(&self.originals)));
        let scheduler = self.scheduler(&board, &publisher)?;
        let (profiles, inbox) = Profiles::new(Arc::clone(&self.journal), Arc::clone(&publisher));
        let (lease, now) = (self.config.host_lease, Timestamp::now());
        let hosts = Hosts::open(Arc::clone(&self.journal), Arc::clone(&self.events), lease, now)?;
        let hosts = Arc::new(hosts);
        let journal = Arc::clone(&self.journal);
        let (holds, events) = (Arc::clone(&hosts) as _, Arc::clone(&self.events));
        let garbage = Arc::new(Garbage::open(Arc::clone(&publisher), journal, holds, events)?);
        let fsck = Fsck::new(
            Arc::clone(&publisher),
            Arc::clone(&self.journal),
            Arc::clone(&board),
            Arc::clone(&profiles),
            Arc::clone(&self.events),
            stop.clone(),
        )?;
        let settings = SettingsBook::open(SettingsParts {
            journal: Arc::clone(&self.journal),
            limits: Arc::clone(&self.limits),
            scheduler: Arc::clone(&scheduler),
            garbage: Arc::clone(&garbage),
            publisher: Arc::clone(&publisher),
        })?;
        self.leadership.send_replace(Leadership::Leading(Arc::new(Leader {
            publisher: Arc::clone(&publisher),
            board: Arc::clone(&board),
            puller: Arc::clone(&puller),
            profiles: Arc::clone(&profiles),
            fsck,
            scheduler: Arc::clone(&scheduler),
            settings: Arc::new(settings),
            limits: Arc::clone(&self.limits),
            hook_secret: self.config.hook_secret,
            garbage: Arc::clone(&garbage),
            events: Arc::clone(&self.events),
            hosts: Arc::clone(&hosts),
            spools,
        })));
        let store = self.config.store.display().to_string().into();
        Ok(Reign {
            publisher,
            dispatcher: Dispatcher {
                board,
                puller,
                registry: Arc::clone(&self.registry) as _,
                store,
                events: Arc::clone(&self.events),
            },
            scheduler,
            profiles,
            inbox,
            garbage,
            hosts,
        })
    }

    /// The schedules, not yet running.
    fn scheduler(&self, board: &Arc<Board>, publisher: &Arc<Publisher>) -> Result<Arc<Scheduler>, JournalError> {
        let parts = Parts {
            clock: Arc::new(SystemClock),
            journal: Arc::clone(&self.journal),
            board: Arc::clone(board),
            limits: Arc::clone(&self.limits),
            lookout: Arc::clone(&self.registry) as _,
            registry: Arc::clone(&self.registry) as _,
            publisher: Arc::clone(publisher),
            store_path: self.config.store.clone(),
            events: Arc::clone(&self.events),
        };
        Ok(Arc::new(Scheduler::open(parts)?))
    }

    /// Waits for the lease if need be, then runs jobs until stopped or replaced.
    async fn reign(&self, seat: Seat, stop: &CancellationToken) -> Result<(), ServeError> {
        let reign = match seat {
            Seat::Leading(reign) => reign,
            Seat::Standby(candidate) => match self.wait(candidate, stop).await? {
                Some(publisher) => self.prepare(publisher, stop)?,
                None => return Ok(()),
            },
        };
        let dispatching = tokio::spawn(reign.dispatcher.run(self.config.parallel_jobs, stop.clone()));
        let scheduling = tokio::spawn(reign.scheduler.run(stop.clone()));
        let learning = tokio::spawn(reign.profiles.run(reign.inbox, stop.clone()));
        let collecting = tokio::spawn(reign.garbage.run(stop.clone()));
        let expiring = tokio::spawn(expire_leases(Arc::clone(&reign.hosts), stop.clone()));
        let result = renew(&reign.publisher, stop).await;
        stop.cancel();
        let _ = tokio::join!(dispatching, scheduling, learning, collecting, expiring);
        if result.is_ok() {
            let publisher = Arc::clone(&reign.publisher);
            blocking(move || publisher.release()).await?;
        }
        result
    }

    async fn wait(&self, mut candidate: Candidate, stop: &CancellationToken) -> Result<Option<Publisher>, ServeError> {
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(None),
                () = tokio::time::sleep(TRY_AGAIN) => {}
            }
            let (answer, back) = blocking(move || Ok((candidate.attempt(), candidate))).await?;
            candidate = back;
            match answer {
                Ok(Candidacy::Leading(publisher)) => return Ok(Some(*publisher)),
                Ok(Candidacy::Standby { holder, epoch }) => self.stand_by(&holder, epoch),
                Err(error) => tracing::warn!("cannot look at the lease, trying again: {error}"),
            }
        }
    }
}

/// Removes archives that no job needs: uploads that broke off when the last coordinator died.
fn sweep(spools: &Path, needed: &[PathBuf]) {
    for entry in std::fs::read_dir(spools).into_iter().flatten().flatten() {
        if !needed.contains(&entry.path()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Ends the leases of silent hosts until `stop`.
async fn expire_leases(hosts: Arc<Hosts>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(hosts.patience()) => {}
        }
        let hosts = Arc::clone(&hosts);
        let _ = tokio::task::spawn_blocking(move || hosts.expire(Timestamp::now())).await;
    }
}

/// Renews the lease until `stop`.
async fn renew(publisher: &Arc<Publisher>, stop: &CancellationToken) -> Result<(), ServeError> {
    let mut renewed = Instant::now();
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(TIME_TO_LIVE / 5) => {}
        }
        let holder = Arc::clone(publisher);
        match blocking(move || holder.renew()).await {
            Ok(()) => renewed = Instant::now(),
            Err(error @ store::Error::Fenced { .. }) => return Err(error.into()),
            Err(error @ store::Error::Full { .. }) => {
                renewed = Instant::now();
                tracing::warn!("the lease is not renewed, trying again: {error}");
            }
            Err(last) if renewed.elapsed() >= TIME_TO_LIVE => return Err(ServeError::LeaseLost { last }),
            Err(error) => tracing::warn!("the lease is not renewed, trying again: {error}"),
        }
    }
}

/// Starts the listeners; they end with `stop`.
async fn listen(config: &Config, router: Router, stop: &CancellationToken) -> Result<JoinSet<()>, ServeError> {
    let mut listeners = JoinSet::new();
    if let Some(parent) = config.socket.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        make_directory(parent)?;
    }
    let access = match config.local_access.is_empty() {
        true => SocketAccess::Owner,
        false => SocketAccess::Everybody,
    };
    let socket = bind_socket(&config.socket, access).await?;
    let service = router.into_make_service_with_connect_info::<Peer>();
    let (stopped, served) = (stop.clone(), service.clone());
    listeners.spawn(async move {
        let _ = axum::serve(socket, served).with_graceful_shutdown(stopped.cancelled_owned()).await;
    });
    let Some(Listen { address, security }) = &config.listen else { return Ok(listeners) };
    let failed = |e: io::Error| ListenError::Address { address: address.to_string(), why: e.to_string() };
    let stopped = stop.clone();
    match security {
        Security::LoopbackOnly => {
            let listener = bind(*address).await?;
            tracing::warn!(
                "listening on http://{} without TLS and tokens: every user of this machine is an admin",
                listener.local_addr().map_err(failed)?
            );
            listeners.spawn(async move {
                let _ = axum::serve(listener, service).with_graceful_shutdown(stopped.cancelled_owned()).await;
            });
        }
        Security::Tls { certificate, key } => {
            let certificate = Certificate::load(certificate, key)?;
            let listener = bind(*address).await?;
            tracing::info!("listening on https://{}", listener.local_addr().map_err(failed)?);
            let listener = TlsListener::new(listener, certificate, stop).map_err(failed)?;
            listeners.spawn(async move {
                let _ = axum::serve(listener, service).with_graceful_shutdown(stopped.cancelled_owned()).await;
            });
        }
    }
    Ok(listeners)
}
