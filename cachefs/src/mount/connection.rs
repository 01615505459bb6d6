//! Connections to the kernel that outlive the worker that made them.
//!
//! fuser performs the handshake itself, on the descriptor that it is given, and knows of no connection that has had one. So it is given one
//! end of a socket pair, through which the kernel's request is passed on to it and its answer back; then the device takes the socket's place
//! under the same number. Request and answer are recorded ([`KernelState`]), and the next worker is asked the same question: if it would
//! answer otherwise, it cannot take the connection over.
//!
//! Requests that the earlier worker had read and not answered are sent once more by the kernel, if it is 6.9 or later and told to.
//!
//! All of this holds for the descriptor of the device that the keeper has, never for one that was cloned from it: what was read through a
//! clone fails when that is closed.

use std::io;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};

use fuser::{Config, Session, SessionACL};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use rustix::io::{read, write};
use zerocopy::{FromBytes, IntoBytes};

use crate::filesystem::kernel_state::{Connection, KernelState, Record};

/// The kernel wants to be read from with at least this much room, bytes.
const REQUEST_MAX: usize = 64 << 10;
/// Where a request for a handshake has its flags: the second half of them, behind a header of 40 bytes and four fields.
const FLAGS2: std::ops::Range<usize> = 56..60;
/// The kernel sends requests once more when told to. (`FUSE_HAS_RESEND`, of the second half.)
const HAS_RESEND: u32 = 1 << (39 - 32);
/// "Send all requests once more that were read and not answered."
const NOTIFY_RESEND: u32 = 7;
/// The mark in the number of a request that is sent once more.
pub(super) const RESENT: u64 = 1 << 63;

/// A connection that was made or taken over.
pub(super) struct Connected<F: fuser::Filesystem> {
    pub(super) session: Session<F>,
    /// Whether another worker can take it over without losing a request.
    pub(super) can_resume: bool,
}

/// Makes or takes over the connection of an open `/dev/fuse`.
pub(super) fn connect<F: fuser::Filesystem>(
    filesystem: F,
    device: &OwnedFd,
    (acl, threads): (SessionACL, usize),
    connection: Connection,
    state: &KernelState,
) -> io::Result<Connected<F>> {
    let earlier = state.earlier.iter().find_map(|record| match record {
        Record::Handshake { connection: of, request, reply } if *of == connection => Some((request.clone(), reply)),
        _ => None,
    });
    let mut buffer = vec![0; REQUEST_MAX];
    let (request, agreed) = match earlier {
        Some((request, reply)) => (request, Some(reply)),
        None => {
            let len = read(device, &mut buffer)?;
            (buffer[..len].to_vec(), None)
        }
    };
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
    let (ours, theirs) = pair.map_err(io::Error::from)?;
    write(&ours, &request)?;
    let mut config = Config::default();
    config.acl = acl;
    config.n_threads = Some(threads);
    let session = Session::from_fd(filesystem, theirs, acl, config)?;
    let len = read(&ours, &mut buffer)?;
    let reply = buffer[..len].to_vec();
    match agreed {
        Some(agreed) if *agreed == reply => {}
        Some(_) => {
            return Err(io::Error::other("this version agrees with the kernel on other things than the last one did"));
        }
        None => {
            // Recorded before the kernel can know of it, like everything.
            state.record(&Record::Handshake { connection, request: request.clone(), reply: reply.clone() });
        }
    }
    match write(device, &reply) {
        // The kernel has had it.
        Err(rustix::io::Errno::NOENT) if agreed.is_some() => {}
        written => _ = written?,
    }
    put_in_place(device, session.as_fd().as_raw_fd())?;
    if agreed.is_some() {
        send_again(device)?;
    }
    Ok(Connected { session, can_resume: flags2(&request) & HAS_RESEND != 0 })
}

/// The second half of the flags in a request for a handshake; none in an old kernel's, which is shorter.
fn flags2(request: &[u8]) -> u32 {
    request.get(FLAGS2).and_then(|bytes| u32::read_from_bytes(bytes).ok()).unwrap_or(0)
}

/// Makes `number` a descriptor of the device.
#[expect(unsafe_code, reason = "the number belongs to fuser's session")]
fn put_in_place(device: &OwnedFd, number: i32) -> io::Result<()> {
    // SAFETY: `number` is open and owned by the session, which does not use it on another thread yet; it stays its owner.
    let replaced = unsafe { nix::unistd::dup3_raw(device.as_fd(), number, nix::fcntl::OFlag::O_CLOEXEC) };
    _ = replaced.map_err(io::Error::from)?.into_raw_fd();
    Ok(())
}

/// Has the kernel send all requests once more that were read and not answered.
fn send_again(device: &OwnedFd) -> io::Result<()> {
    // Its length, what it is, and the number 0, which says that it is no answer.
    let message: [u32; 4] = [16, NOTIFY_RESEND, 0, 0];
    match write(device, message.as_bytes()) {
        Ok(_) => Ok(()),
        // Its file system is no longer mounted.
        Err(error) if error.raw_os_error() == Errno::ENODEV as i32 => Ok(()),
        Err(error) => Err(error.into()),
    }
}
