//! A request, read: its records, checked, each with its id and its route.

use std::{sync::Arc, time::Instant};

use actix_web::{HttpRequest, http::StatusCode, web};
use bytes::Bytes;

use super::{
    IngestState, KeySource, Request, SignedForm,
    body::Coding,
    content::{Content, EVENT_PREFIX},
    headers::{self, request_key},
    refusal::too_large,
};
use crate::{
    actors::receipts::AssignedRecord,
    cloud_events::{self, InvalidAttribute, InvalidJsonEvent, JsonEvent},
    http::{
        problem::{Problem, ProblemKind},
        tokens::TOKEN_TRUST,
    },
    lane_id::LaneId,
    record::{
        Invalid, Origin, Record, Schema, as_text,
        batch::{self, Form, InvalidBatch, parse_all},
        parse_body,
        pointer::{PointerSet, Values},
    },
    routing::rules::Assignment,
    trace::RequestTrace,
};

/// A record that is as the schema wants it, and the values that rules look at.
type ParsedRecord<'b> = (Bytes, Values<'b>);

impl IngestState {
    pub(super) async fn read_request(
        &self,
        request: &HttpRequest,
        body: web::Payload,
        pinned: Option<LaneId>,
        trace: &mut RequestTrace,
    ) -> Result<Request, Problem> {
        let headers = request.headers();
        let signed = self.signatures.as_ref().map(|keys| keys.begin(headers));
        let signed = signed.transpose()?;
        let content = Content::of(headers)?;
        let coding = Coding::of(headers)?;
        let key = request_key(headers, signed.as_ref().map(|signed| signed.id))?;
        if self.require_key && key.is_none() && !content.is_event() {
            return Err(no_key());
        }
        self.body.check_length(headers)?;
        let client_trace = headers::trace(headers);
        let origin = Some(Origin::now(Arc::clone(&self.run)));
        let began = Instant::now();
        let body = self.body.read(body, coding).await?;
        // A token may be removed while a body comes slowly.
        if let Some(tokens) = &self.tokens
            && began.elapsed() > TOKEN_TRUST
        {
            tokens.check(headers)?;
        }
        if let Some(signed) = &signed {
            signed.check(&body)?;
        }
        let form = match (&content, body.trim_ascii_start().first()) {
            (Content::Lines, _) => Some(Form::Lines),
            (Content::EventBatch, _) | (Content::Json, Some(b'[')) => Some(Form::Array),
            _ => None,
        };
        // No signature covers the headers of an event: sent again with another `ce-id`, it would be
        // another one.
        let is_binary = matches!(content, Content::BinaryEvent(_));
        let signed_form = signed.as_ref().map(|signed| SignedForm {
            id: signed.id.into(),
            form: content.name(),
        });
        let signed_key = signed.filter(|_| is_binary).map(|signed| signed.id.into());
        let events = self.read_events(content, &body)?;
        let routes = self.routing.get();
        let bodies = match &events {
            None => self.parse(&body, form, routes.pointers())?,
            Some(events) => self.parse_data(&body, events, form, routes.pointers())?,
        };
        if bodies.len() > batch::MAX {
            return Err(too_many());
        }
        let keys = match (&events, signed_key, key) {
            (_, Some(key), _) | (None, None, Some(key)) => KeySource::Header(key),
            (Some(_), None, _) => KeySource::Event,
            (None, None, None) => KeySource::None,
        };
        // The new ids of a batch differ in their last bits only.
        let batch_ids = (matches!(keys, KeySource::None) && form.is_some()).then(Record::new_ids);
        let mut batch_ids = batch_ids.into_iter().flatten();
        let records = bodies.into_iter().enumerate();
        let records = records.map(|(index, (body, values))| {
            let event = events.as_ref().map(|events| &events[index].attributes);
            let id = match (event, &keys, form) {
                (_, KeySource::Header(key), None) => Arc::clone(key),
                (_, KeySource::Header(key), Some(_)) => format!("{key}/{index}").into(),
                (Some(event), ..) => event.key(),
                _ => batch_ids.next().unwrap_or_else(Record::new_id),
            };
            let header = |name: &str| match (event, name.strip_prefix(EVENT_PREFIX)) {
                (Some(event), Some(attribute)) => event.get(attribute),
                _ => headers.get(name).map(headers::value_text),
            };
            let assignment = Assignment {
                pinned,
                ..routes.assign(&id, &values, header)
            };
            let record = Record {
                trace: trace.record(&id, client_trace.as_ref()),
                id,
                body,
                origin: origin.clone(),
                api: assignment.route.api.clone(),
                event: event.map(|event| event.to_text().into()),
            };
            AssignedRecord { record, assignment }
        });
        Ok(Request {
            records: records.collect(),
            form,
            keys,
            signed: signed_form,
        })
    }

    /// The records of `body`, each checked against the schema, and the values of `pointers` in
    /// each.
    fn parse<'b>(
        &self,
        body: &'b Bytes,
        form: Option<Form>,
        pointers: &PointerSet,
    ) -> Result<Vec<ParsedRecord<'b>>, Problem> {
        match form {
            None => {
                let parsed = parse_body(body, &self.rules, pointers);
                Ok(vec![parsed.map_err(|why| self.invalid(&why))?])
            }
            Some(form) => parse_all(body, form, &self.rules, pointers).map_err(|why| match why {
                InvalidBatch::Body(why) => self.invalid(&why),
                InvalidBatch::Record { index, why } => self.invalid(&why).with("index", index),
            }),
        }
    }

    /// The same of the data of each event.
    fn parse_data<'b>(
        &self,
        body: &Bytes,
        events: &'b [JsonEvent],
        form: Option<Form>,
        pointers: &PointerSet,
    ) -> Result<Vec<ParsedRecord<'b>>, Problem> {
        let events = events.iter().enumerate();
        let records = events.map(|(index, event)| {
            let parsed = parse_body(&event.data, &self.rules, pointers);
            parsed.map_err(|why| {
                let why = match offset(body, &event.data) {
                    Some(offset) => why.further_on(body, offset),
                    None => why,
                };
                at(index, form, self.invalid(&why))
            })
        });
        records.collect()
    }

    /// The events of a request; `None` if its records are no events.
    fn read_events(
        &self,
        content: Content,
        body: &Bytes,
    ) -> Result<Option<Vec<JsonEvent>>, Problem> {
        match content {
            Content::Json | Content::Lines => Ok(None),
            Content::BinaryEvent(attributes) => Ok(Some(vec![JsonEvent {
                attributes: *attributes,
                data: body.clone(),
            }])),
            Content::StructuredEvent => {
                let text = as_text(body).map_err(|why| self.invalid(&why))?;
                let event = cloud_events::parse_event(body, text);
                Ok(Some(vec![event.map_err(|why| self.invalid_event(&why))?]))
            }
            Content::EventBatch => {
                let batch = cloud_events::parse_batch(body, batch::MAX);
                let batch = batch.map_err(|why| self.invalid_event(&why))?;
                if batch.len() > batch::MAX {
                    return Err(too_many());
                }
                let events = batch.into_iter().enumerate().map(|(index, text)| {
                    let event = cloud_events::parse_event(body, text);
                    event.map_err(|why| self.invalid_event(&why).with("index", index))
                });
                events.collect::<Result<_, _>>().map(Some)
            }
        }
    }

    fn invalid_event(&self, why: &InvalidJsonEvent) -> Problem {
        let detail = why.to_string();
        match why {
            InvalidJsonEvent::Json(why) => self.invalid(why),
            InvalidJsonEvent::Form => Problem::bad_request(ProblemKind::CloudEvent, detail),
            InvalidJsonEvent::Attribute(InvalidAttribute { name, .. }) => {
                let name = name.replace('~', "~0").replace('/', "~1");
                Problem::bad_request(ProblemKind::CloudEvent, detail)
                    .with("field", format!("/{name}"))
            }
            InvalidJsonEvent::DataType(_) => Problem::unsupported(ProblemKind::MediaType, detail)
                .with("field", "/datacontenttype"),
            InvalidJsonEvent::NoData => {
                Problem::bad_request(ProblemKind::CloudEvent, detail).with("field", "/data")
            }
        }
    }

    fn invalid(&self, why: &Invalid) -> Problem {
        let unprocessable = |detail| {
            Problem::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                ProblemKind::Schema,
                detail,
            )
        };
        match why {
            Invalid::Malformed { line, column, .. } => {
                Problem::bad_request(ProblemKind::Json, why.to_string())
                    .with("line", *line)
                    .with("column", *column)
            }
            Invalid::TooLarge { .. } => too_large(why.to_string()),
            Invalid::Schema { field, .. } => {
                let of_case = match &self.rules.schema {
                    Schema::Case => {
                        "; the schema is `case`, and `[ingest].schema = \"any\"` takes any JSON \
                         object"
                    }
                    Schema::Any | Schema::File(_) => "",
                };
                let problem = unprocessable(format!("{why}{of_case}"));
                match field {
                    Some(field) => problem.with("field", field.as_str()),
                    None => problem,
                }
            }
        }
    }
}

/// The place of `part` in `body`; `None` if it is no part of it.
fn offset(body: &Bytes, part: &Bytes) -> Option<usize> {
    let offset = (part.as_ptr() as usize).checked_sub(body.as_ptr() as usize)?;
    (offset + part.len() <= body.len()).then_some(offset)
}

/// A problem of the record at `index`.
fn at(index: usize, form: Option<Form>, problem: Problem) -> Problem {
    match form {
        None => problem,
        Some(_) => problem.with("index", index),
    }
}

fn no_key() -> Problem {
    Problem::bad_request(
        ProblemKind::IdempotencyKey,
        "This node wants an Idempotency-Key with each request ([ingest].require_key): one of 1 to \
         255 visible ASCII characters, another one for each record, and the same when it is sent \
         again",
    )
}

fn too_many() -> Problem {
    too_large(format!("A request has at most {} records", batch::MAX))
}
