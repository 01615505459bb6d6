//! A network namespace with its own loopback, and connections from it to the outside.

use std::fs::File;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use crate::process::run;

/// A named network namespace; removed when dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Creates a namespace in which only the loopback exists.
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("cachefs-test-{}-{number}", std::process::id());
        run(Command::new("ip").args(["netns", "add", &name]))?.ok().context("cannot make a network namespace")?;
        let namespace = Self { name };
        run(namespace.command("ip").args(["link", "set", "lo", "up"]))?.ok()?;
        Ok(namespace)
    }

    /// A command that runs in the namespace. `ip netns exec` would also remount /sys, which a dockerd must not see.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    /// The file that represents the namespace.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Opens a TCP connection from inside the namespace, for example to a published port of a container.
    pub fn connect(&self, address: &str) -> Result<TcpStream> {
        self.inside(|| Ok(TcpStream::connect(address)?)).with_context(|| format!("cannot connect to {address}"))
    }

    /// Forwards connections to `address` (a loopback address with a port) from inside the namespace to the same address outside.
    pub fn forward(&self, address: &str) -> Result<Forward> {
        let listener = self.inside(|| Ok(TcpListener::bind(address)?));
        let listener = listener.with_context(|| format!("cannot listen at {address} in a namespace"))?;
        let shared = Arc::new(AtomicBool::new(false));
        let (ending, to) = (Arc::clone(&shared), address.to_owned());
        let thread = std::thread::spawn(move || {
            for inner in listener.incoming().flatten() {
                if ending.load(Ordering::Relaxed) {
                    return;
                }
                let to = to.clone();
                std::thread::spawn(move || join(&inner, &TcpStream::connect(to)?));
            }
        });
        let namespace = self.open()?;
        Ok(Forward { ending: shared, thread: Some(thread), namespace, address: address.to_owned() })
    }

    fn open(&self) -> Result<File> {
        File::open(self.path()).with_context(|| format!("cannot open the namespace {}", self.name))
    }

    /// Runs `work` on a thread that has entered the namespace. Sockets made there belong to the namespace.
    fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        inside(&self.open()?, work)
    }
}

fn inside<T: Send>(namespace: &File, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let enter = || {
        setns(namespace, CloneFlags::CLONE_NEWNET).context("cannot enter a network namespace")?;
        work()
    };
    std::thread::scope(|scope| scope.spawn(enter).join()).map_err(|_| anyhow!("a thread in a namespace panicked"))?
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = run(Command::new("ip").args(["netns", "delete", &self.name]));
    }
}

/// A forwarded address of a namespace; closed when dropped.
#[derive(Debug)]
pub struct Forward {
    ending: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
    namespace: File,
    address: String,
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts connections.
        if inside(&self.namespace, || Ok(TcpStream::connect(&self.address)?)).is_ok() {
            let _ = self.thread.take().map(std::thread::JoinHandle::join);
        }
    }
}

/// Copies bytes in both directions until both sides have ended.
fn join(one: &TcpStream, other: &TcpStream) -> std::io::Result<()> {
    let pass = |mut from: &TcpStream, mut to: &TcpStream| {
        let passed = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
        passed
    };
    std::thread::scope(|scope| {
        scope.spawn(|| pass(one, other));
        pass(other, one)
    })?;
    Ok(())
}
