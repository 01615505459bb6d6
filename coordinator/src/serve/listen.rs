//! The sockets that a coordinator is asked on.

use std::io;

use axum::Router;
use axum::extract::connect_info::IntoMakeServiceWithConnectInfo;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::access::Peer;
use crate::config::{Config, Listen, Security};
use crate::listener::{Certificate, ListenError, SocketAccess, TlsListener, bind, bind_socket};
use crate::serve::{ServeError, make_directory};

/// What serves one listener's connections.
type Service = IntoMakeServiceWithConnectInfo<Router, Peer>;

/// Starts the listeners; they end with `stop`. The socket comes last: whoever sees it finds all of them.
pub(super) async fn listen(
    config: &Config,
    router: Router,
    stop: &CancellationToken,
) -> Result<JoinSet<()>, ServeError> {
    let mut listeners = JoinSet::new();
    let service = router.into_make_service_with_connect_info::<Peer>();
    if let Some(address) = &config.listen {
        listen_tcp(address, service.clone(), &mut listeners, stop).await?;
    }
    if let Some(parent) = config.socket.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        make_directory(parent)?;
    }
    let access = match config.local_access.is_empty() {
        true => SocketAccess::Owner,
        false => SocketAccess::Everybody,
    };
    let socket = bind_socket(&config.socket, access).await?;
    let stopped = stop.clone();
    listeners.spawn(async move {
        let _ = axum::serve(socket, service).with_graceful_shutdown(stopped.cancelled_owned()).await;
    });
    Ok(listeners)
}

/// Starts the listener of a TCP address.
async fn listen_tcp(
    listen: &Listen,
    service: Service,
    listeners: &mut JoinSet<()>,
    stop: &CancellationToken,
) -> Result<(), ServeError> {
    let Listen { address, security } = listen;
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
    Ok(())
}
