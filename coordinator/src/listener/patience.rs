//! Limits on how long a peer may keep a connection waiting: for the bytes that it does not read, and for those that it does not send.
//!
//! The head of a request, and the pause between two requests, are limited by the HTTP library. Here are the rest: [`Patient`]
//! ends a connection whose peer does not take what is written to it, [`PatientBody`] a request whose body does not come on.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// A clock that runs only while somebody is waited for.
#[derive(Debug)]
struct Alarm {
    limit: Duration,
    running: Option<Pin<Box<Sleep>>>,
}

impl Alarm {
    fn new(limit: Duration) -> Alarm {
        Alarm { limit, running: None }
    }

    /// Ready when the wait, which begins with the first call after [`Alarm::stop`], has lasted too long.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let limit = self.limit;
        self.running.get_or_insert_with(|| Box::pin(sleep(limit))).as_mut().poll(context)
    }

    fn stop(&mut self) {
        self.running = None;
    }

    /// Passes `polled` on, or an error if it has not been ready for too long.
    fn watch<T>(
        &mut self,
        context: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
        why: &'static str,
    ) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.stop();
            return polled;
        }
        ready!(self.poll(context));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, why)))
    }
}

const NOT_TAKEN: &str = "the peer does not read what it asked for";

/// A connection that fails when the peer takes nothing for too long.
#[derive(Debug)]
pub(super) struct Patient<S> {
    inner: S,
    alarm: Alarm,
}

impl<S> Patient<S> {
    /// `inner`, which may hold a write up for `limit`.
    pub(super) fn new(inner: S, limit: Duration) -> Patient<S> {
        Patient { inner, alarm: Alarm::new(limit) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.alarm.watch(context, polled, NOT_TAKEN)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write_vectored(context, slices);
        self.alarm.watch(context, polled, NOT_TAKEN)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_flush(context);
        self.alarm.watch(context, polled, NOT_TAKEN)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_shutdown(context);
        self.alarm.watch(context, polled, NOT_TAKEN)
    }
}

/// A request's body that fails when nothing of it comes for too long.
#[derive(Debug)]
pub(super) struct PatientBody {
    inner: Incoming,
    alarm: Alarm,
}

impl PatientBody {
    /// `inner`, whose parts may be `limit` apart.
    pub(super) fn new(inner: Incoming, limit: Duration) -> PatientBody {
        PatientBody { inner, alarm: Alarm::new(limit) }
    }
}

impl Body for PatientBody {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match Pin::new(&mut self.inner).poll_frame(context) {
            Poll::Ready(frame) => {
                self.alarm.stop();
                Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
            }
            Poll::Pending => {
                ready!(self.alarm.poll(context));
                Poll::Ready(Some(Err("nothing of it came for too long".into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::Instant;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_is_given_up_and_one_that_takes_some_is_not() {
        let (mut far, near) = tokio::io::duplex(16);
        let mut near = Patient::new(near, LIMIT);
        let reader = tokio::spawn(async move {
            for _ in 0..10 {
                tokio::time::sleep(LIMIT - Duration::from_secs(1)).await;
                let mut part = [0; 8];
                far.read_exact(&mut part).await.unwrap();
            }
            far
        });
        near.write_all(&[1; 16 + 80]).await.unwrap();
        let far = reader.await.unwrap();
        let start = Instant::now();
        let error = near.write_all(&[1; 17]).await.unwrap_err();
        assert_eq!((error.kind(), start.elapsed()), (io::ErrorKind::TimedOut, LIMIT));
        drop(far);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_between_writes_is_not_the_peers_fault() {
        let (mut far, near) = tokio::io::duplex(16);
        let mut near = Patient::new(near, LIMIT);
        for _ in 0..3 {
            near.write_all(&[1; 16]).await.unwrap();
            tokio::time::sleep(LIMIT * 2).await;
            far.read_exact(&mut [0; 16]).await.unwrap();
        }
    }
}
