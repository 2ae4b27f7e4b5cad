//! Reads an answer's body: bounded, decoded, its memory accounted for.

use std::io::{self, Write};

use bytes::{Bytes, BytesMut};
use reqwest::{
    Response,
    header::{CONTENT_ENCODING, HeaderMap},
};
use tokio::time::Instant;

use super::memory::{AnswerMemory, Held, SMALL};

/// The largest answer that is accepted: a thousand embeddings of 4,096 numbers are about 90 MB.
pub const MAX_ANSWER: usize = 128 * 1024 * 1024;
/// The largest window of zstd that HTTP allows (RFC 9659), as a power of two: a decoder has that much memory.
const ZSTD_WINDOW: u32 = 23;

/// Why a body could not be read completely.
#[derive(Debug)]
pub(super) enum Unread {
    /// The connection broke.
    Broken(reqwest::Error),
    /// It took too long.
    TimedOut,
    /// It can't be an answer; says why.
    Bad(String),
}

impl From<reqwest::Error> for Unread {
    fn from(error: reqwest::Error) -> Self {
        Self::Broken(error)
    }
}

/// A complete body, and its part of the memory budget.
pub(super) struct Body {
    pub(super) bytes: Bytes,
    pub(super) held: Held,
}

/// Reads a body until `deadline`; the time in which it waits for memory is not counted.
pub(super) async fn read(
    response: &mut Response,
    memory: &AnswerMemory,
    mut deadline: Instant,
) -> Result<Body, Unread> {
    let mut decoder = Decoder::of(response.headers())?;
    // The length of an encoded body says little.
    let length = response.content_length().filter(|_| decoder.is_none());
    let mut held = Held::default();
    if let Some(length) = length {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > MAX_ANSWER {
            return Err(too_large());
        }
        held = unhurried(memory.whole(length), &mut deadline).await;
    }
    let mut first: Option<Bytes> = None;
    let mut all: Option<BytesMut> = None;
    let mut size = 0;
    loop {
        let next = tokio::time::timeout_at(deadline, response.chunk()).await.map_err(|_| Unread::TimedOut)?;
        let Some(piece) = next? else { break };
        if let Some(decoder) = &mut decoder {
            decoder.push(&piece)?;
            size = decoder.sink().bytes.len();
        } else {
            size += piece.len();
        }
        if size > MAX_ANSWER {
            return Err(too_large());
        }
        if length.is_none() {
            unhurried(memory.grow(&mut held, size), &mut deadline).await;
        }
        if decoder.is_some() {
            continue;
        }
        match (&first, &mut all) {
            // Most answers come in one piece, which is not copied.
            (None, None) => first = Some(piece),
            (Some(begin), None) => {
                let known = length.and_then(|length| usize::try_from(length).ok()).unwrap_or(0);
                let mut joined = BytesMut::with_capacity(known.max(size));
                joined.extend_from_slice(begin);
                joined.extend_from_slice(&piece);
                (first, all) = (None, Some(joined));
            }
            (_, Some(all)) => all.extend_from_slice(&piece),
        }
    }
    let bytes = match decoder {
        Some(decoder) => decoder.finish()?.into(),
        None => all.map(BytesMut::freeze).or(first).unwrap_or_default(),
    };
    if size <= SMALL {
        memory.shrink(&mut held, size);
    }
    Ok(Body { bytes, held })
}

/// Waits for memory and extends the deadline by that time, because the worker is not to blame.
async fn unhurried<T>(wait: impl Future<Output = T>, deadline: &mut Instant) -> T {
    let began = Instant::now();
    let done = wait.await;
    *deadline += began.elapsed();
    done
}

fn too_large() -> Unread {
    Unread::Bad(format!("it is over {MAX_ANSWER} bytes"))
}

/// Decodes a body while it arrives.
pub(super) enum Decoder {
    Gzip(flate2::write::MultiGzDecoder<Sink>),
    /// With zlib's frame, as HTTP says, or without it, as some servers send it; by its first bytes.
    Deflate(Deflate),
    Zstd(zstd::stream::write::Decoder<'static, Sink>),
}

pub(super) enum Deflate {
    Begin(Vec<u8>),
    Zlib(flate2::write::ZlibDecoder<Sink>),
    Raw(flate2::write::DeflateDecoder<Sink>),
}

impl Deflate {
    fn decide(begin: &[u8]) -> Self {
        let framed = matches!(begin, [a, b, ..]
            if a & 0x0f == 8 && (u16::from(*a) << 8 | u16::from(*b)).is_multiple_of(31));
        if framed {
            Self::Zlib(flate2::write::ZlibDecoder::new(Sink::default()))
        } else {
            Self::Raw(flate2::write::DeflateDecoder::new(Sink::default()))
        }
    }
}

/// The output of a decoder, up to the size limit of an answer.
#[derive(Default)]
pub(super) struct Sink {
    bytes: Vec<u8>,
    overflown: bool,
}

impl Write for Sink {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + piece.len() > MAX_ANSWER {
            self.overflown = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

static NOTHING: Sink = Sink { bytes: Vec::new(), overflown: false };

impl Decoder {
    /// The one that the headers ask for, if any.
    pub(super) fn of(headers: &HeaderMap) -> Result<Option<Self>, Unread> {
        let codings: Vec<String> = headers
            .get_all(CONTENT_ENCODING)
            .iter()
            .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
            .map(|coding| String::from_utf8_lossy(coding).trim().to_ascii_lowercase())
            .filter(|coding| !coding.is_empty() && coding != "identity")
            .collect();
        match codings.as_slice() {
            [] => Ok(None),
            [one] => match one.as_str() {
                "gzip" | "x-gzip" => Ok(Some(Self::Gzip(flate2::write::MultiGzDecoder::new(Sink::default())))),
                "deflate" => Ok(Some(Self::Deflate(Deflate::Begin(Vec::new())))),
                "zstd" => {
                    let made = zstd::stream::write::Decoder::new(Sink::default())
                        .and_then(|mut decoder| decoder.window_log_max(ZSTD_WINDOW).map(|()| decoder));
                    made.map(|decoder| Some(Self::Zstd(decoder))).map_err(|error| corrupt("zstd", &error))
                }
                _ => Err(unknown(one)),
            },
            several => Err(unknown(&several.join(", "))),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Gzip(_) => "gzip",
            Self::Deflate(_) => "deflate",
            Self::Zstd(_) => "zstd",
        }
    }

    fn sink(&self) -> &Sink {
        match self {
            Self::Gzip(decoder) => decoder.get_ref(),
            Self::Deflate(Deflate::Zlib(decoder)) => decoder.get_ref(),
            Self::Deflate(Deflate::Raw(decoder)) => decoder.get_ref(),
            Self::Deflate(Deflate::Begin(_)) => &NOTHING,
            Self::Zstd(decoder) => decoder.get_ref(),
        }
    }

    /// What has come out of it since the last time, for who passes it on: then the bound holds for each piece.
    pub(super) fn take(&mut self) -> Vec<u8> {
        let sink = match self {
            Self::Gzip(decoder) => decoder.get_mut(),
            Self::Deflate(Deflate::Zlib(decoder)) => decoder.get_mut(),
            Self::Deflate(Deflate::Raw(decoder)) => decoder.get_mut(),
            Self::Deflate(Deflate::Begin(_)) => return Vec::new(),
            Self::Zstd(decoder) => decoder.get_mut(),
        };
        std::mem::take(&mut sink.bytes)
    }

    pub(super) fn push(&mut self, piece: &[u8]) -> Result<(), Unread> {
        let pushed = match self {
            Self::Gzip(decoder) => decoder.write_all(piece),
            Self::Zstd(decoder) => decoder.write_all(piece),
            Self::Deflate(Deflate::Zlib(decoder)) => decoder.write_all(piece),
            Self::Deflate(Deflate::Raw(decoder)) => decoder.write_all(piece),
            Self::Deflate(deflate @ Deflate::Begin(_)) => {
                let Deflate::Begin(begin) = deflate else { return Ok(()) };
                begin.extend_from_slice(piece);
                if begin.len() < 2 {
                    return Ok(());
                }
                let begin = std::mem::take(begin);
                *deflate = Deflate::decide(&begin);
                return self.push(&begin);
            }
        };
        // The decoder hands on what it has at the next write: then it is too late to tell how large the answer is.
        let flushed = pushed.and_then(|()| match self {
            Self::Gzip(decoder) => decoder.flush(),
            Self::Zstd(decoder) => decoder.flush(),
            Self::Deflate(Deflate::Zlib(decoder)) => decoder.flush(),
            Self::Deflate(Deflate::Raw(decoder)) => decoder.flush(),
            Self::Deflate(Deflate::Begin(_)) => Ok(()),
        });
        flushed.map_err(|error| if self.sink().overflown { too_large() } else { corrupt(self.name(), &error) })
    }

    pub(super) fn finish(self) -> Result<Vec<u8>, Unread> {
        let name = self.name();
        let finished = match self {
            Self::Gzip(decoder) => decoder.finish(),
            Self::Deflate(Deflate::Zlib(decoder)) => decoder.finish(),
            Self::Deflate(Deflate::Raw(decoder)) => decoder.finish(),
            Self::Deflate(Deflate::Begin(_)) => Ok(Sink::default()),
            Self::Zstd(mut decoder) => decoder.flush().map(|()| decoder.into_inner()),
        };
        finished.map(|sink| sink.bytes).map_err(|error| corrupt(name, &error))
    }
}

fn unknown(codings: &str) -> Unread {
    let shown: String = codings.chars().take(100).collect();
    Unread::Bad(format!(
        "its Content-Encoding is {shown:?}, and tidemill reads only gzip, deflate and zstd: switch the encoding off in the worker or the proxy before it"
    ))
}

fn corrupt(name: &str, error: &io::Error) -> Unread {
    Unread::Bad(format!("its {name} data is corrupt or ends early ({error})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoder(coding: &str) -> Result<Option<Decoder>, Unread> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_ENCODING, coding.parse().unwrap());
        Decoder::of(&headers)
    }

    fn decode(coding: &str, body: &[u8], step: usize) -> Result<Vec<u8>, Unread> {
        let mut decoder = decoder(coding)?.unwrap();
        for piece in body.chunks(step) {
            decoder.push(piece)?;
        }
        decoder.finish()
    }

    fn encoded(coding: &str, text: &[u8]) -> Vec<u8> {
        fn all(mut to: impl Write, text: &[u8]) {
            to.write_all(text).unwrap();
            to.flush().unwrap();
        }
        let (mut out, level) = (Vec::new(), flate2::Compression::fast());
        match coding {
            "gzip" => all(flate2::write::GzEncoder::new(&mut out, level), text),
            "deflate" => all(flate2::write::ZlibEncoder::new(&mut out, level), text),
            "raw" => all(flate2::write::DeflateEncoder::new(&mut out, level), text),
            _ => out = zstd::encode_all(text, 1).unwrap(),
        }
        out
    }

    #[test]
    fn every_coding_is_decoded_in_pieces_of_any_size() {
        let text = br#"{"choices":[]}"#.repeat(5_000);
        for (made, named) in
            [("gzip", "gzip"), ("gzip", "X-GZIP"), ("deflate", "deflate"), ("raw", "deflate"), ("zstd", "zstd")]
        {
            let body = encoded(made, &text);
            for step in [1, 7, 1_000_000] {
                assert_eq!(decode(named, &body, step).unwrap(), text, "{made} {step}");
            }
        }
    }

    #[test]
    fn what_can_not_be_decoded_is_named() {
        for coding in ["br", "compress", "gzip, br", "gzip, gzip", "utf-8"] {
            let Err(Unread::Bad(said)) = decoder(coding) else { panic!("{coding}") };
            assert!(said.contains(coding), "{said}");
        }
        assert!(decoder("identity").unwrap().is_none());
        for coding in ["gzip", "deflate", "zstd"] {
            let Err(Unread::Bad(said)) = decode(coding, b"{\"choices\":[]}", 100) else { panic!("{coding}") };
            assert!(said.contains(coding), "{said}");
            let body = encoded(coding, &br#"{"choices":[]}"#.repeat(500));
            let cut = decode(coding, &body[..body.len() / 2], 100);
            assert!(cut.is_err() || coding == "zstd", "{coding} cut off");
        }
    }

    #[test]
    fn a_bomb_is_too_large() {
        let mebibyte = vec![b' '; 1024 * 1024];
        for coding in ["gzip", "zstd"] {
            let one = encoded(coding, &mebibyte);
            let many = one.repeat(MAX_ANSWER / mebibyte.len() + 1);
            let Err(Unread::Bad(said)) = decode(coding, &many, 64 * 1024) else { panic!("{coding}") };
            assert!(said.contains("is over"), "{said}");
        }
    }
}
