//! Manifests, indexes and configs: parsed once, into what a pull needs.
//!
//! Docker schema 2 and OCI differ in media types only. Anything else (schema 1, artifacts) is refused by name: half an image in the store
//! would help nobody. A list that is `null`, as Go writes empty ones, is empty. Layers that may lie elsewhere (`urls`) are fetched from
//! their registry like all others, and from nowhere else.

use std::collections::BTreeMap;

use serde::Deserialize;
use store::image::Platform;
use store::image_config::{ImageConfig, Unusable};
use store::{Digest, go_json};

use crate::registries::compression::Compression;
use crate::registries::error::RegistryError;
use crate::registries::image::platform;
pub use crate::registries::image::shape::{DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Shape, media_type};
use crate::registries::{Document, RemoteLayer};

/// OCI image config.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// OCI layer, not compressed.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Docker image config.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// Docker layer; `.gzip` follows when compressed.
pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";

/// The accepted manifest types, as an `Accept` header.
pub const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";

/// The longest manifest or index that is read (Docker's own limit).
pub const MAX_MANIFEST: u64 = 4 << 20;
/// The longest config that is read (the limit of podman and skopeo).
pub const MAX_CONFIG: u64 = 4 << 20;
/// Maximum number of platforms that an error message lists, and the longest name of one.
const OFFERED: usize = 20;
const PLATFORM_NAME: usize = 60;
/// Maximum number of layers of an image: overlayfs stacks at most 500.
pub const MAX_LAYERS: usize = 500;
/// A claimed size above this (1 PiB) is ignored: no layer is so large, and the sum of an image's sizes must not overflow.
const MOST_CLAIMED: u64 = 1 << 50;

/// A pointer to content.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// The media type of the content.
    #[serde(default)]
    pub media_type: String,
    /// The content's digest, not yet parsed: other algorithms than SHA-256 exist.
    pub digest: String,
    /// The content's size as written in the document: docker and skopeo accept any whole number here, or none.
    #[serde(default)]
    size: i64,
    /// Annotations, among them names in an OCI layout.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// The platform, in an index.
    #[serde(default)]
    platform: Option<RawPlatform>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct RawPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
}

/// A manifest of one image.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Manifest {
    /// The image's config.
    pub config: Descriptor,
    /// Layers, lowest first; none in an image of metadata alone.
    #[serde(default)]
    pub layers: Vec<Descriptor>,
}

/// A list of manifests.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Index {
    /// The manifests to choose from.
    #[serde(default)]
    pub manifests: Vec<Descriptor>,
}

/// A parsed manifest or index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parsed {
    /// One image.
    Manifest(Manifest),
    /// Several images to choose from.
    Index(Index),
}

/// The error for a document that breaks a rule.
fn malformed(what: &str, why: impl ToString) -> RegistryError {
    RegistryError::Malformed { what: what.to_owned(), why: why.to_string() }
}

fn unsupported(media_type: &str, what: &str, hint: &'static str) -> RegistryError {
    let media_type = media_type.chars().take(200).collect();
    RegistryError::Unsupported { media_type, what: what.to_owned(), hint }
}

/// Parses the manifest or index of `what`.
pub fn parse(document: &Document, what: &str) -> Result<Parsed, RegistryError> {
    let media_type = document.media_type.as_str();
    let bytes = &document.bytes;
    match Shape::of_type(media_type) {
        Some(Shape::Manifest) => {
            Ok(Parsed::Manifest(go_json::from_slice(bytes).map_err(|error| malformed(what, error))?))
        }
        Some(Shape::Index) => Ok(Parsed::Index(go_json::from_slice(bytes).map_err(|error| malformed(what, error))?)),
        None if media_type.contains("manifest.v1") => {
            let hint = ": schema 1 was withdrawn in 2019; push the image again with a newer client";
            Err(unsupported(media_type, what, hint))
        }
        None => Err(unsupported(media_type, what, ": it is not a container image")),
    }
}

impl Descriptor {
    /// The digest, if its algorithm is one that can be checked.
    pub fn digest(&self, what: &str) -> Result<Digest, RegistryError> {
        self.digest.parse().map_err(|error| malformed(what, error))
    }

    /// The claimed size; 0 if it is missing or implausible.
    fn claimed(&self) -> u64 {
        u64::try_from(self.size).ok().filter(|size| *size <= MOST_CLAIMED).unwrap_or(0)
    }

    /// The platform of an index entry, if it names both system and architecture.
    pub fn whole_platform(&self) -> Option<Platform> {
        self.platform().filter(|platform| !platform.os.is_empty() && !platform.architecture.is_empty())
    }

    /// The platform of an index entry.
    pub fn platform(&self) -> Option<Platform> {
        let raw = self.platform.as_ref()?;
        Some(platform::normal(&raw.os, &raw.architecture, raw.variant.as_deref()))
    }
}

impl Index {
    /// The entry that serves `wanted` best. If `wanted` is `None`, this machine's platform is meant, and the only entry is taken whatever
    /// its platform. An entry that names no platform is taken if no other fits, as in containerd and skopeo.
    pub fn choose(&self, wanted: Option<&Platform>, image: &str) -> Result<&Descriptor, RegistryError> {
        let own = platform::own();
        let target = wanted.unwrap_or(&own);
        let rank = |entry: &Descriptor| entry.platform().and_then(|offered| platform::rank(&offered, target));
        // Of equal entries the first is taken, as in Docker.
        let mut best: Option<(u32, &Descriptor)> = None;
        for entry in &self.manifests {
            if let Some(rank) = rank(entry).filter(|rank| best.is_none_or(|(so_far, _)| *rank > so_far)) {
                best = Some((rank, entry));
            }
        }
        match (best, &self.manifests[..]) {
            (Some((_, entry)), _) => Ok(entry),
            (None, [only]) if wanted.is_none() => Ok(only),
            (None, entries) => {
                entries.iter().find(|entry| entry.platform.is_none()).ok_or_else(|| RegistryError::NoPlatform {
                    image: image.to_owned(),
                    wanted: target.to_string(),
                    offered: self.offered(),
                })
            }
        }
    }

    /// Lists the platforms for an error message. Attestations (`unknown/unknown`) are left out.
    fn offered(&self) -> String {
        let platforms = self.manifests.iter().filter_map(Descriptor::platform);
        let mut names: Vec<String> = platforms.filter(|p| p.os != "unknown").map(|p| p.to_string()).collect();
        names.sort();
        names.dedup();
        let more = names.len().saturating_sub(OFFERED);
        let mut shown: Vec<String> =
            names.iter().take(OFFERED).map(|name| name.chars().take(PLATFORM_NAME).collect()).collect();
        if more > 0 {
            shown.push(format!("and {more} more"));
        }
        if shown.is_empty() { "no platform".to_owned() } else { shown.join(", ") }
    }
}

impl Manifest {
    /// Refuses a manifest whose config is not an image's. Old registries stored configs without a media type, or with one that a proxy had
    /// made up. Docker accepts these, too, and a config that is not an image's has no layers that could match the manifest.
    pub fn check_config(&self, image: &str) -> Result<(), RegistryError> {
        match self.config.media_type.as_str() {
            OCI_CONFIG | DOCKER_CONFIG | "" | "application/octet-stream" | "application/json" | "text/html" => Ok(()),
            other => Err(unsupported(other, &format!("the config of {image}"), ": it is not a container image")),
        }
    }
}

/// Parses a config. One that Docker could not use is refused, as docker pull refuses it: otherwise it would reach hosts' data-roots.
fn read_config(config: &[u8], image: &str) -> Result<ImageConfig, RegistryError> {
    ImageConfig::parse(config).map_err(|error| match error {
        Unusable::OperatingSystem { os, architecture } if !os.eq_ignore_ascii_case("linux") => {
            RegistryError::NoPlatform {
                image: image.to_owned(),
                wanted: platform::own().to_string(),
                offered: platform::normal(&os, &architecture, None).to_string(),
            }
        }
        error => malformed(&format!("the config of {image}"), error),
    })
}

/// Joins a manifest with its config: what to fetch, and for which platform.
pub fn join(manifest: &Manifest, config: &[u8], image: &str) -> Result<(Platform, Vec<RemoteLayer>), RegistryError> {
    let config = read_config(config, image)?;
    let (layers, diff_ids) = (&manifest.layers, &config.diff_ids);
    if layers.len() != diff_ids.len() {
        let why = format!("it names {} layers and the manifest {}", diff_ids.len(), layers.len());
        return Err(malformed(&format!("the config of {image}"), why));
    }
    if layers.len() > MAX_LAYERS {
        return Err(malformed(image, format!("it has {} layers; at most {MAX_LAYERS} can be stored", layers.len())));
    }
    let layers = layers.iter().zip(diff_ids).map(|(layer, diff_id)| remote_layer(layer, *diff_id, image));
    let platform = platform::normal("linux", &config.architecture, Some(&config.variant));
    Ok((platform, layers.collect::<Result<_, _>>()?))
}

/// Describes one layer; fails if it cannot be stored.
fn remote_layer(layer: &Descriptor, diff_id: Digest, image: &str) -> Result<RemoteLayer, RegistryError> {
    let what = format!("layer {} of {image}", layer.digest);
    Ok(RemoteLayer {
        diff_id,
        blob: layer.digest(&what)?,
        claimed: layer.claimed(),
        media_type: layer.media_type.clone(),
        encoding: encoding(&layer.media_type, &what)?,
    })
}

/// Prefixes of layers' media types. Foreign and nondistributable layers may be missing from a registry, but are like others where it has
/// them.
const LAYERS: [&str; 4] = [
    OCI_LAYER,
    DOCKER_LAYER,
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
];

/// Media types of layers from tools that know no better ones: the layer's first bytes tell how it is compressed.
const UNTYPED: [&str; 6] =
    ["", "application/octet-stream", "application/gzip", "application/x-gzip", "application/tar", "application/x-tar"];

/// How a layer of this media type is compressed.
fn encoding(media_type: &str, what: &str) -> Result<Compression, RegistryError> {
    let lower = media_type.to_ascii_lowercase();
    let media_type = lower.as_str();
    if UNTYPED.contains(&media_type) {
        return Ok(if media_type.ends_with("gzip") { Compression::Gzip } else { Compression::Plain });
    }
    match LAYERS.iter().find_map(|begin| media_type.strip_prefix(begin)) {
        Some("") => Ok(Compression::Plain),
        Some("+gzip" | ".gzip" | ".gz") => Ok(Compression::Gzip),
        Some("+zstd" | ".zstd" | ".zst") => Ok(Compression::Zstd),
        Some("+xz" | ".xz") => Ok(Compression::Xz),
        Some("+bzip2" | ".bzip2" | "+bz2" | ".bz2") => Ok(Compression::Bzip2),
        _ => Err(unsupported(media_type, what, ": tar, gzip, zstd, bzip2 and xz layers can be stored")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(platforms: &[&str]) -> Index {
        let entry = |(n, platform): (usize, &&str)| {
            let platform = platform::parse(platform).unwrap();
            serde_json::json!({"mediaType": OCI_MANIFEST, "digest": format!("sha256:{n:064}"), "size": 1,
                "platform": {"os": platform.os, "architecture": platform.architecture, "variant": platform.variant}})
        };
        let manifests: Vec<_> = platforms.iter().enumerate().map(entry).collect();
        serde_json::from_value(serde_json::json!({"manifests": manifests})).unwrap()
    }

    #[test]
    fn the_wanted_platform_is_chosen_or_the_offer_is_named() {
        let index = index(&["linux/amd64", "linux/arm/v6", "linux/arm/v7", "unknown/unknown"]);
        let choose = |wanted: &str| index.choose(Some(&platform::parse(wanted).unwrap()), "a").cloned();
        assert!(choose("linux/arm/v7").unwrap().digest.ends_with('2'));
        assert!(choose("linux/amd64").unwrap().digest.ends_with('0'));
        let error = choose("linux/s390x").unwrap_err().to_string();
        let expected =
            "image a does not exist for linux/s390x: it is offered for linux/amd64, linux/arm/v6, linux/arm/v7";
        assert_eq!(error, expected);
    }

    #[test]
    fn an_offer_of_thousands_of_platforms_is_a_short_sentence() {
        let names: Vec<String> = (0..2000).map(|n| format!("linux/{n:02000}")).collect();
        let index = index(&names.iter().map(String::as_str).collect::<Vec<_>>());
        let error = index.choose(Some(&platform::own()), "a").unwrap_err().to_string();
        assert!(error.len() < 2000 && error.ends_with("and 1980 more"), "{} bytes: {error:.300}", error.len());
    }

    #[test]
    fn without_a_wish_the_only_entry_is_taken() {
        assert!(index(&["linux/mips64"]).choose(None, "a").is_ok());
        assert!(index(&["linux/mips64"]).choose(Some(&platform::own()), "a").is_err());
        assert!(index(&["linux/mips64", "linux/s390x"]).choose(None, "a").is_err());
    }

    #[test]
    fn schema_1_and_strangers_are_refused_by_name() {
        let bytes = bytes::Bytes::from_static(br#"{"schemaVersion": 1, "name": "a"}"#);
        let media_type = super::media_type(&bytes, Some("application/json"), "a").unwrap();
        let document = Document { digest: Digest::of(&bytes), media_type, bytes };
        let error = parse(&document, "image a").unwrap_err().to_string();
        assert!(
            error.starts_with("unsupported media type application/vnd.docker.distribution.manifest.v1+json of image a")
        );
        assert!(encoding("application/vnd.cncf.helm.chart.content.v1.tar+gzip", "layer x").is_err());
        assert_eq!(encoding(&format!("{OCI_LAYER}+zstd"), "x"), Ok(Compression::Zstd));
        assert_eq!(encoding(&format!("{DOCKER_LAYER}.gzip"), "x"), Ok(Compression::Gzip));
        assert_eq!(encoding(&format!("{OCI_LAYER}+xz"), "x"), Ok(Compression::Xz));
        assert_eq!(encoding(&format!("{DOCKER_LAYER}.bzip2"), "x"), Ok(Compression::Bzip2));
        assert!(encoding(&format!("{OCI_LAYER}+gzip+encrypted"), "x").is_err());
        assert_eq!(encoding("", "x"), Ok(Compression::Plain));
        let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
        assert_eq!(encoding(foreign, "x"), Ok(Compression::Gzip));
    }

    #[test]
    fn null_is_read_as_go_reads_it() {
        let text = r#"{"config":{"mediaType":null,"digest":"x","size":1,"urls":null,"data":null,"annotations":null},"layers":null}"#;
        let manifest: Manifest = go_json::from_slice(text.as_bytes()).unwrap();
        assert!(manifest.layers.is_empty() && manifest.check_config("a").is_ok());
        assert!(go_json::from_slice::<Index>(br#"{"manifests":null}"#).unwrap().manifests.is_empty());
        let entry =
            r#"{"digest":"x","size":1,"platform":{"os":null,"architecture":null,"variant":null,"os.features":null}}"#;
        assert!(go_json::from_slice::<Descriptor>(entry.as_bytes()).unwrap().platform().is_some());
        let config = r#"{"architecture":null,"os":null,"variant":null,"rootfs":{"type":"layers","diff_ids":null}}"#;
        let (platform, layers) = join(&manifest, config.as_bytes(), "a").unwrap();
        assert!(layers.is_empty() && platform.os == "linux");
        assert!(join(&manifest, b"{}", "a").is_err(), "no image's config");
    }

    #[test]
    fn what_docker_cannot_use_is_refused_and_what_is_for_another_system_is_not_there() {
        let manifest =
            Manifest { config: go_json::from_slice(br#"{"digest":"x","size":1}"#).unwrap(), layers: Vec::new() };
        let said = |config: &str| join(&manifest, config.as_bytes(), "a").unwrap_err().to_string();
        let labels = said(r#"{"config":{"Labels":{"a":1}},"rootfs":{"type":"layers"}}"#);
        assert_eq!(
            labels,
            "the config of a cannot be understood: config.Labels holds a number where Docker wants a text"
        );
        assert!(
            said(r#"{"os":"Linux","rootfs":{}}"#).contains("the config of a cannot be understood: its os is \"Linux\"")
        );
        let windows = said(r#"{"os":"windows","architecture":"amd64","rootfs":{}}"#);
        assert!(windows.contains("it is offered for windows/amd64"), "{windows}");
    }
}
