//! Limits the number of connections, in total and per peer, to well below the process's number of descriptors.
//!
//! Anybody may connect, so a connection costs a stranger nothing. What strangers can occupy is limited here, and it is never
//! everything: the lease on the store, the store itself, the database and the registries need descriptors, too. Administrators on
//! the unix socket, other users of this machine and the network each have a pool, so that none of them can exhaust another's.
//!
//! A full pool closes its oldest connection whose peer has not been authenticated yet ([`ConnectionPermit::prove`]) and accepts
//! the new one: many silent peers cannot lock out a legitimate one. If all are authenticated, the new connection is refused.
//!
//! `open` guards a pool's table and is never held during I/O.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::identity::caller::{Account, Peer};

/// The most connections over the network. Each takes some tens of kilobytes.
const REMOTE_MAX: u64 = 2048;
/// The most connections on the unix socket: of administrators, and of all other users.
const LOCAL_MAX: u64 = 256;
/// One address may use one part in this many of the network connections.
const SHARE_OF_ADDRESS: usize = 4;
/// One user other than an administrator may use one part in this many of the local connections.
const SHARE_OF_USER: usize = 2;

/// Raises the limit of descriptors to what the system allows this process. Returns the limit.
pub fn raise_descriptor_limit() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() { hard } else { soft }
}

/// Peers whose connections are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum PeerKey {
    User(Option<u32>),
    /// An IPv4 address or an IPv6 /64 network: whoever has one address of such a network has all of them.
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

/// The pools of connections.
#[derive(Debug)]
pub struct Connections {
    /// The user that the coordinator runs as.
    own: u32,
    admins: Arc<Pool>,
    users: Arc<Pool>,
    network: Arc<Pool>,
}

impl Connections {
    /// Pools for a process with this many descriptors, most of which stay free for other uses.
    pub fn new(descriptors: u64, own: u32) -> Connections {
        let size = |part: u64, most: u64| usize::try_from((descriptors / part).clamp(8, most)).unwrap_or(8);
        let local = size(16, LOCAL_MAX);
        let remote = size(4, REMOTE_MAX);
        Connections {
            own,
            // The pools protect root and the coordinator's own user from others: these two share one pool, and each may fill it.
            admins: Pool::new(local, local),
            users: Pool::new(local, local.div_ceil(SHARE_OF_USER)),
            network: Pool::new(remote, remote.div_ceil(SHARE_OF_ADDRESS)),
        }
    }

    /// Admits a new connection. `None` if there is no room and the connection must be closed.
    pub fn enter(&self, peer: &Peer) -> Option<ConnectionPermit> {
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
    open: Mutex<ConnectionTable>,
}

/// The open connections, oldest first.
#[derive(Debug, Default)]
struct ConnectionTable {
    next: u64,
    all: BTreeMap<u64, Open>,
    per_peer: HashMap<PeerKey, usize>,
    /// Connections that were told to end but still exist.
    ending: usize,
}

#[derive(Debug)]
struct Open {
    peer: PeerKey,
    proven: bool,
    closed: CancellationToken,
}

impl ConnectionTable {
    /// Stops counting a connection.
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

    /// Closes the oldest unauthenticated connection, of `peer` or of anybody.
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

    fn enter(self: &Arc<Pool>, peer: PeerKey) -> Option<ConnectionPermit> {
        let mut open = self.open.lock();
        // Connections that were told to end keep their descriptors for a moment.
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
        Some(ConnectionPermit(Arc::new(ConnectionRecord { pool: Arc::clone(self), number, closed })))
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.open.lock().all.len()
    }
}

/// An admitted connection. Its place becomes free when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct ConnectionPermit(Arc<ConnectionRecord>);

#[derive(Debug)]
struct ConnectionRecord {
    pool: Arc<Pool>,
    number: u64,
    closed: CancellationToken,
}

impl ConnectionPermit {
    /// Marks the peer as authenticated: the connection is no longer closed in favour of others.
    pub fn prove(&self) {
        if let Some(open) = self.0.pool.open.lock().all.get_mut(&self.0.number) {
            open.proven = true;
        }
    }

    /// Waits until the connection must close to make room for another one.
    pub async fn closed(&self) {
        self.0.closed.cancelled().await;
    }
}

impl Drop for ConnectionRecord {
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

    fn is_closed(permit: &ConnectionPermit) -> bool {
        permit.0.closed.is_cancelled()
    }

    #[test]
    fn a_full_pool_lets_the_oldest_silent_connection_go_and_keeps_those_that_are_known() {
        let pool = Pool::new(8, 4);
        let peer = PeerKey::of(&remote("10.0.0.1"));
        let places: Vec<_> = (0..4).map(|_| pool.enter(peer).unwrap()).collect();
        places[0].prove();
        let fifth = pool.enter(peer).unwrap();
        assert!(!is_closed(&places[0]) && is_closed(&places[1]) && !is_closed(&places[2]), "the oldest silent one");
        [&places[2], &places[3], &fifth].into_iter().for_each(ConnectionPermit::prove);
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
            one.iter().for_each(ConnectionPermit::prove);
            strangers.extend(one);
            let one = connections.enter(&remote(&format!("10.0.{}.{}", number / 250, number % 250)));
            one.iter().for_each(ConnectionPermit::prove);
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
