//! From an accepted connection to answered requests, with limits on time and number.
//!
//! ```text
//! accept ─> a place (crate::http::connections) ─> TLS handshake ─> head ─> body ─> the router ─> answer ─┐
//!                                                             ^ next request, or idle             │
//!                                                             └────────────────────────────────────┘
//! ```
//!
//! Each step that waits for the peer has a limit; see the constants. The time that the coordinator itself takes is not limited
//! here: an answer may be hours away (`/v1/image/wait`).

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::connect_info::ConnectInfo;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::app::listener::timeouts::{PatientBody, Terms, TimedStream};
use crate::http::connections::{ConnectionPermit, Connections};
use crate::identity::caller::{Account, Peer};

/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long a request's head may take, counted from the end of the previous request. So it also limits how long a connection may
/// idle.
const HEAD: Duration = Duration::from_secs(20);
/// The longest head, and how much of an answer is buffered before it is written, in bytes.
const HEAD_MAX: usize = 64 << 10;
/// How long a body may take: an archive may come from a program that takes its time.
const BODY: Terms = Terms { pause: Duration::from_secs(120), window: Duration::from_secs(300), least: LEAST };
/// How long a peer may take to read an answer.
const ANSWER: Terms = Terms { pause: Duration::from_secs(30), window: Duration::from_secs(60), least: LEAST };
/// Bytes that must pass within the window.
const LEAST: u64 = 64 << 10;
/// Pause after a failed accept. Accepting fails when descriptors run out, and others must be closed first.
const OUT_OF_DESCRIPTORS: Duration = Duration::from_millis(200);

/// Something to accept connections on.
pub enum Door {
    /// The unix socket.
    Unix(UnixListener),
    /// The loopback, in the clear.
    Loopback(TcpListener),
    /// The network.
    Tls(TcpListener, TlsAcceptor),
}

/// A connection that was accepted.
enum Accepted {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(TcpStream, TlsAcceptor),
}

impl Door {
    async fn accept(&self) -> io::Result<(Accepted, Peer)> {
        let tcp = |(stream, address): (TcpStream, SocketAddr)| (stream, address);
        Ok(match self {
            Door::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let account = stream.peer_cred().ok().map(|found| Account { uid: found.uid(), gid: found.gid() });
                (Accepted::Unix(stream), Peer::Local(account))
            }
            Door::Loopback(listener) => {
                let (stream, address) = tcp(listener.accept().await?);
                (Accepted::Tcp(stream), Peer::Loopback(address))
            }
            Door::Tls(listener, acceptor) => {
                let (stream, address) = tcp(listener.accept().await?);
                (Accepted::Tls(stream, acceptor.clone()), Peer::Remote(address))
            }
        })
    }
}

/// Answers requests from `door` until `stop`, then waits for the requests that are still running.
pub async fn serve(door: Door, router: Router, connections: Arc<Connections>, stop: CancellationToken) {
    let mut open = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = door.accept() => accepted,
            Some(_) = open.join_next(), if !open.is_empty() => continue,
        };
        let Ok((stream, peer)) = accepted else {
            tokio::time::sleep(OUT_OF_DESCRIPTORS).await;
            continue;
        };
        let Some(permit) = connections.enter(&peer) else {
            tracing::debug!("a connection of {peer} is closed: there are too many");
            continue;
        };
        open.spawn(attend(stream, peer, permit, router.clone(), stop.clone()));
    }
    drop(door);
    while open.join_next().await.is_some() {}
}

/// Serves one connection from start to end.
async fn attend(stream: Accepted, peer: Peer, permit: ConnectionPermit, router: Router, stop: CancellationToken) {
    let closed = permit.clone();
    let answering = async {
        match stream {
            Accepted::Unix(stream) => answer(stream, peer, permit, router, &stop).await,
            Accepted::Tcp(stream) => answer(stream, peer, permit, router, &stop).await,
            Accepted::Tls(stream, acceptor) => match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => answer(stream, peer, permit, router, &stop).await,
                Ok(Err(error)) => tracing::debug!("no TLS with {peer}: {error}"),
                Err(_) => tracing::debug!("no TLS with {peer}: it takes too long"),
            },
        }
    };
    tokio::select! {
        () = answering => {}
        () = closed.closed() => tracing::debug!("a silent connection of {peer} is closed: others need its place"),
    }
}

/// Answers the requests of one connection.
async fn answer<S>(stream: S, peer: Peer, permit: ConnectionPermit, router: Router, stop: &CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: http::Request<Incoming>| {
        let mut request = request.map(|body| Body::new(PatientBody::new(body, BODY)));
        request.extensions_mut().insert(ConnectInfo(peer));
        request.extensions_mut().insert(permit.clone());
        router.clone().oneshot(request)
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(HEAD_MAX);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(TimedStream::new(stream, ANSWER)), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("a connection of {peer} ended: {error}");
    }
}
