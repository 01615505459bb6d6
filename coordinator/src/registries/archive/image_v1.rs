//! The format that `docker save` wrote before Docker 1.10: a file `repositories` that names images by random ids, and a directory for each
//! id with `json`, `layer.tar` and, in `json`, the id of its parent.
//!
//! Such an image has one layer on top of its parents' layers. Its config is made from `json` ([`config`]) exactly as dockerd makes it, so
//! that both give the image the same id. The format has no digests of layers, so each layer is read once to hash it.
//!
//! Bounds: a chain of parents is no longer than [`MAX_LAYERS`], the bytes of all documents together are limited ([`Kept`]), and compressed
//! layers are decompressed up to [`UNPACKED_MAX`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Read;
use std::rc::Rc;

use store::digest::Sha256;
use store::image::ImageRef;
use store::{Digest, go_json};

use crate::registries::Document;
use crate::registries::archive::contents::{Contents, Kept, SavedLayer, check_images, saved_image};
use crate::registries::archive::image_v1::config::{History, make_config, parse};
use crate::registries::archive::member_index::{Members, unreadable};
use crate::registries::compression::{Compression, MAGIC_LEN};
use crate::registries::error::RegistryError;
use crate::registries::image::manifest::{MAX_CONFIG, MAX_LAYERS};

mod config;

/// The file that names the images.
pub(crate) const REPOSITORIES: &str = "repositories";
/// The longest such file that is read, in bytes.
const MAX_LIST: u64 = 16 << 20;
/// Maximum number of bytes that all compressed layers of an archive may decompress to: a minute's work. Docker itself never compressed
/// them.
const UNPACKED_MAX: u64 = 64 << 30;
/// Bytes of a layer that are read at once.
const BLOCK: usize = 256 << 10;

/// Tags and the image ids that they point to, by repository.
type Repositories = BTreeMap<String, BTreeMap<String, String>>;

/// The directory of one image id.
struct Part {
    parent: Option<String>,
    history: History,
    layer: SavedLayer,
    diff_id: Digest,
}

/// Directories that have been read already, by id: images share parents.
struct Parts<'a> {
    members: &'a Members,
    by_id: HashMap<String, Rc<Part>>,
    kept: Kept,
    /// Bytes that compressed layers may still decompress to.
    unpacked_left: u64,
}

/// Reads `repositories` and what it names.
pub(crate) fn read(members: &Members, name: Option<&ImageRef>) -> Result<Contents, RegistryError> {
    let repositories: Repositories = go_json::first_from_slice(&members.read(REPOSITORIES, MAX_LIST)?)
        .map_err(|error| unreadable(format!("its {REPOSITORIES} cannot be understood ({error})")))?;
    check_images(repositories.values().map(BTreeMap::len).sum())?;
    let mut parts = Parts { members, by_id: HashMap::new(), kept: Kept::default(), unpacked_left: UNPACKED_MAX };
    let (mut contents, mut made) = (Contents::default(), HashMap::<String, Document>::new());
    for (image, id) in named(&repositories, name)? {
        let manifest = match made.get(&id) {
            Some(known) => known.clone(),
            None => parts.image(&id, &mut contents)?,
        };
        made.insert(id, manifest.clone());
        contents.images.push((image, manifest));
    }
    Ok(contents)
}

/// The images' names and ids: the user's name if there is one, which only one image can have, or the tags.
fn named(repositories: &Repositories, name: Option<&ImageRef>) -> Result<Vec<(ImageRef, String)>, RegistryError> {
    if let Some(name) = name {
        let ids: BTreeSet<&String> = repositories.values().flat_map(BTreeMap::values).collect();
        if ids.len() > 1 {
            return Err(unreadable(format!("it holds {} images: --name can name only one", ids.len())));
        }
        return Ok(ids.into_iter().map(|id| (name.clone(), id.clone())).collect());
    }
    let tags = repositories.iter().flat_map(|(name, tags)| tags.iter().map(move |(tag, id)| (name, tag, id)));
    let parse = |(name, tag, id): (&String, &String, &String)| {
        let image = name.parse().and_then(|name: ImageRef| name.with_tag(tag));
        image.map(|image| (image, id.clone())).map_err(|error| unreadable(error.to_string()))
    };
    tags.map(parse).collect()
}

impl Parts<'_> {
    /// Makes the image `id` from its directory and those of its parents.
    fn image(&mut self, id: &str, contents: &mut Contents) -> Result<Document, RegistryError> {
        let chain = self.chain(id)?;
        let history: Vec<&History> = chain.iter().map(|part| &part.history).collect();
        let diff_ids: Vec<Digest> = chain.iter().map(|part| part.diff_id).collect();
        let json = self.json(id)?;
        let made = make_config(&json, &diff_ids, &history);
        let config = made.map_err(|error| unreadable(format!("its {id}/json cannot be understood ({error})")))?;
        if config.len() as u64 > MAX_CONFIG {
            let why =
                format!("the config of its image {id} has {} bytes; at most {MAX_CONFIG} are taken", config.len());
            return Err(unreadable(why));
        }
        let layers: Vec<SavedLayer> = chain.iter().map(|part| part.layer.clone()).collect();
        saved_image(config.into(), &layers, contents, &mut self.kept)
    }

    /// The directories of an image, its lowest parent first.
    fn chain(&mut self, id: &str) -> Result<Vec<Rc<Part>>, RegistryError> {
        let (mut chain, mut seen) = (Vec::new(), BTreeSet::new());
        let mut next = Some(id.to_owned());
        while let Some(id) = next.take() {
            if seen.len() == MAX_LAYERS {
                return Err(unreadable(format!("its image {id} has more than {MAX_LAYERS} parents")));
            }
            if seen.contains(&id) {
                return Err(unreadable(format!("its image {id} is a parent of itself: save the image again")));
            }
            let part = self.part(&id)?;
            next.clone_from(&part.parent);
            seen.insert(id);
            chain.push(part);
        }
        chain.reverse();
        Ok(chain)
    }

    fn part(&mut self, id: &str) -> Result<Rc<Part>, RegistryError> {
        if let Some(known) = self.by_id.get(id) {
            return Ok(Rc::clone(known));
        }
        let json = self.json(id)?;
        let parsed =
            parse(&json).map_err(|error| unreadable(format!("its {id}/json cannot be understood ({error})")))?;
        let (layer, diff_id) = self.layer(&format!("{id}/layer.tar"))?;
        let part = Rc::new(Part { parent: parsed.parent, history: parsed.history, layer, diff_id });
        self.by_id.insert(id.to_owned(), Rc::clone(&part));
        Ok(part)
    }

    fn json(&mut self, id: &str) -> Result<bytes::Bytes, RegistryError> {
        let json = self.members.read(&format!("{id}/json"), MAX_CONFIG)?;
        self.kept.count(&json)?;
        Ok(json)
    }

    /// A layer as stored in the archive, and the digest of its tar.
    fn layer(&mut self, name: &str) -> Result<(SavedLayer, Digest), RegistryError> {
        let span = self.members.find(name);
        let span = span.ok_or_else(|| unreadable(format!("it lacks layer {name}: save the image again")))?;
        let encoding = Compression::sniff(&self.members.head(span, MAGIC_LEN)?);
        let digest = self.members.digest(span)?;
        let layer = SavedLayer { digest, span, encoding };
        let diff_id = if encoding == Compression::Plain { digest } else { self.unpacked(&layer, name)? };
        Ok((layer, diff_id))
    }

    fn unpacked(&mut self, layer: &SavedLayer, name: &str) -> Result<Digest, RegistryError> {
        let failed = |error: std::io::Error| unreadable(format!("its layer {name} cannot be unpacked ({error})"));
        let mut tar = layer.encoding.unpack(self.members.reader(layer.span)).map_err(failed)?;
        let mut hasher = Sha256::new();
        let mut block = vec![0; BLOCK];
        loop {
            let count = match tar.read(&mut block) {
                Ok(0) => return Ok(hasher.finish()),
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(failed(error)),
            };
            hasher.update(&block[..count]);
            let left = self.unpacked_left.checked_sub(count as u64);
            let why =
                || format!("its packed layers have more than {} GiB: save fewer images at a time", UNPACKED_MAX >> 30);
            self.unpacked_left = left.ok_or_else(|| unreadable(why()))?;
        }
    }
}
