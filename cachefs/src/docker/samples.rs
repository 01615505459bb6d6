//! For tests: a store made by hand, with layers of small files.

use std::path::Path;
use std::sync::Arc;

use store::catalogue::Change;
use store::chunk;
use store::image::{ImageRecord, LayerRecord, Platform, RequestedBy};
use store::layer::{self, FileContent, InodeIndex, LayerFacts, LayerTree, Metadata, NodeKind, PieceSource, ROOT};
use store::pack::PackWriter;
use store::publisher::{self, Publisher, write_synced};
use store::recipe::RecipeWriter;
use store::{ContentDigest, Digest};

/// One part of a layer's tar stream.
pub(super) enum Part<'a> {
    /// A file with a name and content, whole.
    File(&'a str, &'a str),
    /// A file whose name a later one takes.
    Replaced(&'a str, &'a str),
    /// A file of which the stream has only these bytes.
    Range(&'a str, &'a str, std::ops::Range<usize>),
    /// A file that the stream calls by another name than the tree.
    Named(&'a str, &'a str, &'a [u8]),
    /// Bytes as they are.
    Literal(&'a [u8]),
}

/// CRC-64 (ISO), bit by bit.
fn crc64(bytes: &[u8]) -> u64 {
    let step = |crc: u64, _| if crc & 1 == 1 { crc >> 1 ^ 0xd800_0000_0000_0000 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u64::from(*byte), step))
}

/// Publishes a layer; returns its diffID and tar stream.
pub(super) fn layer(publisher: &Publisher, parts: &[Part]) -> (Digest, Vec<u8>) {
    let staging = publisher.stage().unwrap();
    let (mut stream, mut raw) = (Vec::new(), Vec::new());
    let mut recipe = RecipeWriter::new(Vec::new()).unwrap();
    let mut tree = LayerTree::new();
    for part in parts {
        let (name, content, range, called) = match part {
            Part::Literal(bytes) => {
                recipe.literal(bytes).unwrap();
                stream.extend_from_slice(bytes);
                continue;
            }
            Part::File(name, content) | Part::Replaced(name, content) => {
                (name, content, 0..content.len(), name.as_bytes())
            }
            Part::Range(name, content, range) => (name, content, range.clone(), name.as_bytes()),
            Part::Named(name, content, called) => (name, content, 0..content.len(), *called),
        };
        let inode = add_file(&mut tree, name, content, raw.len() as u32);
        raw.extend_from_slice(content.as_bytes());
        let bytes = &content.as_bytes()[range.clone()];
        recipe.content(inode, (range.start as u64, range.len() as u64), crc64(bytes), called).unwrap();
        stream.extend_from_slice(bytes);
    }
    let recipe = recipe.finish().unwrap();
    write_synced(&staging.recipe(), &recipe).unwrap();
    raw.push(b'.');
    let mut pack = PackWriter::create(&staging.pack()).unwrap();
    let placed = pack.append(&chunk::compress(&raw).unwrap()).unwrap();
    let pack = pack.finish().unwrap();
    let diff_id = Digest::of(&stream);
    let (recipe_len, recipe_digest) = (recipe.len() as u64, ContentDigest::of(&recipe));
    let facts = LayerFacts { diff_id, tar_size: stream.len() as u64, recipe_len, recipe_digest };
    let index = tree.encode(&facts, &[placed.in_pack(pack)]).unwrap();
    write_synced(&staging.index(), &layer::seal(&index).unwrap()).unwrap();
    publisher.publish_layer(staging, &diff_id, Some(&pack)).unwrap();
    (diff_id, stream)
}

fn add_file(tree: &mut LayerTree, name: &str, content: &str, start: u32) -> InodeIndex {
    let content = FileContent {
        digest: ContentDigest::of(content.as_bytes()),
        size: content.len() as u64,
        pieces: vec![PieceSource::Chunk { chunk: 0, start }],
    };
    tree.insert(ROOT, name.as_bytes(), Metadata::default(), NodeKind::File(content))
}

/// A store in `dir`, open for writing.
pub(super) fn store(dir: &Path) -> Publisher {
    std::fs::create_dir_all(dir).unwrap();
    publisher::create(dir).unwrap();
    Publisher::open(dir, "test").unwrap()
}

/// Publishes an image of these layers, base first, as `repository:v1`.
pub(super) fn image(publisher: &Publisher, repository: &str, layers: &[Digest]) -> Arc<ImageRecord> {
    image_with(publisher, repository, layers, "")
}

/// Like [`image`], with `more` at the end of the config, such as `,"created":""`.
pub(super) fn image_with(publisher: &Publisher, repository: &str, layers: &[Digest], more: &str) -> Arc<ImageRecord> {
    let diff_ids: Vec<_> = layers.iter().map(|id| format!("\"{id}\"")).collect();
    let config = format!(
        "{{\"architecture\":\"amd64\",\"os\":\"linux\",\"author\":\"{repository}\",\"rootfs\":{{\"type\":\"layers\",\"diff_ids\":[{}]}}{more}}}",
        diff_ids.join(",")
    );
    let id = Digest::of(config.as_bytes());
    publisher.put_blob(&id, config.as_bytes()).unwrap();
    publisher.put_blob(&Digest::of(repository.as_bytes()), repository.as_bytes()).unwrap();
    let record = |diff_id: &Digest| LayerRecord {
        diff_id: *diff_id,
        size: 1,
        blob: Digest::of(diff_id.as_bytes()),
        blob_size: 1,
        media_type: String::new(),
    };
    let image = Arc::new(ImageRecord {
        repository: format!("q.io/{repository}"),
        tag: Some("v1".into()),
        target: Digest::of(repository.as_bytes()),
        manifest: Digest::of(repository.as_bytes()),
        media_type: String::new(),
        config: id,
        platform: Platform::host(),
        layers: layers.iter().map(record).collect(),
        published_at: 0,
        ordered_by: RequestedBy::Operator,
    });
    publisher.commit(vec![Change::Set(Arc::clone(&image))]).unwrap();
    image
}

/// Takes an image's name out of the store.
pub(super) fn remove(publisher: &Publisher, image: &ImageRecord) {
    let change = Change::Remove { repository: image.repository.clone(), tag: image.tag.clone(), target: image.target };
    publisher.commit(vec![change]).unwrap();
}
