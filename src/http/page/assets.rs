//! The files of the page besides its HTML, which are parts of the program.

use std::{
    io::{self, Write as _},
    sync::LazyLock,
};

use actix_web::{
    HttpRequest, HttpResponse, HttpResponseBuilder,
    http::header::{
        self, AcceptEncoding, ContentEncoding, ETag, Encoding, EntityTag, Header as _, IfNoneMatch,
    },
};
use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use siphasher::sip128::SipHasher13;

/// A text, and the same packed.
pub struct PackedText {
    plain: Bytes,
    gzip: Option<Bytes>,
}

impl PackedText {
    pub fn new(plain: impl Into<Bytes>, level: Compression) -> Self {
        let plain = plain.into();
        // Memory does not fail a write.
        let gzip = gzip(&plain, level).ok().map(Bytes::from);
        Self { plain, gzip }
    }

    /// Puts into `answer` what the client understands.
    pub fn answer(&self, request: &HttpRequest, mut answer: HttpResponseBuilder) -> HttpResponse {
        answer.append_header((header::VARY, "accept-encoding"));
        match &self.gzip {
            Some(gzip) if takes_gzip(request) => answer
                .insert_header(ContentEncoding::Gzip)
                .body(gzip.clone()),
            _ => answer.body(self.plain.clone()),
        }
    }
}

fn gzip(plain: &[u8], level: Compression) -> io::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), level);
    encoder.write_all(plain)?;
    encoder.finish()
}

fn takes_gzip(request: &HttpRequest) -> bool {
    // Without the header, any encoding would do: nobody asks for one.
    let accepted = request.headers().contains_key(header::ACCEPT_ENCODING);
    let accepted = accepted.then(|| AcceptEncoding::parse(request));
    let known = [Encoding::gzip(), Encoding::identity()];
    accepted
        .and_then(Result::ok)
        .and_then(|accepted| accepted.negotiate(known.iter()))
        == Some(Encoding::gzip())
}

/// A file of the page.
pub struct PageFile {
    media_type: &'static str,
    text: PackedText,
    tag: EntityTag,
}

pub static STYLES: LazyLock<PageFile> = LazyLock::new(|| {
    let parts = concat!(
        include_str!("css/base.css"),
        include_str!("css/node.css"),
        include_str!("css/charts.css"),
        include_str!("css/tools.css"),
        include_str!("css/narrow.css"),
    );
    PageFile::new("text/css; charset=utf-8", parts)
});

/// One module: the parts share their names.
pub static SCRIPT: LazyLock<PageFile> = LazyLock::new(|| {
    let parts = concat!(
        include_str!("js/format.js"),
        include_str!("js/history.js"),
        include_str!("js/paint.js"),
        include_str!("js/changes.js"),
        include_str!("js/orders.js"),
        include_str!("js/charts.js"),
        include_str!("js/letters.js"),
        include_str!("js/records.js"),
        include_str!("js/keys.js"),
        include_str!("js/stream.js"),
        include_str!("js/live.js"),
    );
    PageFile::new("text/javascript; charset=utf-8", parts)
});

impl PageFile {
    fn new(media_type: &'static str, text: &'static str) -> Self {
        // Weak: the packed file has the same.
        let tag = SipHasher13::new().hash(text.as_bytes()).as_u128();
        Self {
            media_type,
            text: PackedText::new(text, Compression::best()),
            tag: EntityTag::new_weak(format!("{tag:032x}")),
        }
    }

    /// The file, or 304 for a client that has it.
    pub fn answer(&self, request: &HttpRequest) -> HttpResponse {
        let mut answer = HttpResponse::Ok();
        let has = match IfNoneMatch::parse(request) {
            Ok(IfNoneMatch::Any) => true,
            Ok(IfNoneMatch::Items(tags)) => tags.iter().any(|tag| tag.weak_eq(&self.tag)),
            Err(_) => false,
        };
        if has {
            answer = HttpResponse::NotModified();
        }
        answer
            .content_type(self.media_type)
            .insert_header(ETag(self.tag.clone()))
            // Kept, and asked for each time: the program may be another one by then.
            .insert_header((header::CACHE_CONTROL, "no-cache"));
        if has {
            return answer.finish();
        }
        self.text.answer(request, answer)
    }
}
