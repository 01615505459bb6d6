//! Limits on how long a peer may delay a connection: by not reading an answer, or by not sending a body.
//!
//! The HTTP library limits the head of a request and the pause between two requests. The rest is here: [`TimedStream`] ends a
//! connection whose peer does not read what is written to it, [`PatientBody`] ends a request whose body stops coming. Both also
//! enforce a minimum rate, measured over the time spent waiting for the peer: time that the coordinator takes is not the peer's
//! fault.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// How long to wait for a peer, and the least that it must transfer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    /// The longest wait without any progress.
    pub(super) pause: Duration,
    /// The total time of waiting, including waits that the peer ended,
    pub(super) window: Duration,
    /// in which this many bytes must pass: taking a byte now and then is no better than taking none.
    pub(super) least: u64,
}

/// A clock that runs only while waiting for the peer.
#[derive(Debug)]
struct Alarm {
    terms: Terms,
    /// The current wait: when it began, and the timer that ends it.
    running: Option<(Instant, Pin<Box<Sleep>>)>,
    /// Time spent waiting in this window so far, and bytes that have passed in it.
    waited: Duration,
    passed: u64,
}

impl Alarm {
    fn new(terms: Terms) -> Alarm {
        Alarm { terms, running: None, waited: Duration::ZERO, passed: 0 }
    }

    /// Ready when the wait has lasted too long. A wait begins with the first call after [`Alarm::stop`].
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Terms { pause, window, .. } = self.terms;
        let left = pause.min(window.saturating_sub(self.waited));
        let (_, asleep) = self.running.get_or_insert_with(|| (Instant::now(), Box::pin(sleep(left))));
        asleep.as_mut().poll(context)
    }

    /// Ends the current wait; `bytes` have passed.
    fn stop(&mut self, bytes: u64) {
        self.passed += bytes;
        if let Some((since, _)) = self.running.take() {
            self.waited += since.elapsed();
        }
        if self.passed >= self.terms.least {
            (self.waited, self.passed) = (Duration::ZERO, 0);
        }
    }

    /// Returns `polled`, or an error if it has been pending for too long.
    fn watch<T>(
        &mut self,
        context: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
        passed: impl FnOnce(&T) -> u64,
    ) -> Poll<io::Result<T>> {
        if let Poll::Ready(result) = &polled {
            self.stop(result.as_ref().map_or(0, passed));
            return polled;
        }
        ready!(self.poll(context));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, NOT_TAKEN)))
    }
}

const NOT_TAKEN: &str = "the peer does not read what it asked for";

/// A connection that fails if the peer reads nothing for too long.
#[derive(Debug)]
pub(super) struct TimedStream<S> {
    inner: S,
    alarm: Alarm,
}

impl<S> TimedStream<S> {
    /// Wraps `inner`; a peer may delay its writes within `terms`.
    pub(super) fn new(inner: S, terms: Terms) -> TimedStream<S> {
        TimedStream { inner, alarm: Alarm::new(terms) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for TimedStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TimedStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.alarm.watch(context, polled, |taken| *taken as u64)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write_vectored(context, slices);
        self.alarm.watch(context, polled, |taken| *taken as u64)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_flush(context);
        self.alarm.watch(context, polled, |_| 0)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_shutdown(context);
        self.alarm.watch(context, polled, |_| 0)
    }
}

/// A request's body that fails if nothing of it arrives for too long.
#[derive(Debug)]
pub(super) struct PatientBody {
    inner: Incoming,
    alarm: Alarm,
}

impl PatientBody {
    /// Wraps `inner`; a peer may pause between its parts within `terms`.
    pub(super) fn new(inner: Incoming, terms: Terms) -> PatientBody {
        PatientBody { inner, alarm: Alarm::new(terms) }
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
                let data = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref());
                let len = data.map_or(0, Bytes::len);
                self.alarm.stop(len as u64);
                Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
            }
            Poll::Pending => {
                ready!(self.alarm.poll(context));
                Poll::Ready(Some(Err("nothing of it came for too long, or too little".into())))
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
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const LIMIT: Duration = Duration::from_secs(30);
    const TERMS: Terms = Terms { pause: LIMIT, window: Duration::from_secs(60), least: 8 };

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_is_given_up_and_one_that_takes_some_is_not() {
        let (mut far, near) = tokio::io::duplex(16);
        let mut near = TimedStream::new(near, TERMS);
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
        let mut near = TimedStream::new(near, TERMS);
        for _ in 0..3 {
            near.write_all(&[1; 16]).await.unwrap();
            tokio::time::sleep(LIMIT * 2).await;
            far.read_exact(&mut [0; 16]).await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_a_byte_now_and_then_is_given_up() {
        let (mut far, near) = tokio::io::duplex(16);
        let mut near = TimedStream::new(near, TERMS);
        let reader = tokio::spawn(async move {
            // Seven bytes a minute, where eight are required.
            for _ in 0..100 {
                tokio::time::sleep(Duration::from_millis(8600)).await;
                if far.read_exact(&mut [0]).await.is_err() {
                    break;
                }
            }
            far
        });
        let start = Instant::now();
        let error = near.write_all(&[1; 100]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(start.elapsed(), TERMS.window, "however often it took one");
        drop(near);
        reader.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_peer_that_keeps_the_rate_is_served_to_the_end() {
        let (mut far, near) = tokio::io::duplex(16);
        let mut near = TimedStream::new(near, TERMS);
        let reader = tokio::spawn(async move {
            for _ in 0..200 {
                tokio::time::sleep(Duration::from_secs(7)).await;
                far.read_exact(&mut [0]).await.unwrap();
            }
            far
        });
        near.write_all(&[1; 200]).await.unwrap();
        reader.await.unwrap();
    }
}
