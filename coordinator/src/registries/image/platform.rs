//! Decides which entry of an index serves a wanted platform: the one place that knows spellings and variants.

use store::image::Platform;

/// A platform in normal form: Go's architecture names, and no variant where it is the usual one.
pub fn normal(os: &str, architecture: &str, variant: Option<&str>) -> Platform {
    let architecture = architecture.to_ascii_lowercase();
    let (architecture, implied) = match architecture.as_str() {
        "x86_64" | "x86-64" => ("amd64", None),
        "aarch64" => ("arm64", None),
        "armhf" => ("arm", Some("v7")),
        "armel" => ("arm", Some("v6")),
        "i386" | "i686" | "x86" => ("386", None),
        "powerpc64le" => ("ppc64le", None),
        other => (other, None),
    };
    let variant = variant.filter(|variant| !variant.is_empty()).or(implied).map(str::to_ascii_lowercase);
    let usual = matches!((architecture, variant.as_deref()), ("arm64", Some("v8" | "8")) | ("amd64", Some("v1")));
    Platform { os: os.to_ascii_lowercase(), architecture: architecture.to_owned(), variant: variant.filter(|_| !usual) }
}

/// The platform of this machine, in normal form.
pub fn own() -> Platform {
    let host = Platform::host();
    normal(&host.os, &host.architecture, host.variant.as_deref())
}

/// Operating systems and architectures that may stand alone, as Go names them.
const SYSTEMS: [&str; 12] = [
    "aix",
    "android",
    "darwin",
    "dragonfly",
    "freebsd",
    "illumos",
    "linux",
    "netbsd",
    "openbsd",
    "plan9",
    "solaris",
    "windows",
];
const ARCHITECTURES: [&str; 14] = [
    "386", "amd64", "arm", "arm64", "loong64", "mips", "mips64", "mips64le", "mipsle", "ppc64", "ppc64le", "riscv64",
    "s390x", "wasm",
];

/// Parses what a user wrote, into normal form.
pub fn parse(text: &str) -> Result<Platform, store::Error> {
    if let Some(platform) = of_one_word(text) {
        return Ok(platform);
    }
    let raw: Platform = text.parse()?;
    Ok(normal(&raw.os, &raw.architecture, raw.variant.as_deref()))
}

/// What docker takes a single word for: a system with this machine's architecture, or an architecture on Linux.
fn of_one_word(word: &str) -> Option<Platform> {
    if SYSTEMS.contains(&word.to_ascii_lowercase().as_str()) {
        return Some(Platform { os: word.to_ascii_lowercase(), ..own() });
    }
    let platform = normal("linux", word, None);
    let is_known = ARCHITECTURES.contains(&platform.architecture.as_str());
    let is_arm = platform.architecture == "arm" && platform.variant.is_none();
    let variant = if is_arm { Some("v7".to_owned()) } else { platform.variant };
    is_known.then_some(Platform { variant, ..platform })
}

/// The arm variant that is meant if none is named, as in containerd.
const USUAL_ARM: u32 = 7;

/// How well `offered` serves `wanted`, both in normal form: `None` if not at all, otherwise a rank; higher is better. An offer without a
/// variant serves every variant, and one with a variant only that one. There are two exceptions for arm: lower variants also serve higher
/// ones, the highest first, and a request for arm without a variant accepts any.
pub fn rank(offered: &Platform, wanted: &Platform) -> Option<u32> {
    if offered.os != wanted.os || offered.architecture != wanted.architecture {
        return None;
    }
    let number = |variant: &str| variant.trim_start_matches('v').parse::<u32>().ok();
    match (offered.variant.as_deref(), wanted.variant.as_deref()) {
        (offered, asked) if offered == asked => Some(100),
        (None, Some(asked)) if wanted.architecture == "arm" && number(asked) == Some(USUAL_ARM) => Some(99),
        (None, _) => Some(2),
        (Some(offered), asked) if wanted.architecture == "arm" => {
            let (offered, asked) = (number(offered)?, asked.map_or(Some(u32::MAX), number)?);
            let is_usual = offered == USUAL_ARM && asked == u32::MAX;
            (offered <= asked).then_some(if is_usual { 99 } else { 10 + offered.min(80) })
        }
        (Some(_), _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_normalised() {
        for (text, expected) in [
            ("linux/x86_64", "linux/amd64"),
            ("Linux/aarch64/v8", "linux/arm64"),
            ("linux/arm/v7", "linux/arm/v7"),
            ("linux/armhf", "linux/arm/v7"),
            ("arm64", "linux/arm64"),
            ("AMD64", "linux/amd64"),
            ("x86_64", "linux/amd64"),
            ("arm", "linux/arm/v7"),
            ("armel", "linux/arm/v6"),
        ] {
            assert_eq!(parse(text).unwrap().to_string(), expected);
        }
        assert_eq!(parse("Linux").unwrap(), own(), "the system alone");
        for bad in ["", "linux/", "/amd64", "a/b/c/d", "vax", "arm64 "] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_nearest_variant_wins() {
        let rank = |offered: &str, wanted: &str| rank(&parse(offered).unwrap(), &parse(wanted).unwrap());
        assert!(rank("linux/arm/v7", "linux/arm/v7") > rank("linux/arm/v6", "linux/arm/v7"));
        assert!(rank("linux/arm/v6", "linux/arm/v7") > rank("linux/arm/v5", "linux/arm/v7"));
        assert_eq!(rank("linux/arm/v8", "linux/arm/v7"), None);
        assert_eq!(rank("linux/amd64", "linux/arm64"), None);
        assert_eq!(rank("linux/arm64/v8", "linux/arm64"), Some(100));
        assert!(rank("linux/arm/v7", "linux/arm") > rank("linux/arm/v6", "linux/arm"), "arm alone is v7");
        assert!(rank("linux/arm/v7", "linux/arm") > rank("linux/arm/v8", "linux/arm"));
        assert!(rank("linux/arm/v8", "linux/arm") > rank("linux/arm/v6", "linux/arm"), "as docker and skopeo have it");
        assert!(rank("linux/arm", "linux/arm/v7") > rank("linux/arm/v6", "linux/arm/v7"));
        assert!(rank("linux/arm/v5", "linux/arm/v6") > rank("linux/arm", "linux/arm/v6"));
        for (offered, wanted) in
            [("arm/v7", "arm/v6"), ("amd64/v3", "amd64"), ("arm64/v9", "arm64"), ("ppc64le/power9", "ppc64le")]
        {
            assert_eq!(rank(&format!("linux/{offered}"), &format!("linux/{wanted}")), None, "{offered} for {wanted}");
        }
        assert!(rank("linux/amd64", "linux/amd64/v3").is_some());
    }
}
