//! Layers into images: config, manifest, index; an OCI layout and a `docker save` archive.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::archive::{Archive, Header, Kind};
use super::blobs::{Compression, Descriptor, Pool, SparseFile, digest_of, hex};

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// When every image here was made.
const CREATED: &str = "2026-01-01T00:00:00Z";

/// Which of the two families of media types manifests use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MediaTypes {
    /// `application/vnd.oci.image.*`.
    Oci,
    /// `application/vnd.docker.*`, manifest schema 2.
    Docker,
}

impl MediaTypes {
    /// The name in this family of an OCI media type.
    pub fn of(self, oci: &str) -> String {
        let docker = match oci {
            OCI_MANIFEST => "application/vnd.docker.distribution.manifest.v2+json",
            OCI_INDEX => "application/vnd.docker.distribution.manifest.list.v2+json",
            OCI_CONFIG => "application/vnd.docker.container.image.v1+json",
            "application/vnd.oci.image.layer.v1.tar+gzip" => "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "application/vnd.oci.image.layer.v1.tar" => "application/vnd.docker.image.rootfs.diff.tar",
            other => other,
        };
        if self == Self::Docker { docker } else { oci }.to_owned()
    }
}

/// Where the files of images lie: raw layer tars and blobs, each under its digest.
#[derive(Debug, Clone)]
pub struct Pools {
    /// Uncompressed layer tars by diffID.
    pub tars: Pool,
    /// Blobs by digest.
    pub blobs: Pool,
}

impl Pools {
    /// The pools `tars` and `blobs` below `directory`.
    pub fn open(directory: &Path) -> Result<Self> {
        Ok(Self { tars: Pool::open(&directory.join("tars"))?, blobs: Pool::open(&directory.join("blobs"))? })
    }

    /// A layer from a tar in memory.
    pub fn layer(&self, tar: &[u8], compression: Compression) -> Result<Layer> {
        self.layer_from(|sink| Ok(sink.write_all(tar)?), compression)
    }

    /// A layer from a tar that `write` writes.
    pub fn layer_from(
        &self,
        write: impl FnOnce(&mut super::blobs::Sink) -> Result<()>,
        compression: Compression,
    ) -> Result<Layer> {
        let mut sink = self.tars.sink()?;
        write(&mut sink)?;
        let tar = sink.keep("application/x-tar")?;
        let path = self.tars.path(&tar.digest);
        let blob = self.blobs.compress(&path, compression, compression.layer_type())?;
        Ok(Layer { tar: path, diff_id: tar.digest, blob, created_by: "COPY files / # test".into() })
    }

    /// A layer whose blob is exactly `blob`, whatever that is, and whose claims need not be true.
    pub fn raw_layer(&self, blob: &[u8], media_type: &str, diff_id: &str) -> Result<Layer> {
        let blob = self.blobs.put(blob, media_type)?;
        Ok(Layer {
            tar: self.tars.path(diff_id),
            diff_id: diff_id.into(),
            blob,
            created_by: "COPY raw / # test".into(),
        })
    }
}

/// One layer of an image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Layer {
    /// The uncompressed tar.
    pub tar: PathBuf,
    /// Digest of the uncompressed tar.
    pub diff_id: String,
    /// The blob as a registry holds it.
    pub blob: Descriptor,
    /// The line of the image's history.
    pub created_by: String,
}

/// Puts an image together. What is not said is left out of the config.
#[derive(Debug, Clone)]
pub struct ImageBuilder {
    name: String,
    layers: Vec<Layer>,
    config: BTreeMap<&'static str, Value>,
    platform: BTreeMap<&'static str, String>,
    media_types: MediaTypes,
}

impl ImageBuilder {
    /// An image `name:latest` for linux/amd64 without layers, with OCI media types.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            layers: Vec::new(),
            config: BTreeMap::new(),
            platform: BTreeMap::from([("architecture", "amd64".to_owned()), ("os", "linux".to_owned())]),
            media_types: MediaTypes::Oci,
        }
    }

    /// Puts a layer on top.
    pub fn layer(mut self, layer: Layer) -> Self {
        self.layers.push(layer);
        self
    }

    /// Adds `NAME=value` to the environment.
    pub fn env(mut self, variable: &str) -> Self {
        let list = self.config.entry("Env").or_insert_with(|| json!([]));
        list.as_array_mut().into_iter().for_each(|list| list.push(json!(variable)));
        self
    }

    /// Sets the command.
    pub fn cmd(self, words: &[&str]) -> Self {
        self.setting("Cmd", json!(words))
    }

    /// Sets the entry point.
    pub fn entrypoint(self, words: &[&str]) -> Self {
        self.setting("Entrypoint", json!(words))
    }

    /// Sets the user.
    pub fn user(self, user: &str) -> Self {
        self.setting("User", json!(user))
    }

    /// Sets the working directory.
    pub fn workdir(self, path: &str) -> Self {
        self.setting("WorkingDir", json!(path))
    }

    /// Adds a label.
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.config.entry("Labels").or_insert_with(|| json!({}))[name] = json!(value);
        self
    }

    /// Sets any other field of the config's `config` object.
    pub fn setting(mut self, field: &'static str, value: Value) -> Self {
        self.config.insert(field, value);
        self
    }

    /// Sets the platform; `variant` may be empty.
    pub fn platform(mut self, os: &str, architecture: &str, variant: &str) -> Self {
        self.platform = BTreeMap::from([("architecture", architecture.to_owned()), ("os", os.to_owned())]);
        if !variant.is_empty() {
            self.platform.insert("variant", variant.to_owned());
        }
        self
    }

    /// Chooses the media types of manifest, config and layers.
    pub fn media_types(mut self, media_types: MediaTypes) -> Self {
        self.media_types = media_types;
        self
    }

    /// Writes the image below `directory`: `oci/` and `image.json`.
    pub fn build(self, pools: &Pools, directory: &Path) -> Result<ImageFiles> {
        let config = pools.blobs.put(&self.config_json()?, &self.media_types.of(OCI_CONFIG))?;
        let blobs: Vec<_> = self.layers.iter().map(|layer| self.blob_of(layer)).collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": self.media_types.of(OCI_MANIFEST), "config": config, "layers": blobs,
        });
        let media_type = self.media_types.of(OCI_MANIFEST);
        let manifest = pools.blobs.put(&serde_json::to_vec_pretty(&manifest)?, &media_type)?;
        let mut contents = vec![manifest.clone(), config.clone()];
        contents.extend(blobs);
        let oci = directory.join("oci");
        write_layout(pools, &oci, &self.name, &manifest, &contents)?;
        let files = ImageFiles {
            name: self.name,
            directory: directory.to_owned(),
            oci,
            manifest,
            config,
            layers: self.layers,
            platform: self.platform.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        };
        std::fs::write(directory.join("image.json"), serde_json::to_vec_pretty(&files)?)?;
        Ok(files)
    }

    fn blob_of(&self, layer: &Layer) -> Descriptor {
        Descriptor { media_type: self.media_types.of(&layer.blob.media_type), ..layer.blob.clone() }
    }

    fn config_json(&self) -> Result<Vec<u8>> {
        let mut history: Vec<_> =
            self.layers.iter().map(|layer| json!({"created": CREATED, "created_by": layer.created_by})).collect();
        if let Some(command) = self.config.get("Cmd") {
            let line = format!("/bin/sh -c #(nop)  CMD {command}");
            history.push(json!({"created": CREATED, "created_by": line, "empty_layer": true}));
        }
        let diff_ids: Vec<_> = self.layers.iter().map(|layer| &layer.diff_id).collect();
        let mut document = json!({
            "created": CREATED, "config": self.config, "history": history,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        for (field, value) in &self.platform {
            document[*field] = json!(value);
        }
        Ok(serde_json::to_vec(&document)?)
    }
}

/// An image on disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImageFiles {
    /// Its name without a tag.
    pub name: String,
    /// The directory that holds what follows.
    pub directory: PathBuf,
    /// An OCI image layout, with the image as `NAME:latest`.
    pub oci: PathBuf,
    /// The manifest.
    pub manifest: Descriptor,
    /// The config; its digest is the image's ID in Docker.
    pub config: Descriptor,
    /// The layers, lowest first.
    pub layers: Vec<Layer>,
    /// `os`, `architecture` and perhaps `variant`.
    pub platform: BTreeMap<String, String>,
}

impl ImageFiles {
    /// The image that [`ImageBuilder::build`] wrote below `directory` earlier.
    pub fn open(directory: &Path) -> Result<Self> {
        let path = directory.join("image.json");
        let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))
    }

    /// The bytes of a blob of this image.
    pub fn blob(&self, digest: &str) -> Result<Vec<u8>> {
        let path = self.blob_path(digest);
        std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// The file of a blob of this image.
    pub fn blob_path(&self, digest: &str) -> PathBuf {
        self.oci.join("blobs/sha256").join(hex(digest))
    }

    /// The diffIDs, lowest first.
    pub fn diff_ids(&self) -> Vec<String> {
        self.layers.iter().map(|layer| layer.diff_id.clone()).collect()
    }

    /// The chainIDs, lowest first; the last one names the whole image.
    pub fn chain_ids(&self) -> Vec<String> {
        let mut chain: Vec<String> = Vec::new();
        for layer in &self.layers {
            let id = match chain.last() {
                None => layer.diff_id.clone(),
                Some(below) => digest_of(format!("{below} {}", layer.diff_id).as_bytes()),
            };
            chain.push(id);
        }
        chain
    }

    /// The manifest with the media types of `family`: its own type, then its bytes.
    pub fn manifest_as(&self, family: MediaTypes) -> Result<(String, Vec<u8>)> {
        let mut manifest: Value = serde_json::from_slice(&self.blob(&self.manifest.digest)?)?;
        let translate = |value: &mut Value| {
            let translated = value.as_str().map(|name| family.of(name));
            *value = json!(translated);
        };
        translate(&mut manifest["mediaType"]);
        translate(&mut manifest["config"]["mediaType"]);
        for layer in manifest["layers"].as_array_mut().into_iter().flatten() {
            translate(&mut layer["mediaType"]);
        }
        let media_type = manifest["mediaType"].as_str().unwrap_or(OCI_MANIFEST).to_owned();
        Ok((media_type, serde_json::to_vec_pretty(&manifest)?))
    }

    /// The next build of this image: its layers below one with the tar `top`, the same name, and containers that run the
    /// same. Its files lie below `directory`.
    pub fn next_build(&self, top: &[u8], directory: &Path) -> Result<ImageFiles> {
        let pools = Pools::open(&directory.join("pools"))?;
        let mut builder = ImageBuilder::new(&self.name);
        for layer in &self.layers {
            let raw = pools.raw_layer(&self.blob(&layer.blob.digest)?, &layer.blob.media_type, &layer.diff_id)?;
            builder = builder.layer(Layer { tar: layer.tar.clone(), ..raw });
        }
        let config: Value = serde_json::from_slice(&self.blob(&self.config.digest)?)?;
        for field in ["Entrypoint", "Cmd", "Env", "WorkingDir", "User"] {
            if let Some(value) = config["config"].get(field) {
                builder = builder.setting(field, value.clone());
            }
        }
        builder.layer(pools.layer(top, Compression::Gzip)?).build(&pools, &directory.join("image"))
    }

    /// Bytes of all layer blobs together.
    pub fn compressed_size(&self) -> u64 {
        self.layers.iter().map(|layer| layer.blob.size).sum()
    }

    /// The image as `docker save` writes it, made at the first call.
    pub fn docker_archive(&self) -> Result<PathBuf> {
        let path = self.directory.join("docker.tar");
        if path.exists() {
            return Ok(path);
        }
        let partial = tempfile::Builder::new().prefix(".partial-").tempfile_in(&self.directory)?;
        self.write_docker_archive(partial.path())?;
        partial.persist(&path).context("cannot name the finished archive")?;
        Ok(path)
    }

    fn write_docker_archive(&self, path: &Path) -> Result<()> {
        let mut archive = Archive::new(SparseFile::create(path)?);
        let config = format!("{}.json", hex(&self.config.digest));
        archive.add(&Header::new(Kind::File, &config), self.blob(&self.config.digest)?)?;
        let name = |layer: &Layer| format!("{}.tar", hex(&layer.diff_id));
        let mut written = std::collections::BTreeSet::new();
        for layer in self.layers.iter().filter(|layer| written.insert(layer.diff_id.clone())) {
            let tar = std::fs::File::open(&layer.tar).with_context(|| format!("no layer {}", layer.tar.display()))?;
            let size = tar.metadata()?.len();
            archive.stream(&Header::new(Kind::File, name(layer)), size, tar)?;
        }
        let names: Vec<_> = self.layers.iter().map(name).collect();
        let tag = format!("{}:latest", self.name);
        let manifest = json!([{"Config": config, "RepoTags": [tag], "Layers": names}]);
        archive.add(&Header::new(Kind::File, "manifest.json"), manifest.to_string())?;
        Ok(archive.finish()?.finish()?)
    }
}

/// Several images under one name, one for each platform.
#[derive(Debug, Clone)]
pub struct IndexFiles {
    /// An OCI image layout with the index as `NAME:latest`.
    pub oci: PathBuf,
    /// The index (Docker: manifest list).
    pub index: Descriptor,
    /// The images.
    pub images: Vec<ImageFiles>,
}

/// Writes an index over `images` below `directory`.
pub fn index(
    name: &str,
    family: MediaTypes,
    images: &[ImageFiles],
    pools: &Pools,
    directory: &Path,
) -> Result<IndexFiles> {
    let mut contents = Vec::new();
    let mut entries = Vec::new();
    for image in images {
        let mut entry = serde_json::to_value(&image.manifest)?;
        entry["platform"] = json!(image.platform);
        entries.push(entry);
        contents.extend([image.manifest.clone(), image.config.clone()]);
        contents.extend(image.layers.iter().map(|layer| layer.blob.clone()));
    }
    let media_type = family.of(OCI_INDEX);
    let document = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": entries});
    let index = pools.blobs.put(&serde_json::to_vec_pretty(&document)?, &media_type)?;
    contents.push(index.clone());
    let oci = directory.join("oci");
    write_layout(pools, &oci, name, &index, &contents)?;
    Ok(IndexFiles { oci, index, images: images.to_vec() })
}

fn write_layout(pools: &Pools, oci: &Path, name: &str, top: &Descriptor, contents: &[Descriptor]) -> Result<()> {
    let blobs = oci.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).with_context(|| format!("cannot make {}", blobs.display()))?;
    for blob in contents {
        let (from, to) = (pools.blobs.path(&blob.digest), blobs.join(hex(&blob.digest)));
        if !to.exists() {
            std::fs::hard_link(&from, &to).or_else(|_| std::fs::copy(&from, &to).map(drop))?;
        }
    }
    let mut entry = serde_json::to_value(top)?;
    entry["annotations"] =
        json!({"org.opencontainers.image.ref.name": "latest", "io.containerd.image.name": format!("{name}:latest")});
    std::fs::write(oci.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    std::fs::write(oci.join("index.json"), json!({"schemaVersion": 2, "manifests": [entry]}).to_string())?;
    Ok(())
}
