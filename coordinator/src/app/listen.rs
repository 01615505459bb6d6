//! Opens the sockets that a coordinator serves.

use std::io;

use std::sync::Arc;

use axum::Router;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::app::config::{Config, Listen, Security};
use crate::app::error::{ServeError, make_directory};
use crate::app::listener::{Certificate, Door, ListenError, SocketAccess, bind, bind_socket, serve, tls_acceptor};
use crate::http::connections::Connections;

/// Starts the listeners, which end with `stop`. The unix socket comes last: once it exists, all of them do.
pub(crate) async fn listen(
    config: &Config,
    router: Router,
    connections: Connections,
    stop: &CancellationToken,
) -> Result<JoinSet<()>, ServeError> {
    let (mut listeners, connections) = (JoinSet::new(), Arc::new(connections));
    if let Some(address) = &config.listen {
        let door = network_door(address, stop).await?;
        listeners.spawn(serve(door, router.clone(), Arc::clone(&connections), stop.clone()));
    }
    if let Some(parent) = config.socket.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        make_directory(parent)?;
    }
    let access = if config.local_access.is_empty() { SocketAccess::Owner } else { SocketAccess::Everybody };
    let socket = bind_socket(&config.socket, access).await?;
    listeners.spawn(serve(Door::Unix(socket), router, connections, stop.clone()));
    Ok(listeners)
}

/// Listens on a TCP address.
async fn network_door(listen: &Listen, stop: &CancellationToken) -> Result<Door, ServeError> {
    let Listen { address, security } = listen;
    let failed = |e: io::Error| ListenError::Address { address: address.to_string(), why: e.to_string() };
    match security {
        Security::LoopbackOnly => {
            let listener = bind(*address).await?;
            tracing::warn!(
                "listening on http://{} without TLS and tokens: every user of this machine is an admin",
                listener.local_addr().map_err(failed)?
            );
            Ok(Door::Loopback(listener))
        }
        Security::Tls { certificate, key } => {
            let certificate = Certificate::load(certificate, key)?;
            let listener = bind(*address).await?;
            tracing::info!("listening on https://{}", listener.local_addr().map_err(failed)?);
            Ok(Door::Tls(listener, tls_acceptor(certificate, stop).map_err(failed)?))
        }
    }
}
