//! Little-endian fields at fixed offsets: the only way numbers get into and out of the format's bytes.

use crate::error::Error;

/// Appends fields to a byte vector.
pub trait Put {
    /// Appends one byte.
    fn put_u8(&mut self, value: u8);
    /// Appends a 16-bit field.
    fn put_u16(&mut self, value: u16);
    /// Appends a 32-bit field.
    fn put_u32(&mut self, value: u32);
    /// Appends a 64-bit field.
    fn put_u64(&mut self, value: u64);
    /// Appends bytes as they are.
    fn put_bytes(&mut self, value: &[u8]);
}

impl Put for Vec<u8> {
    fn put_u8(&mut self, value: u8) {
        self.push(value);
    }
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }
    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }
    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }
    fn put_bytes(&mut self, value: &[u8]) {
        self.extend_from_slice(value);
    }
}

/// Takes fields off the front of a slice; running out of bytes is [`Error::Corrupt`], never a panic.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Fields<'a> {
    /// Reads fields of `what` (named in errors) from `bytes`.
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Fields<'a> {
        Fields { rest: bytes, what }
    }

    /// The next `n` bytes.
    pub fn bytes(&mut self, n: usize) -> Result<&'a [u8], Error> {
        let (head, rest) =
            self.rest.split_at_checked(n).ok_or_else(|| Error::corrupt(self.what, "it ends too early"))?;
        self.rest = rest;
        Ok(head)
    }

    /// The next `N` bytes as an array.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    /// The next byte.
    pub fn u8(&mut self) -> Result<u8, Error> {
        Ok(self.array::<1>()?[0])
    }

    /// The next 16-bit field.
    pub fn u16(&mut self) -> Result<u16, Error> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// The next 32-bit field.
    pub fn u32(&mut self) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// The next 64-bit field.
    pub fn u64(&mut self) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Whether all bytes have been taken.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }
}
