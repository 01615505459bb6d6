//! Elliptic curves that Go supports and *ring* does not: P-521, for signatures and for the exchange of keys, and
//! SHA-512 with the smaller curves. All of *ring*'s algorithms are kept.
//!
//! The arithmetic is RustCrypto's, in constant time where there is a secret.

use std::fmt;
use std::sync::{Arc, LazyLock};

use p521::ecdh::EphemeralSecret;
use p521::ecdsa::signature::hazmat::{PrehashSigner, PrehashVerifier};
use p521::elliptic_curve::Generate;
use p521::elliptic_curve::sec1::ToSec1Point;
use p521::pkcs8::DecodePrivateKey;
use rustls::crypto::{
    ActiveKeyExchange, CryptoProvider, KeyProvider, SharedSecret, SupportedKxGroup, WebPkiSupportedAlgorithms, ring,
};
use rustls::pki_types::{
    AlgorithmIdentifier, InvalidSignature, PrivateKeyDer, SignatureVerificationAlgorithm, SubjectPublicKeyInfoDer,
    alg_id,
};
use rustls::sign::{Signer, SigningKey, public_key_to_spki};
use rustls::{Error, NamedGroup, PeerMisbehaved, SignatureAlgorithm, SignatureScheme};
use sha2::{Digest, Sha256, Sha384, Sha512};

/// *ring*'s algorithms and those of this module.
pub(super) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(extended()));
    Arc::clone(&PROVIDER)
}

fn extended() -> CryptoProvider {
    let mut provider = ring::default_provider();
    provider.kx_groups.push(&P521Exchange);
    provider.key_provider = &Keys;
    let own = provider.signature_verification_algorithms;
    let all: Vec<_> = own.all.iter().copied().chain(MORE).collect();
    // TLS 1.3 uses only the first algorithm of each scheme, because there the scheme names the curve; in TLS 1.2 it
    // names the hash.
    let mut mapping = vec![(SignatureScheme::ECDSA_NISTP521_SHA512, &WITH_SHA512[..])];
    for (scheme, known) in own.mapping {
        let more: &[&dyn SignatureVerificationAlgorithm] = match scheme {
            SignatureScheme::ECDSA_NISTP384_SHA384 => &MORE[1..2],
            SignatureScheme::ECDSA_NISTP256_SHA256 => &MORE[2..3],
            _ => &[],
        };
        let both: Vec<_> = known.iter().chain(more).copied().collect();
        mapping.push((*scheme, Vec::leak(both)));
    }
    // Leaked on purpose: made once, and used as long as the process lives.
    provider.signature_verification_algorithms =
        WebPkiSupportedAlgorithms { all: Vec::leak(all), mapping: Vec::leak(mapping) };
    provider
}

#[derive(Debug, Clone, Copy)]
enum Curve {
    P256,
    P384,
    P521,
}

#[derive(Debug, Clone, Copy)]
enum Hash {
    Sha256,
    Sha384,
    Sha512,
}

/// ECDSA on this curve, of messages that are hashed like this.
#[derive(Debug)]
struct Ecdsa(Curve, Hash);

static P521_SHA512: Ecdsa = Ecdsa(Curve::P521, Hash::Sha512);
static P521_SHA384: Ecdsa = Ecdsa(Curve::P521, Hash::Sha384);
static P521_SHA256: Ecdsa = Ecdsa(Curve::P521, Hash::Sha256);
static P384_SHA512: Ecdsa = Ecdsa(Curve::P384, Hash::Sha512);
static P256_SHA512: Ecdsa = Ecdsa(Curve::P256, Hash::Sha512);

/// The algorithms of the TLS scheme for SHA-512; the curve that the scheme names comes first.
static WITH_SHA512: [&dyn SignatureVerificationAlgorithm; 3] = [&P521_SHA512, &P384_SHA512, &P256_SHA512];

/// All algorithms that *ring* lacks, those of P-521 first: with SHA-512, SHA-384, SHA-256.
static MORE: [&dyn SignatureVerificationAlgorithm; 5] =
    [&P521_SHA512, &P521_SHA384, &P521_SHA256, &P384_SHA512, &P256_SHA512];

/// Whether `$curve`'s key made the signature of a hash.
macro_rules! is_signed {
    ($curve:ident, $key:expr, $hash:expr, $signature:expr) => {{
        let key = $curve::ecdsa::VerifyingKey::from_sec1_bytes($key);
        let signature = $curve::ecdsa::Signature::from_der($signature);
        matches!((key, signature), (Ok(key), Ok(signature)) if key.verify_prehash($hash, &signature).is_ok())
    }};
}

impl SignatureVerificationAlgorithm for Ecdsa {
    fn verify_signature(&self, key: &[u8], message: &[u8], signature: &[u8]) -> Result<(), InvalidSignature> {
        let hash = match self.1 {
            Hash::Sha256 => Sha256::digest(message).to_vec(),
            Hash::Sha384 => Sha384::digest(message).to_vec(),
            Hash::Sha512 => Sha512::digest(message).to_vec(),
        };
        let is_signed = match self.0 {
            Curve::P256 => is_signed!(p256, key, &hash, signature),
            Curve::P384 => is_signed!(p384, key, &hash, signature),
            Curve::P521 => is_signed!(p521, key, &hash, signature),
        };
        if is_signed && is_uncompressed(key) { Ok(()) } else { Err(InvalidSignature) }
    }

    fn public_key_alg_id(&self) -> AlgorithmIdentifier {
        match self.0 {
            Curve::P256 => alg_id::ECDSA_P256,
            Curve::P384 => alg_id::ECDSA_P384,
            Curve::P521 => alg_id::ECDSA_P521,
        }
    }

    fn signature_alg_id(&self) -> AlgorithmIdentifier {
        match self.1 {
            Hash::Sha256 => alg_id::ECDSA_SHA256,
            Hash::Sha384 => alg_id::ECDSA_SHA384,
            Hash::Sha512 => alg_id::ECDSA_SHA512,
        }
    }
}

/// Whether a point is uncompressed: the only form that TLS has, and that *ring* and Go read in certificates.
fn is_uncompressed(point: &[u8]) -> bool {
    point.first() == Some(&4)
}

/// Key exchange over P-521, for servers that offer nothing else. It is offered last.
#[derive(Debug)]
struct P521Exchange;

impl SupportedKxGroup for P521Exchange {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, Error> {
        let secret = EphemeralSecret::try_generate().map_err(|_| Error::FailedToGetRandomBytes)?;
        let public = secret.public_key().to_sec1_point(false).as_bytes().to_vec();
        Ok(Box::new(P521Exchanging { secret, public }))
    }

    fn name(&self) -> NamedGroup {
        NamedGroup::secp521r1
    }
}

struct P521Exchanging {
    secret: EphemeralSecret,
    public: Vec<u8>,
}

impl ActiveKeyExchange for P521Exchanging {
    fn complete(self: Box<Self>, peer: &[u8]) -> Result<SharedSecret, Error> {
        let key = p521::PublicKey::from_sec1_bytes(peer).ok().filter(|_| is_uncompressed(peer));
        let key = key.ok_or(PeerMisbehaved::InvalidKeyShare)?;
        Ok(SharedSecret::from(self.secret.diffie_hellman(&key).raw_secret_bytes().as_slice()))
    }

    fn pub_key(&self) -> &[u8] {
        &self.public
    }

    fn group(&self) -> NamedGroup {
        NamedGroup::secp521r1
    }
}

/// Private keys: *ring*'s kinds, and P-521.
#[derive(Debug)]
struct Keys;

impl KeyProvider for Keys {
    fn load_private_key(&self, key: PrivateKeyDer<'static>) -> Result<Arc<dyn SigningKey>, Error> {
        let p521 = match &key {
            PrivateKeyDer::Pkcs8(key) => p521::SecretKey::from_pkcs8_der(key.secret_pkcs8_der()).ok(),
            PrivateKeyDer::Sec1(key) => p521::SecretKey::from_sec1_der(key.secret_sec1_der()).ok(),
            _ => None,
        };
        match p521 {
            Some(key) => Ok(Arc::new(P521Key(key.into()))),
            None => ring::default_provider().key_provider.load_private_key(key),
        }
    }
}

/// A private key on P-521, which signs SHA-512 hashes as TLS demands.
#[derive(Clone)]
struct P521Key(p521::ecdsa::SigningKey);

impl fmt::Debug for P521Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("P521Key")
    }
}

impl SigningKey for P521Key {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        let is_offered = offered.contains(&SignatureScheme::ECDSA_NISTP521_SHA512);
        is_offered.then(|| Box::new(self.clone()) as Box<dyn Signer>)
    }

    fn public_key(&self) -> Option<SubjectPublicKeyInfoDer<'_>> {
        Some(public_key_to_spki(&alg_id::ECDSA_P521, self.0.verifying_key().to_sec1_point(false).as_bytes()))
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ECDSA
    }
}

impl Signer for P521Key {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let signature: Result<p521::ecdsa::Signature, _> = self.0.sign_prehash(Sha512::digest(message).as_slice());
        let signature = signature.map_err(|_| Error::General("P-521 cannot sign".to_owned()))?;
        Ok(signature.to_der().as_bytes().to_vec())
    }

    fn scheme(&self) -> SignatureScheme {
        SignatureScheme::ECDSA_NISTP521_SHA512
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_those_of_the_key_and_the_message() {
        let key = P521Key(p521::ecdsa::SigningKey::generate());
        let other = P521Key(p521::ecdsa::SigningKey::generate());
        let point = |key: &P521Key, compressed| key.0.verifying_key().to_sec1_point(compressed).as_bytes().to_vec();
        let signature = key.sign(b"message").unwrap();
        let verify =
            |key: &[u8], message: &[u8], signature: &[u8]| P521_SHA512.verify_signature(key, message, signature);
        verify(&point(&key, false), b"message", &signature).unwrap();
        assert!(verify(&point(&key, false), b"another", &signature).is_err());
        assert!(verify(&point(&other, false), b"message", &signature).is_err());
        assert!(verify(&point(&key, true), b"message", &signature).is_err(), "TLS knows no compressed points");
        assert!(P521_SHA384.verify_signature(&point(&key, false), b"message", &signature).is_err());
        for at in 0..signature.len() {
            let mut forged = signature.clone();
            forged[at] ^= 1;
            assert!(verify(&point(&key, false), b"message", &forged).is_err(), "byte {at}");
        }
        for odd in [&[][..], &[4], &[0; 133], &[4; 133], &[0x30, 0], &[0x30, 6, 2, 1, 0, 2, 1, 0]] {
            assert!(
                verify(odd, b"message", &signature).is_err() && verify(&point(&key, false), b"message", odd).is_err()
            );
        }
    }

    #[test]
    fn both_sides_agree_on_a_key() {
        let (ours, theirs) = (P521Exchange.start().unwrap(), P521Exchange.start().unwrap());
        let (our_key, their_key) = (ours.pub_key().to_vec(), theirs.pub_key().to_vec());
        let (one, other) = (ours.complete(&their_key).unwrap(), theirs.complete(&our_key).unwrap());
        assert_eq!((one.secret_bytes(), one.secret_bytes().len()), (other.secret_bytes(), 66));
        for odd in [&[][..], &[0], &[4; 133], &their_key[..132]] {
            assert!(P521Exchange.start().unwrap().complete(odd).is_err());
        }
    }
}
