//! Downloads from a registry that sends prepared bytes: answers cut short, odd ranges, wrong lengths.

use std::sync::Arc;

use futures::StreamExt;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::registries::oci::tests::{Client, IMPATIENT, layer_of};
use crate::registries::*;

/// A registry that sends prepared bytes, one answer per connection, and notes what it was asked.
struct Script {
    address: String,
    ranges: Arc<Mutex<Vec<Option<String>>>>,
}

impl Script {
    async fn start(answers: Vec<Vec<u8>>) -> Script {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let ranges: Arc<Mutex<Vec<Option<String>>>> = Arc::default();
        let notes = Arc::clone(&ranges);
        tokio::spawn(async move {
            let mut answers = answers.into_iter();
            while let Ok((mut connection, _)) = listener.accept().await {
                let head = read_head(&mut connection).await;
                let blob = head.starts_with("GET /v2/app/blobs/");
                let answer = if blob {
                    answers.next().unwrap_or_else(|| b"HTTP/1.1 404 Gone\r\nContent-Length: 0\r\n\r\n".to_vec())
                } else {
                    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec()
                };
                if blob {
                    let range =
                        head.lines().find_map(|line| line.to_lowercase().strip_prefix("range: ").map(str::to_owned));
                    notes.lock().push(range);
                }
                let _ = connection.write_all(&answer).await;
                let _ = connection.shutdown().await;
            }
        });
        Script { address, ranges }
    }

    fn ranges(&self) -> Vec<Option<String>> {
        self.ranges.lock().clone()
    }
}

async fn read_head(connection: &mut TcpStream) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && connection.read_exact(&mut byte).await.is_ok() {
        head.push(byte[0]);
        // A TLS greeting: its sender waits for an answer.
        if head[0] == 0x16 {
            break;
        }
    }
    String::from_utf8_lossy(&head).into_owned()
}

/// An answer that announces `announced` bytes of body, whatever it sends.
fn answer(status: &str, announced: usize, more: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {announced}\r\nConnection: close\r\n{more}\r\n");
    [head.as_bytes(), body].concat()
}

#[tokio::test]
async fn a_download_that_breaks_goes_on_where_it_broke() {
    let content: Vec<u8> = (0..100u8).collect();
    let script = Script::start(vec![
        answer("200 OK", 100, "", &content[..40]),
        answer("206 Partial Content", 60, "Content-Range: bytes 40-99/100\r\n", &content[40..70]),
        // Starts a little earlier than asked, as servers that serve whole blocks do.
        answer("206 Partial Content", 36, "Content-Range: bytes 64-99/100\r\n", &content[64..]),
    ])
    .await;
    assert_eq!(Client::new().layer(&script.address, &content).await.unwrap(), content);
    let ranges: Vec<_> = script.ranges().into_iter().flatten().collect();
    assert_eq!(ranges, ["bytes=40-", "bytes=70-"]);
}

#[tokio::test]
async fn a_registry_that_ignores_ranges_is_read_from_the_start() {
    let content: Vec<u8> = (0..100u8).collect();
    let script =
        Script::start(vec![answer("200 OK", 100, "", &content[..40]), answer("200 OK", 100, "", &content)]).await;
    assert_eq!(Client::new().layer(&script.address, &content).await.unwrap(), content);
}

#[tokio::test]
async fn odd_ranges_are_not_believed_and_the_whole_is_asked_for() {
    let content: Vec<u8> = (0..100u8).collect();
    let partial = |range: &str| answer("206 Partial Content", 60, &format!("Content-Range: {range}\r\n"), &[9; 60]);
    for odd in [
        partial("bytes 50-99/100"),
        partial("bytes 40-99/200"),
        partial("bytes */100"),
        partial("pages 1-2"),
        answer("206 Partial Content", 60, "Content-Type: multipart/byteranges; boundary=x\r\n", &[9; 60]),
        answer("416 Range Not Satisfiable", 0, "", b""),
        answer("400 Bad Request", 0, "", b""),
        answer("501 Not Implemented", 0, "", b""),
    ] {
        let script =
            Script::start(vec![answer("200 OK", 100, "", &content[..40]), odd, answer("200 OK", 100, "", &content)])
                .await;
        assert_eq!(Client::new().layer(&script.address, &content).await.unwrap(), content);
        assert_eq!(script.ranges(), [None, Some("bytes=40-".to_owned()), None]);
    }
    let script = Script::start(vec![answer("206 Partial Content", 100, "", &content)]).await;
    assert_eq!(Client::new().layer(&script.address, &content).await.unwrap(), content);
    let odd = "Content-Range: bytes 50-99/100\r\n";
    let script = Script::start(vec![answer("206 Partial Content", 50, odd, &content[50..])]).await;
    let error = Client::new().layer(&script.address, &content).await.unwrap_err().to_string();
    assert!(error.contains("go on at byte 0"), "nobody asked for a part: {error}");
}

#[tokio::test]
async fn a_layer_is_as_long_as_it_is_whatever_its_manifest_says() {
    let content: Vec<u8> = (0..100u8).collect();
    let whole = || answer("200 OK", 100, "", &content);
    let no_more = || answer("416 Range Not Satisfiable", 0, "Content-Range: bytes */100\r\n", b"");
    for claimed in [0, 1, 60, 99, 100, 101, 1 << 40] {
        let layer = RemoteLayer { claimed, ..layer_of(&content) };
        let script = Script::start(vec![whole(), no_more(), whole()]).await;
        assert_eq!(Client::new().blob(&script.address, &layer).await.unwrap(), content, "{claimed}");
        // A blob that ends too early is requested again.
        assert_eq!(script.ranges().len(), if claimed > 100 { 3 } else { 1 }, "{claimed}");

        let rest = answer("206 Partial Content", 60, "Content-Range: bytes 40-99/100\r\n", &content[40..]);
        let script = Script::start(vec![answer("200 OK", 100, "", &content[..40]), rest, no_more(), whole()]).await;
        assert_eq!(Client::new().blob(&script.address, &layer).await.unwrap(), content, "{claimed}, broken");
        assert_eq!(script.ranges()[1].as_deref(), Some("bytes=40-"));

        let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n64\r\n".to_vec();
        let chunked = || [&chunked, &content[..], b"\r\n0\r\n\r\n"].concat();
        let script = Script::start(vec![chunked(), no_more(), chunked()]).await;
        assert_eq!(Client::new().blob(&script.address, &layer).await.unwrap(), content, "{claimed}, chunked");
    }
}

#[tokio::test]
async fn a_layer_that_is_cut_short_once_is_asked_for_again() {
    let content: Vec<u8> = (0..100u8).collect();
    let rest = answer("206 Partial Content", 40, "Content-Range: bytes 60-99/100\r\n", &content[60..]);
    let script = Script::start(vec![answer("200 OK", 60, "", &content[..60]), rest]).await;
    assert_eq!(Client::new().layer(&script.address, &content).await.unwrap(), content);
}

#[tokio::test]
async fn progress_renews_patience_and_standstill_ends_it() {
    let content: Vec<u8> = (0..100u8).collect();
    let piece = |n: usize| {
        let range = format!("Content-Range: bytes {}-99/100\r\n", n * 10);
        answer("206 Partial Content", 100 - n * 10, &range, &content[n * 10..n * 10 + 10])
    };
    let mut answers = vec![answer("200 OK", 100, "", &content[..10])];
    answers.extend((1..10).map(piece));
    let script = Script::start(answers).await;
    assert_eq!(Client::new().layer(&script.address, &content).await.unwrap(), content);

    let still = "Content-Range: bytes 10-99/100\r\n";
    let mut answers = vec![answer("200 OK", 100, "", &content[..10])];
    answers.extend((0..9).map(|_| answer("206 Partial Content", 90, still, b"")));
    let script = Script::start(answers).await;
    assert!(Client::new().layer(&script.address, &content).await.is_err());
    assert_eq!(script.ranges().len(), usize::try_from(IMPATIENT.attempts).unwrap());
}

#[tokio::test]
async fn nothing_is_asked_before_the_stream_is_polled() {
    let script = Script::start(Vec::new()).await;
    let image: ImageRef = format!("{}/app:1", script.address).parse().unwrap();
    let mut stream = Client::new().registry.layer(&image, &layer_of(b"x"));
    assert!(script.ranges().is_empty());
    let error = stream.next().await.unwrap().unwrap_err().to_string();
    assert!(error.contains("lacks layer"), "{error}");
}
