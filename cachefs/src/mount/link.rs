//! What keeper and worker say to each other.
//!
//! The keeper starts a worker with one end of a pair of sockets as its standard input, and sends [`Begin`] with everything that the worker
//! needs open. Afterwards the worker tells how it is ([`Notice`]), and the keeper says nothing but [`End`].
//!
//! The worker's standard output is a pipe that says nothing: it is closed when the worker dies ([`live`]).

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;

use nix::sched::CloneFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv,
    recvmsg, send, sendmsg,
};
use serde::{Deserialize, Serialize};

use crate::filesystem::kernel_state::KernelState;
use crate::mount::data_files::DataMount;

/// The longest message, bytes; longer words are cut off.
const MESSAGE_MAX: usize = 16 << 10;
const WORDS_MAX: usize = 4 << 10;
/// The most descriptors that come with a message.
const DESCRIPTORS_MAX: usize = 8;

/// What a worker begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begin {
    /// How many workers have served the mount before.
    pub earlier: u32,
    /// The mount's device, as the mount table shows it: another mount may have its place.
    pub device: String,
    /// Why data files of native trees cannot be served, if they cannot.
    pub no_data: Option<String>,
}

/// What a worker tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Notice {
    /// The mount can be used.
    Ready {
        /// Whether another worker can take it over.
        can_resume: bool,
    },
    /// The worker cannot serve, and ends.
    Failed(String),
    /// The keeper is to let go of the mount of the data files.
    LetGo,
    /// The mount has ended, and so does the worker.
    Ended,
}

/// "Unmount and end."
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct End;

/// What the keeper hands to a worker.
pub struct Handed {
    /// Keeps the cache directory locked.
    pub lock: OwnedFd,
    /// The FUSE device of the mount.
    pub device: OwnedFd,
    /// What the kernel was told, by this mount's earlier workers too.
    pub state: KernelState,
    /// The data files of native trees, or why there are none.
    pub data: Result<DataMount, String>,
    /// How many workers have served the mount before.
    pub earlier: u32,
    /// The mount's device, as the mount table shows it.
    pub mount_device: String,
}

/// A worker's end.
#[derive(Debug)]
pub struct Link(OwnedFd);

/// Makes the standard output of this process a pipe that is closed as soon as the process is killed (or its core is written, if it crashes
/// where cores are kept), even if one of its threads cannot end because it waits for the mount that this process serves: one thread that does
/// nothing alone has it open. Call it before anything else.
pub fn live() -> io::Result<()> {
    let (send, receive) = mpsc::channel();
    let hold = move || {
        let _ = send.send(nix::sched::unshare(CloneFlags::CLONE_FILES));
        loop {
            std::thread::park();
        }
    };
    std::thread::Builder::new().name("cachefs-life".to_owned()).spawn(hold)?;
    receive.recv().map_err(io::Error::other)??;
    // Afterwards this process's other threads do not have it open.
    Ok(nix::unistd::dup2_stdout(std::io::stderr())?)
}

impl Link {
    /// The worker's end, with what the keeper hands over.
    pub fn begin() -> io::Result<(Link, Handed)> {
        let link = Link(std::io::stdin().as_fd().try_clone_to_owned()?);
        let (begin, descriptors) = receive_with_descriptors(&link.0)?;
        let Begin { earlier, device: mount_device, no_data } = serde_json::from_slice(&begin)?;
        let mut descriptors = descriptors.into_iter();
        let mut next = || descriptors.next().ok_or_else(|| io::Error::other("the keeper has handed over too little"));
        let (lock, device) = (next()?, next()?);
        let state = KernelState::open(File::from(next()?), &File::from(next()?))?;
        let data = match no_data {
            Some(why) => Err(why),
            None => Ok(DataMount { device: next()?, mount: next()? }),
        };
        Ok((link, Handed { lock, device, state, data, earlier, mount_device }))
    }

    /// Tells the keeper something. If that has died, nobody is told.
    pub fn tell(&self, notice: &Notice) {
        let notice = match notice {
            Notice::Failed(words) => Notice::Failed(words.chars().take(WORDS_MAX).collect()),
            notice => notice.clone(),
        };
        if let Err(error) = say(self.0.as_fd(), &notice) {
            tracing::warn!("the keeper is not told {notice:?}: {error}");
        }
    }

    /// Waits until the keeper says that this is to end. If the keeper dies, this never returns: the kernel is about to kill this process, whose
    /// threads must not begin to wait for the mount.
    pub fn wait_for_end(&self) {
        if !matches!(hear::<End>(self.0.as_fd()), Ok(Some(End))) {
            loop {
                std::thread::park();
            }
        }
    }
}

/// Sends a message.
pub(super) fn say(socket: BorrowedFd<'_>, message: &impl Serialize) -> io::Result<()> {
    send(socket, &serde_json::to_vec(message)?, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives a message; nothing if the other side is gone.
pub(super) fn hear<T: serde::de::DeserializeOwned>(socket: BorrowedFd<'_>) -> io::Result<Option<T>> {
    let mut buffer = vec![0; MESSAGE_MAX];
    let (len, _) = rustix::io::retry_on_intr(|| recv(socket, &mut buffer[..], RecvFlags::empty()))?;
    Ok(if len == 0 { None } else { Some(serde_json::from_slice(&buffer[..len])?) })
}

/// Sends a message with descriptors.
pub(super) fn hand_over(socket: BorrowedFd<'_>, begin: &Begin, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("these are too many descriptors"));
    }
    let message = serde_json::to_vec(begin)?;
    sendmsg(socket, &[io::IoSlice::new(&message)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive_with_descriptors(socket: &OwnedFd) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let (mut ancillary, mut message) = (RecvAncillaryBuffer::new(&mut space), vec![0; MESSAGE_MAX]);
    let received = recvmsg(socket, &mut [io::IoSliceMut::new(&mut message)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    message.truncate(received.bytes);
    let descriptors = ancillary.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
        _ => Vec::new(),
    });
    Ok((message, descriptors.collect()))
}
