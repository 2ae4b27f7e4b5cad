//! Forms with a file in them, read while they come. The file is for the caller; other fields are small.

use std::collections::VecDeque;

use http::{HeaderMap, StatusCode, header};

use super::{
    body::{Pieces, length, plain},
    multipart::{Malformed, Multipart, Piece, boundary},
    problem::Problem,
};
use crate::{
    access::Received,
    service::{Service, ServiceError, files::Patience},
};

/// The most bytes of a form field that is no file.
const FIELD: usize = 64 * 1024;
/// What a form may add to its file: its other fields and all heads.
const FORM: u64 = 4 * 1024 * 1024;

/// A form that comes.
pub(super) struct Form<'a> {
    service: &'a Service,
    multipart: Multipart,
    patience: Patience,
    read: VecDeque<Piece>,
    pieces: &'a mut Pieces,
}

impl<'a> Form<'a> {
    /// Begins a form, whose bytes `received` counts.
    ///
    /// # Errors
    /// [`Problem`]: the body is no form.
    pub(super) fn begin(
        service: &'a Service,
        headers: &HeaderMap,
        received: Received,
        pieces: &'a mut Pieces,
    ) -> Result<Self, Problem> {
        plain(headers)?;
        let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let boundary = boundary(kind).ok_or_else(|| {
            let message = "a file is uploaded as multipart/form-data with a boundary, not in another content-type";
            Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_content_type", message)
        })?;
        let (multipart, patience) = (Multipart::new(&boundary), Patience::new(received));
        Ok(Self { service, multipart, patience, read: VecDeque::new(), pieces })
    }

    /// The next piece; `None` at the end of the form. `gives_way`: what ends a form that has a place, which has less time
    /// while others wait for one.
    ///
    /// # Errors
    /// [`Problem`].
    pub(super) async fn next(
        &mut self,
        gives_way: Option<impl Future<Output = ServiceError>>,
    ) -> Result<Option<Piece>, Problem> {
        let mut gives_way = gives_way.map(Box::pin);
        loop {
            if let Some(piece) = self.read.pop_front() {
                return Ok(Some(piece));
            }
            if self.multipart.is_done() {
                return Ok(None);
            }
            let Some(bytes) = self.patience.next_of(self.service, gives_way.as_mut(), self.pieces).await? else {
                self.multipart.finish().map_err(malformed)?;
                return Ok(None);
            };
            let mut read = Vec::new();
            self.multipart.push(bytes, &mut read).map_err(malformed)?;
            self.read.extend(read);
        }
    }
}

/// The size of the file that the length of a form's body announces, if any.
pub(super) fn announced(headers: &HeaderMap) -> Option<u64> {
    length(headers).map(|length| length.saturating_sub(FORM))
}

/// A field that is no file.
pub(super) struct Field {
    pub(super) name: String,
    text: Vec<u8>,
}

impl Field {
    pub(super) fn new(name: String) -> Self {
        Self { name, text: Vec::new() }
    }

    /// Takes more of its text.
    ///
    /// # Errors
    /// [`Problem`]: it is too long.
    pub(super) fn push(&mut self, data: &[u8]) -> Result<(), Problem> {
        if self.text.len() + data.len() > FIELD {
            let message = format!("the form field is longer than {FIELD} bytes");
            return Err(Problem::invalid("invalid_multipart", &self.name, message));
        }
        self.text.extend_from_slice(data);
        Ok(())
    }

    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.text).into_owned()
    }
}

/// A second file in a form.
pub(super) fn twice(name: &str) -> Problem {
    let message = format!("the form has two parts named '{name}': upload one file at a time");
    Problem::invalid("invalid_multipart", name, message)
}

#[allow(clippy::needless_pass_by_value)] // as map_err gives it
fn malformed(why: Malformed) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, "invalid_multipart", why.to_string())
}
