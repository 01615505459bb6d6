//! A site that listens on the network, with TLS from its own authority and tokens for its clients.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::cluster::{Ctl, MountSpec};
use crate::hosts;
use crate::registry::{Authority, free_port};
use crate::site::{Site, SiteSpec};

/// A site with a TLS address besides its socket.
#[derive(Debug)]
pub struct Secured {
    /// The site. Its own `ctl` uses the socket, as root.
    pub site: Site,
    /// The authority that signed the certificate.
    pub authority: Authority,
    port: u16,
    // Dropped after the site, because the coordinator reads the certificate as long as it runs.
    directory: tempfile::TempDir,
}

impl Secured {
    /// Starts a coordinator for a new, empty store.
    pub fn start(spec: &SiteSpec) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("secured-").tempdir()?;
        let authority = Authority::new()?;
        let tls = authority.issue(directory.path(), "server")?;
        std::fs::write(directory.path().join("authority.pem"), authority.pem())?;
        let port = free_port()?;
        let listen = Some(format!("127.0.0.1:{port}"));
        let site = Site::start_with(&SiteSpec { listen, tls: Some(tls), ..spec.clone() })?;
        Ok(Self { site, authority, port, directory })
    }

    /// `https://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// The file with the authority's certificate.
    pub fn authority_file(&self) -> PathBuf {
        self.directory.path().join("authority.pem")
    }

    /// Gives the coordinator a certificate by a new authority, which replaces the trusted one.
    pub fn change_authority(&mut self) -> Result<()> {
        let authority = Authority::new()?;
        authority.issue(self.directory.path(), "server")?;
        std::fs::write(self.authority_file(), authority.pem())?;
        self.authority = authority;
        Ok(())
    }

    /// The file with the coordinator's private key.
    pub fn key_file(&self) -> PathBuf {
        self.directory.path().join("server.key")
    }

    /// Creates a token. `more` are further arguments of `token create`.
    pub fn token(&self, name: &str, role: &str, more: &[&str]) -> Result<String> {
        let created = self.site.ctl().json(&[&["token", "create", name, "--role", role], more].concat())?;
        Ok(created["token"].as_str().context("no token was made")?.to_owned())
    }

    /// A `cachefsctl` that connects over TLS and sends this token, if any.
    pub fn ctl(&self, token: Option<&str>) -> Ctl {
        let mut environment =
            vec![("CACHEFS_CA_CERTIFICATE".to_owned(), self.authority_file().to_string_lossy().into_owned())];
        environment.extend(token.map(|token| ("CACHEFS_TOKEN".to_owned(), token.to_owned())));
        Ctl { server: self.url(), environment }
    }

    /// The mount of the host `name`, which authenticates with this token.
    pub fn host(&self, name: &str, token: &str) -> Result<MountSpec> {
        let mut spec = hosts::host(&self.site, name)?;
        spec.coordinator = Some(self.url());
        spec.arguments =
            vec![format!("--ca-certificate={}", self.authority_file().display()), format!("--host-name={name}")];
        spec.environment.push(("CACHEFS_TOKEN".to_owned(), token.to_owned()));
        Ok(spec)
    }
}
