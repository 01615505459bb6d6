//! What a container of each test image runs, and when that start counts as useful.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The path inside the container of the directory that [`Application::prepare`] fills.
pub(crate) const READY: &str = "/ready";
/// The name of a server's socket in [`READY`].
const SOCKET: &str = "socket";
/// How long a server may take to give its first answer.
const TIMEOUT: Duration = Duration::from_secs(120);
/// The pause between two requests to a server that does not answer yet.
const PAUSE: Duration = Duration::from_micros(500);

const NGINX: &str = "daemon off;
pid /ready/nginx.pid;
error_log /ready/error.log;
events {}
http {
  include /etc/nginx/mime.types;
  access_log off;
  server { listen unix:/ready/socket; root /var/www/html; }
}
";

/// When a start counts as done.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Useful {
    /// When the command exits.
    Exits,
    /// When the server answers `request` with bytes that begin with `answer`.
    Answers {
        /// The bytes that are sent.
        request: &'static str,
        /// The first bytes of the expected answer.
        answer: &'static str,
    },
}

/// The application of one test image.
#[derive(Debug)]
pub(crate) struct Application {
    /// The image's name.
    pub(crate) image: &'static str,
    /// The command that the container runs.
    pub(crate) command: &'static [&'static str],
    /// When the start counts as done.
    pub(crate) useful: Useful,
    /// Name and content of a file to place in [`READY`].
    file: Option<(&'static str, &'static str)>,
}

const APPLICATIONS: &[Application] = &[
    Application { image: "bash", command: &["bash", "-c", "echo ready"], useful: Useful::Exits, file: None },
    Application {
        image: "python3",
        command: &["python3", "-c", "import json, ssl, sqlite3, asyncio"],
        useful: Useful::Exits,
        file: None,
    },
    Application {
        image: "nginx",
        command: &["nginx", "-c", "/ready/nginx.conf"],
        useful: Useful::Answers { request: "GET / HTTP/1.0\r\n\r\n", answer: "HTTP/1.1 200" },
        file: Some(("nginx.conf", NGINX)),
    },
    Application {
        image: "redis",
        command: &["redis-server", "--port", "0", "--unixsocket", "/ready/socket", "--save", ""],
        useful: Useful::Answers { request: "PING\r\n", answer: "+PONG" },
        file: None,
    },
    Application {
        image: "gcc",
        command: &["sh", "-c", "gcc -o /tmp/hello /srv/hello/hello.c && /tmp/hello"],
        useful: Useful::Exits,
        file: None,
    },
    Application {
        image: "nodejs",
        command: &["node", "-e", "console.log('ready')"],
        useful: Useful::Exits,
        file: None,
    },
    Application { image: "ai", command: &["python3", "-c", "import torch"], useful: Useful::Exits, file: None },
    Application { image: "weights", command: &["python3", "-c", READ_WEIGHTS], useful: Useful::Exits, file: None },
];

/// Maps the whole file and touches each of its pages, as loaders of models do.
const READ_WEIGHTS: &str = "import mmap
file = open('/srv/weights', 'rb')
pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print(sum(pages[at] for at in range(0, len(pages), 4096)))";

/// The application of a test image, if it has one.
pub(crate) fn of(image: &str) -> Result<&'static Application> {
    let names = || APPLICATIONS.iter().map(|application| application.image).collect::<Vec<_>>().join(", ");
    let found = APPLICATIONS.iter().find(|application| application.image == image);
    found.with_context(|| format!("there is no test image {image} with an application; there are {}", names()))
}

impl Application {
    /// Fills the directory that becomes [`READY`].
    pub(crate) fn prepare(&self, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory)?;
        // Servers drop root's privileges and must still be able to write here.
        fs::set_permissions(directory, fs::Permissions::from_mode(0o777))?;
        if let Some((name, content)) = self.file {
            fs::write(directory.join(name), content)?;
        }
        Ok(())
    }

    /// Waits until a server answers on its socket in the directory `ready`. `alive` fails when there is nothing left to wait for.
    pub(crate) fn wait_for_answer(&self, ready: &Path, mut alive: impl FnMut() -> Result<()>) -> Result<()> {
        let Useful::Answers { request, answer } = self.useful else { return Ok(()) };
        let deadline = Instant::now() + TIMEOUT;
        while !answers(&ready.join(SOCKET), request, answer) {
            alive()?;
            if Instant::now() > deadline {
                bail!("{} did not answer within {TIMEOUT:?}", self.image);
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }
}

fn answers(socket: &Path, request: &str, answer: &str) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.write_all(request.as_bytes())?;
        let mut got = vec![0; answer.len()];
        stream.read_exact(&mut got)?;
        Ok(got == answer.as_bytes())
    };
    ask().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_application_has_its_image() {
        let images = [::tests::images::debian_images(), ::tests::images::large_images()].concat();
        for application in APPLICATIONS {
            assert!(images.contains(&application.image), "{}", application.image);
        }
        assert!(format!("{:#}", of("java").unwrap_err()).contains("no test image java"));
    }
}
