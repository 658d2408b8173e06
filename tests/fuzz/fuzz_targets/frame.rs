//! A websocket message that should be a frame: read as an independent reader reads it, and written in the form that
//! the peers insist on.

#![no_main]

use std::collections::HashMap;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use mender_connect::internals::{Frame, SessionId};
use rmpv::Value;

/// A frame as it should be read; properties as they are.
struct Expected {
    proto: u16,
    typ: String,
    sid: String,
    props: Vec<(Value, Value)>,
    body: Vec<u8>,
}

fuzz_target!(|message: &[u8]| {
    // Headers have a bound, which the other reader doesn't know.
    if message.len() > 2048 {
        return;
    }
    let message = Bytes::copy_from_slice(message);
    let read = Frame::decode(&message);
    // Its nesting is limited, and a byte that msgpack never uses is nil for it.
    if let Ok(value) = rmpv::decode::read_value(&mut &message[..]) {
        match (&read, expected(&value)) {
            (Ok(frame), Some(expected)) => compare(frame, &expected),
            (Ok(frame), None) => panic!("{frame:?} of {value:?}"),
            (Err(e), Some(_)) if !message.contains(&0xc1) => panic!("{e} in {value:?}"),
            _ => {}
        }
    }
    let Ok(frame) = read else { return };
    check_form(&frame);
    let again = Frame::decode(&frame.encode().into());
    assert_eq!(again.as_ref(), Ok(&frame), "read, written and read again");

    let more = frame.props.clone().with_i64("offset", -1).with_str("more", "x");
    assert_eq!((more.int("offset"), more.str("more")), (Some(-1), Some("x")));
    assert_eq!(more.str("user_id"), frame.props.str("user_id"));
});

fn bytes(value: &Value) -> Option<Vec<u8>> {
    match value {
        Value::Nil => Some(Vec::new()),
        Value::String(text) => Some(text.as_bytes().to_vec()),
        Value::Binary(bytes) => Some(bytes.clone()),
        _ => None,
    }
}

fn text(value: &Value) -> Option<String> {
    bytes(value).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn expected(message: &Value) -> Option<Expected> {
    let (mut header, mut body) = (None, Vec::new());
    for (key, value) in message.as_map()? {
        match name(key) {
            Some(b"hdr") if value.is_nil() => header = None,
            Some(b"hdr") => header = Some(expected_header(value)?),
            Some(b"body") => body = bytes(value)?,
            _ => {}
        }
    }
    Some(Expected { body, ..header? })
}

fn expected_header(header: &Value) -> Option<Expected> {
    let (mut proto, mut typ, mut sid, mut props) = (0, String::new(), String::new(), Vec::new());
    for (key, value) in header.as_map()? {
        match name(key) {
            Some(b"proto") if value.is_nil() => proto = 0,
            Some(b"proto") => proto = u16::try_from(value.as_u64()?).ok()?,
            Some(b"typ") => typ = text(value)?,
            Some(b"sid") => sid = text(value)?,
            Some(b"props") if value.is_nil() => props.clear(),
            Some(b"props") => props = value.as_map()?.clone(),
            _ => {}
        }
    }
    Some(Expected { proto, typ, sid, props, body: Vec::new() })
}

fn name(key: &Value) -> Option<&[u8]> {
    match key {
        Value::String(text) => Some(text.as_bytes()),
        Value::Binary(bytes) => Some(bytes),
        _ => None,
    }
}

fn compare(frame: &Frame, expected: &Expected) {
    assert_eq!(frame.proto, expected.proto);
    assert_eq!(frame.typ, expected.typ);
    assert_eq!(frame.sid, SessionId::new(&expected.sid));
    assert_eq!(frame.body, expected.body);
    assert_eq!(frame.props.is_empty(), expected.props.is_empty());
    // Of several under one name the last one counts.
    let props: HashMap<&[u8], &Value> =
        expected.props.iter().filter_map(|(key, value)| Some((name(key)?, value))).collect();
    for (key, value) in props.into_iter().take(8) {
        let Ok(key) = std::str::from_utf8(key) else { continue };
        let number = match value {
            Value::F32(float) => whole(f64::from(*float)),
            Value::F64(float) => whole(*float),
            other => other.as_i64(),
        };
        let text = name(value).and_then(|bytes| std::str::from_utf8(bytes).ok());
        assert_eq!(frame.props.has(key), !value.is_nil(), "{key}");
        assert_eq!(frame.props.int(key), number, "{key}");
        assert_eq!(frame.props.str(key), text, "{key}");
    }
}

fn whole(float: f64) -> Option<i64> {
    (float.fract() == 0.0 && float.abs() < 9e15).then_some(float as i64)
}

fn check_form(frame: &Frame) {
    let written = frame.encode();
    let sid = frame.sid.as_ref().map_or("", SessionId::as_str);
    let fields = [frame.typ.is_empty(), sid.is_empty(), frame.props.is_empty()];
    let mut start = vec![if frame.body.is_empty() { 0x81 } else { 0x82 }];
    start.extend(b"\xa3hdr");
    start.push(0x81 + fields.iter().filter(|empty| !**empty).count() as u8);
    start.extend(b"\xa5proto\xcd");
    start.extend(frame.proto.to_be_bytes());
    assert!(written.starts_with(&start), "{written:x?}");
    assert!(written.ends_with(&frame.body));
    let mut buffer = vec![7; frame.head_room() + frame.body.len() + 300];
    let (place, ()) = frame.encode_with(&mut buffer, |body| {
        body[..frame.body.len()].copy_from_slice(&frame.body);
        (frame.body.len(), ())
    });
    assert_eq!(buffer[place], written);
    if let Ok(value) = rmpv::decode::read_value(&mut &written[..]) {
        let body = &value["body"];
        assert!(body.as_slice().map_or(body.is_nil() && frame.body.is_empty(), |bin| frame.body == bin));
    }
}
