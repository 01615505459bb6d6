//! Who has how many connections: caps in all and for each peer, well below the number of descriptors that the process has.
//!
//! Everybody may connect, so a connection costs a stranger nothing. What strangers can take is bounded here, and it is never all:
//! the lease on the store, the store itself, the database and the registries need descriptors, too. Administrators on the unix
//! socket, other users of this machine and the network have a pool each, so that none of them can fill another's.
//!
//! A pool that is full closes its oldest connection on which nobody has shown yet that they are known here ([`Place::prove`]), and takes
//! the new one: many silent peers do not keep one out who has something to say. When all are proven the new one is refused.
//!
//! `open` guards the table of a pool and is held for no I/O.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::identity::caller::{Account, Peer};

/// The most connections over the network: each takes some tens of kilobytes.
const REMOTE_MAX: u64 = 2048;
/// The most connections on the unix socket, of administrators and of all others.
const LOCAL_MAX: u64 = 256;
/// What part of the remote connections one address may have.
const SHARE_OF_ADDRESS: usize = 4;
/// What part of the local connections one user may have.
const SHARE_OF_USER: usize = 2;

/// Raises the number of descriptors to what the system allows this process; tells how many there are.
pub fn raise_descriptor_limit() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    match soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() {
        true => hard,
        false => soft,
    }
}

/// Whose connections are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum PeerKey {
    User(Option<u32>),
    /// An IPv4 address, or the network of an IPv6 one: whoever has one address of such a network has all of them.
    Network(IpAddr),
}

impl PeerKey {
    fn of(peer: &Peer) -> PeerKey {
        match peer {
            Peer::Local(account) => PeerKey::User(account.map(|account: Account| account.uid)),
            Peer::Loopback(address) | Peer::Remote(address) => PeerKey::Network(match address.ip().to_canonical() {
                IpAddr::V4(address) => address.into(),
                IpAddr::V6(address) => {
                    let [a, b, c, d, ..] = address.segments();
                    std::net::Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
                }
            }),
        }
    }
}

/// All pools.
#[derive(Debug)]
pub struct Connections {
    /// The user that the coordinator runs as.
    own: u32,
    admins: Arc<Pool>,
    users: Arc<Pool>,
    network: Arc<Pool>,
}

impl Connections {
    /// The pools of a process with so many descriptors, of which most remain for other things.
    pub fn new(descriptors: u64, own: u32) -> Connections {
        let size = |part: u64, most: u64| usize::try_from((descriptors / part).clamp(8, most)).unwrap_or(8);
        let local = size(16, LOCAL_MAX);
        let remote = size(4, REMOTE_MAX);
        Connections {
            own,
            // Root and the coordinator's own user are whom this protects: they share one pool, and each may fill it.
            admins: Pool::new(local, local),
            users: Pool::new(local, local.div_ceil(SHARE_OF_USER)),
            network: Pool::new(remote, remote.div_ceil(SHARE_OF_ADDRESS)),
        }
    }

    /// A place for a new connection; nothing if there is none, and the connection is to be closed.
    pub fn enter(&self, peer: &Peer) -> Option<Place> {
        let pool = match peer {
            Peer::Local(Some(account)) if account.uid == 0 || account.uid == self.own => &self.admins,
            Peer::Local(_) => &self.users,
            Peer::Loopback(_) | Peer::Remote(_) => &self.network,
        };
        pool.enter(PeerKey::of(peer))
    }
}

/// The connections of one kind of peers.
#[derive(Debug)]
struct Pool {
    in_all: usize,
    per_peer: usize,
    open: Mutex<Table>,
}

/// Connections in the order in which they came.
#[derive(Debug, Default)]
struct Table {
    next: u64,
    all: BTreeMap<u64, Open>,
    per_peer: HashMap<PeerKey, usize>,
    /// Those that are told to end and have not yet.
    ending: usize,
}

#[derive(Debug)]
struct Open {
    peer: PeerKey,
    proven: bool,
    closed: CancellationToken,
}

impl Table {
    /// Takes a connection out of the count.
    fn remove(&mut self, number: u64) -> Option<Open> {
        let open = self.all.remove(&number)?;
        if let Some(count) = self.per_peer.get_mut(&open.peer) {
            *count -= 1;
            if *count == 0 {
                self.per_peer.remove(&open.peer);
            }
        }
        Some(open)
    }

    /// Closes the oldest connection that is not proven, of `peer` or of anybody.
    fn close_oldest(&mut self, peer: Option<PeerKey>) -> bool {
        let is_open = |open: &Open| !open.proven && peer.is_none_or(|peer| open.peer == peer);
        let oldest = self.all.iter().find(|(_, open)| is_open(open)).map(|(number, _)| *number);
        let Some(open) = oldest.and_then(|number| self.remove(number)) else { return false };
        self.ending += 1;
        open.closed.cancel();
        true
    }
}

impl Pool {
    fn new(in_all: usize, per_peer: usize) -> Arc<Pool> {
        Arc::new(Pool { in_all, per_peer, open: Mutex::default() })
    }

    fn enter(self: &Arc<Pool>, peer: PeerKey) -> Option<Place> {
        let mut open = self.open.lock();
        // Those that were told to end still have their descriptors for a moment.
        if open.ending > self.in_all / 4 {
            return None;
        }
        let own = open.per_peer.get(&peer).copied().unwrap_or(0);
        let has_room = if own >= self.per_peer {
            open.close_oldest(Some(peer))
        } else {
            open.all.len() < self.in_all || open.close_oldest(None)
        };
        if !has_room {
            return None;
        }
        let number = open.next;
        open.next += 1;
        let closed = CancellationToken::new();
        open.all.insert(number, Open { peer, proven: false, closed: closed.clone() });
        *open.per_peer.entry(peer).or_default() += 1;
        drop(open);
        Some(Place(Arc::new(Seat { pool: Arc::clone(self), number, closed })))
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.open.lock().all.len()
    }
}

/// A connection's place; it is free again when the last copy is dropped.
#[derive(Debug, Clone)]
pub struct Place(Arc<Seat>);

#[derive(Debug)]
struct Seat {
    pool: Arc<Pool>,
    number: u64,
    closed: CancellationToken,
}

impl Place {
    /// The peer has shown who they are: others do not push this connection out any more.
    pub fn prove(&self) {
        if let Some(open) = self.0.pool.open.lock().all.get_mut(&self.0.number) {
            open.proven = true;
        }
    }

    /// Waits until the connection is to end because another one takes its place.
    pub async fn closed(&self) {
        self.0.closed.cancelled().await;
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut open = self.pool.open.lock();
        if open.remove(self.number).is_none() {
            open.ending -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(uid: u32) -> Peer {
        Peer::Local(Some(Account { uid, gid: uid }))
    }

    fn remote(address: &str) -> Peer {
        Peer::Remote((address.parse::<IpAddr>().unwrap(), 1).into())
    }

    fn is_closed(place: &Place) -> bool {
        place.0.closed.is_cancelled()
    }

    #[test]
    fn a_full_pool_lets_the_oldest_silent_connection_go_and_keeps_those_that_are_known() {
        let pool = Pool::new(8, 4);
        let peer = PeerKey::of(&remote("10.0.0.1"));
        let places: Vec<_> = (0..4).map(|_| pool.enter(peer).unwrap()).collect();
        places[0].prove();
        let fifth = pool.enter(peer).unwrap();
        assert!(!is_closed(&places[0]) && is_closed(&places[1]) && !is_closed(&places[2]), "the oldest silent one");
        [&places[2], &places[3], &fifth].into_iter().for_each(Place::prove);
        assert!(pool.enter(peer).is_none(), "all of this address are known");
        let others: Vec<_> = (2..6).map(|n| pool.enter(PeerKey::of(&remote(&format!("10.0.0.{n}"))))).collect();
        assert!(others.iter().all(Option::is_some), "another address has room");
        let last = pool.enter(PeerKey::of(&remote("10.0.0.9"))).unwrap();
        assert!(is_closed(others[0].as_ref().unwrap()) && !is_closed(&places[0]) && !is_closed(&last));
        assert_eq!(pool.len(), 8);
        drop((places, fifth, others, last));
        let open = pool.open.lock();
        assert_eq!((open.all.len(), open.ending, open.per_peer.len()), (0, 0, 0));
    }

    #[test]
    fn connections_that_do_not_end_when_told_to_are_bounded_too() {
        let pool = Pool::new(8, 8);
        let peer = PeerKey::of(&remote("10.0.0.1"));
        let held: Vec<_> = (0..100).map_while(|_| pool.enter(peer)).collect();
        assert_eq!(held.len(), 8 + 8 / 4 + 1);
    }

    #[test]
    fn neither_users_nor_the_network_take_the_administrators_places() {
        let connections = Connections::new(1024, 7);
        let (mut strangers, mut remotes) = (Vec::new(), Vec::new());
        for number in 0..2000_u32 {
            let one = connections.enter(&user(1000 + number % 50));
            one.iter().for_each(Place::prove);
            strangers.extend(one);
            let one = connections.enter(&remote(&format!("10.0.{}.{}", number / 250, number % 250)));
            one.iter().for_each(Place::prove);
            remotes.extend(one);
        }
        assert_eq!((strangers.len(), remotes.len()), (64, 256), "of 1024 descriptors");
        for uid in [0, 7] {
            assert!((0..32).map(|_| connections.enter(&user(uid))).collect::<Vec<_>>().iter().all(Option::is_some));
        }
        let one_network: Vec<_> = (0..100).map(|n| connections.enter(&remote(&format!("2001:db8::{n:x}")))).collect();
        assert!(one_network.iter().all(Option::is_none), "the pool is full of known peers");
    }

    #[test]
    fn addresses_of_one_network_are_one_peer() {
        let key = |address: &str| PeerKey::of(&remote(address));
        assert_eq!(key("2001:db8::1"), key("2001:db8::ffff:1"));
        assert_ne!(key("2001:db8::1"), key("2001:db8:0:1::1"));
        assert_eq!(key("::ffff:10.0.0.1"), key("10.0.0.1"));
        assert_ne!(key("10.0.0.1"), key("10.0.0.2"));
    }
}
