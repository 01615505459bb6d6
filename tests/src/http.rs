//! The part of HTTP/1.1 that tests need: send a request, read the head of a message.
//!
//! Bodies may be files; connections are not reused. The project's own HTTP stack is deliberately not used here, so that
//! a fault in it cannot hide itself.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// How long a peer may stay silent.
const SILENCE: Duration = Duration::from_secs(120);

/// The first line and the headers of a request or a response.
#[derive(Debug, Clone, Default)]
pub struct Head {
    /// For example `GET /v2/ HTTP/1.1`, without the end of line.
    pub first: String,
    /// Names as sent, with their values.
    pub headers: Vec<(String, String)>,
}

impl Head {
    /// Reads up to the empty line. Returns `None` if the peer closed the connection before it sent anything.
    pub fn read(reader: &mut impl BufRead) -> Result<Option<Self>> {
        let mut head = Self { first: line(reader)?, headers: Vec::new() };
        if head.first.is_empty() {
            return Ok(None);
        }
        // This may be a TLS greeting, whose sender waits for an answer before it sends more.
        if !head.first.contains("HTTP/") {
            bail!("{:?} does not begin an HTTP message", head.first);
        }
        loop {
            let line = line(reader)?;
            if line.is_empty() {
                return Ok(Some(head));
            }
            let (name, value) = line.split_once(':').with_context(|| format!("`{line}` is not an HTTP header"))?;
            head.headers.push((name.to_owned(), value.trim().to_owned()));
        }
    }

    /// The value of a header; the case of its name does not matter.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Replaces or adds a header.
    pub fn set(&mut self, name: &str, value: &str) {
        self.remove(name);
        self.headers.push((name.to_owned(), value.to_owned()));
    }

    /// Removes a header.
    pub fn remove(&mut self, name: &str) {
        self.headers.retain(|(key, _)| !key.eq_ignore_ascii_case(name));
    }

    /// Word `number` of the first line, counted from 0.
    pub fn word(&self, number: usize) -> &str {
        self.first.split(' ').nth(number).unwrap_or("")
    }

    /// The bytes on the wire, including the empty line.
    pub fn bytes(&self) -> Vec<u8> {
        let mut text = format!("{}\r\n", self.first);
        for (name, value) in &self.headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text.push_str("\r\n");
        text.into_bytes()
    }
}

fn line(reader: &mut impl BufRead) -> Result<String> {
    let mut line = Vec::new();
    reader.take(64 * 1024).read_until(b'\n', &mut line).context("cannot read an HTTP head")?;
    Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
}

/// A response.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// First line and headers.
    pub head: Head,
    /// The body, with the chunked encoding removed.
    pub body: Vec<u8>,
}

/// Sends one request over plain HTTP to `address` (`host:port`) and reads the whole response.
pub fn request(
    address: &str,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    size: u64,
    body: impl Read,
) -> Result<Answer> {
    let stream = TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
    stream.set_read_timeout(Some(SILENCE))?;
    let mut head = Head { first: format!("{method} {path} HTTP/1.1"), headers: Vec::new() };
    head.set("Host", address);
    head.set("Connection", "close");
    head.set("Content-Length", &size.to_string());
    for (name, value) in headers {
        head.set(name, value);
    }
    (&stream).write_all(&head.bytes())?;
    std::io::copy(&mut body.take(size), &mut &stream)?;
    answer(&stream, method).with_context(|| format!("no answer to {method} http://{address}{path}"))
}

/// Sends a GET request without a body.
pub fn get(address: &str, path: &str, headers: &[(&str, &str)]) -> Result<Answer> {
    request(address, "GET", path, headers, 0, std::io::empty())
}

fn answer(stream: &TcpStream, method: &str) -> Result<Answer> {
    let mut reader = BufReader::new(stream);
    let head = Head::read(&mut reader)?.context("the peer closed the connection")?;
    let status = head.word(1).parse().with_context(|| format!("`{}` is not an HTTP answer", head.first))?;
    let mut body = Vec::new();
    let chunked = head.header("Transfer-Encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"));
    match head.header("Content-Length").map(str::parse::<u64>).transpose()? {
        _ if method == "HEAD" => {}
        _ if chunked => read_chunks(&mut reader, &mut body)?,
        Some(length) => {
            let read = reader.take(length).read_to_end(&mut body)?;
            if read as u64 != length {
                bail!("the body ended after {read} of {length} bytes");
            }
        }
        None => drop(reader.read_to_end(&mut body)?),
    }
    Ok(Answer { status, head, body })
}

/// Reads a body in chunked encoding.
pub(crate) fn read_chunks(reader: &mut impl BufRead, body: &mut Vec<u8>) -> Result<()> {
    loop {
        let size = u64::from_str_radix(line(reader)?.split(';').next().unwrap_or(""), 16)?;
        reader.take(size).read_to_end(body)?;
        line(reader)?;
        if size == 0 {
            return Ok(());
        }
    }
}
