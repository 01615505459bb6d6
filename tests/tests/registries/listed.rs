//! The differences between this project and skopeo or docker, and their reasons.

use tests::registry::Behaviour;

/// A tool to compare with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tool {
    Skopeo,
    Docker,
}

/// What this project does and the tool does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Does {
    /// It pulls.
    Pull,
    /// It refuses.
    Refuse,
    /// It sends credentials that the tool does not send.
    Show,
}

use Does::{Pull, Refuse, Show};
use Tool::{Docker, Skopeo};

/// One difference with its reason.
#[derive(Debug)]
pub(crate) struct Listed {
    tools: &'static [Tool],
    pub(crate) does: Does,
    /// A dimension, and those of its values that cause the difference.
    dimension: &'static str,
    values: &'static [&'static str],
    /// A second value that is also necessary.
    beside: Option<(&'static str, &'static str)>,
    pub(crate) why: &'static str,
}

impl Listed {
    pub(crate) fn covers(&self, tool: Tool, does: Does, behaviour: &Behaviour) -> bool {
        let value = behaviour.get(self.dimension);
        let is_beside = self.beside.is_none_or(|(dimension, value)| behaviour.is(dimension, value));
        is_beside && self.tools.contains(&tool) && self.does == does && self.values.contains(&value)
    }
}

const BOTH: &[Tool] = &[Skopeo, Docker];

const fn listed(
    tools: &'static [Tool],
    does: Does,
    dimension: &'static str,
    values: &'static [&'static str],
    why: &'static str,
) -> Listed {
    Listed { tools, does, dimension, values, beside: None, why }
}

impl Listed {
    /// Restricts the entry to behaviours in which another dimension has this value.
    const fn beside(self, dimension: &'static str, value: &'static str) -> Self {
        Self { beside: Some((dimension, value)), ..self }
    }
}

/// Values of the dimension `document` with which the manifest does not tell the layers' sizes.
const NO_SIZE: &[&str] = &["size absent", "size null", "size 0", "size negative"];

/// All known differences.
pub(crate) const LISTED: &[Listed] = &[
    listed(
        BOTH,
        Pull,
        "redirect",
        &["signed here", "relative"],
        "Go shows the password to signed storage on the same host, which refuses two proofs",
    ),
    listed(
        BOTH,
        Pull,
        "challenge",
        &["bearer with another scope"],
        "the token service is asked again with the challenge's scope (oras-go #650)",
    ),
    listed(
        BOTH,
        Pull,
        "challenge",
        &["basic, bearer", "bearer; basic", "bearer oddly written", "negotiate; basic", "negotiate, bearer"],
        "every way that is offered is tried, however it is written",
    ),
    listed(
        BOTH,
        Pull,
        "place",
        &["repository", "repository, no root", "manifest", "blob"],
        "a challenge counts wherever it is given, not at /v2/ alone",
    ),
    listed(BOTH, Pull, "token", &["post only"], "a service that knows only POST is asked by POST, as containerd does"),
    listed(BOTH, Pull, "token", &["expires as text"], "a number in quotes is a number"),
    listed(BOTH, Pull, "token", &["503 once", "429 once"], "what may pass is tried again"),
    listed(BOTH, Pull, "token", &["two requests long"], "a token that ends in the middle is fetched again"),
    listed(
        BOTH,
        Pull,
        "fault",
        &["manifest 429", "manifest 429 by date", "manifest 503", "blob 429", "blob 503"],
        "what may pass is tried again",
    ),
    listed(BOTH, Pull, "framing", &["cut"], "a broken download goes on where it broke"),
    listed(
        BOTH,
        Pull,
        "coding",
        &["manifest x-gzip", "manifest twice", "manifest said to be gzip", "blob said to be gzip", "blob gzip"],
        "gzip is recognised by what it is, not by its label alone",
    ),
    listed(
        BOTH,
        Pull,
        "type",
        &["absent", "text", "json", "octet-stream", "upper case", "dialect"],
        "a document that says what it is, or holds what only an image or only an index has, needs no right header",
    ),
    listed(BOTH, Pull, "document", &["nested index"], "OCI indexes may name indexes"),
    listed(
        BOTH,
        Pull,
        "document",
        &["other platform"],
        "without a wish the only image is taken, whatever its platform: hosts of it may be elsewhere",
    ),
    listed(
        BOTH,
        Pull,
        "document",
        &["without platform"],
        "an entry without a platform is for everybody, as containerd and skopeo have it",
    ),
    listed(&[Docker], Pull, "document", &["layer zstd"], "docker 20.10 knows no zstd"),
    listed(
        BOTH,
        Pull,
        "head",
        &["405", "404", "501", "400", "no digest", "weak digest", "wrong digest"],
        "a pull asks for the document itself",
    ),
    listed(
        &[Skopeo],
        Pull,
        "document",
        &["layer untyped", "layer octet-stream"],
        "what is not called anything is read by its first bytes, as docker does",
    ),
    listed(
        &[Skopeo],
        Pull,
        "document",
        &["layer foreign", "layer nondistributable"],
        "foreign layers that the registry has are fetched from it, as docker does, and from nowhere else",
    ),
    listed(
        &[Skopeo],
        Refuse,
        "document",
        &["config helm", "config empty", "too few diff_ids", "layer odd"],
        "skopeo copies what is no image, too; docker does not",
    ),
    listed(
        &[Docker],
        Refuse,
        "document",
        &["layer odd"],
        "docker goes by a layer's first bytes whatever it is called; a type that nobody knows may mean anything",
    ),
    listed(
        &[Skopeo],
        Pull,
        "document",
        &["config size absent", "config size too small", "config size too large"],
        "the digest proves the content, as docker has it; skopeo insists on a config's size and not on a layer's",
    ),
    listed(
        BOTH,
        Refuse,
        "document",
        NO_SIZE,
        "without a size nothing tells whether a connection that was cut off had brought all",
    )
    .beside("framing", "until close"),
    listed(
        &[Skopeo],
        Refuse,
        "document",
        &["null index"],
        "an index that its header makes an image, or the other way round, may be read in two ways",
    )
    .beside("type", "kind"),
    listed(
        BOTH,
        Refuse,
        "challenge",
        &["basic, bearer", "bearer; basic"],
        "of two ways the token goes first, and a token service that talks nonsense is a failure",
    )
    .beside("token", "html"),
    listed(
        BOTH,
        Refuse,
        "document",
        &["schema 1 signed", "schema 1"],
        "schema 1 was withdrawn in 2019; its layers have no diffIDs to verify",
    ),
    listed(BOTH, Refuse, "redirect", &["downgrade"], "nothing leads from HTTPS to plain HTTP"),
    listed(
        BOTH,
        Refuse,
        "stated",
        &["wrong"],
        "a registry that states another digest than it sends is not believed, as docker does when it asks by HEAD",
    ),
    listed(BOTH, Refuse, "token", &["redirect elsewhere"], "credentials are for the token service alone"),
    listed(
        BOTH,
        Show,
        "place",
        &["manifest", "blob", "repository", "repository, no root"],
        "where nothing is asked for nothing is shown, and the other way round",
    ),
    listed(
        BOTH,
        Show,
        "challenge",
        &["basic, bearer", "bearer; basic"],
        "of two ways the token goes first: the registry then sees no password",
    ),
    listed(
        &[Docker],
        Pull,
        "credentials",
        &["identity"],
        "what a refresh token gets may be called `token`, too; docker reads `access_token` alone there",
    ),
    listed(
        &[Docker],
        Pull,
        "redirect",
        &["place of its own"],
        "a place of the same server that asks is shown what that server was shown already, as Go's own client does",
    ),
    listed(
        &[Docker],
        Pull,
        "framing",
        &["chunked", "until close"],
        "docker 20.10 asks by HEAD and insists on a Content-Length there",
    ),
    listed(
        &[Docker],
        Refuse,
        "document",
        &["index and image"],
        "CVE-2021-41190: docker 20.10 looks at OCI documents alone, skopeo at all",
    ),
];
