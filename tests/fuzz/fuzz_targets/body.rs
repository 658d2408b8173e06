//! The bodies of messages, and what is read off properties. The first byte says which.

#![no_main]

use std::os::unix::ffi::OsStrExt;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use mender_connect::internals::forward::{ConnectionId, Target};
use mender_connect::internals::{Frame, SessionId, control, file, forward, shell};
use rmpv::Value;

fuzz_target!(|data: &[u8]| {
    let Some((kind, body)) = data.split_first() else { return };
    match kind % 6 {
        0 => drop(control::parse::<control::Open>(body)),
        1 => accept(body),
        2 => error(body),
        3 => request(body),
        4 => target(body),
        _ => properties(body),
    }
});

fn sid() -> SessionId {
    SessionId::new("s").expect("a name")
}

fn accept(body: &[u8]) {
    let Ok(accept) = control::parse::<control::Accept>(body) else { return };
    let protocols = accept.protocols.unwrap_or_default();
    let ours = control::parse::<control::Accept>(&control::accept(&sid(), &protocols).body);
    let expected = control::Accept { version: control::VERSION, protocols: Some(protocols) };
    assert_eq!(ours.expect("what was written is read"), expected);
}

fn error(body: &[u8]) {
    let Ok(error) = control::parse::<control::Error>(body) else { return };
    let (text, close) = (error.err.unwrap_or_default(), error.close.unwrap_or_default());
    let ours = control::error_about(&sid(), &Frame::new(1, "new", None), &text, close);
    let expected = control::Error { err: Some(text), close: Some(close) };
    assert_eq!(control::parse::<control::Error>(&ours.body).expect("what was written is read"), expected);
}

/// The last value under each of these keys, as an independent reader finds it; `None` if it finds none, the body has a
/// byte that msgpack never uses, or a key is no text: serde takes a number for a field's index.
fn independent<const N: usize>(body: &[u8], keys: [&str; N]) -> Option<[Value; N]> {
    let body = Some(body).filter(|body| !body.contains(&0xc1))?;
    let Ok(Value::Map(map)) = rmpv::decode::read_value(&mut &body[..]) else { return None };
    map.iter().all(|(name, _)| bytes(name).is_some()).then_some(())?;
    Some(keys.map(|key| {
        let same = |(name, _): &&(Value, Value)| bytes(name) == Some(key.as_bytes());
        map.iter().rfind(same).map_or(Value::Nil, |(_, value)| value.clone())
    }))
}

fn bytes(value: &Value) -> Option<&[u8]> {
    match value {
        Value::String(text) => Some(text.as_bytes()),
        Value::Binary(bytes) => Some(bytes),
        _ => None,
    }
}

fn request(body: &[u8]) {
    let read = file::Request::decode(body);
    if let Err(text) = &read {
        assert!(
            text.starts_with("malformed request parameters: ") || text.ends_with("path: cannot be blank.")
        );
    }
    let keys = ["path", "src_path", "size", "uid", "gid", "mode"];
    let (Some(values), Ok(request)) = (independent(body, keys), read) else { return };
    let [path, src_path, numbers @ ..] = values;
    assert_eq!(Some(request.path.as_os_str().as_bytes()), bytes(&path));
    assert_eq!(request.src_path.as_ref().map(|path| path.as_os_str().as_bytes()), bytes(&src_path));
    let narrow = [request.uid, request.gid, request.mode].map(|number| number.map(u64::from));
    assert_eq!([request.size, narrow[0], narrow[1], narrow[2]], numbers.map(|number| number.as_u64()));
}

fn target(body: &[u8]) {
    let read = Target::decode(body);
    let keys = ["remote_host", "remote_port", "protocol"];
    let (Some([host, port, protocol]), Ok(target)) = (independent(body, keys), read) else { return };
    assert_eq!(Some(target.host), bytes(&host).map(|bytes| String::from_utf8_lossy(bytes).into_owned()));
    assert_eq!(Some(target.port.into()), port.as_u64());
    assert!(target.port > 0);
    assert_eq!(Some(target.transport.name().as_bytes()), bytes(&protocol));
}

/// The body is the properties of a frame.
fn properties(body: &[u8]) {
    let message = [b"\x81\xa3hdr\x83\xa3typ\xa3new\xa5proto\x01\xa5props", body].concat();
    let Ok(frame) = Frame::decode(&Bytes::from(message)) else { return };
    let number = |key| frame.props.int(key);
    let size = shell::window_size(&frame);
    let wanted = (number("terminal_width").unwrap_or(0), number("terminal_height").unwrap_or(0));
    assert_eq!(size.is_some(), wanted.0 > 0 && wanted.1 > 0);
    assert!(size.is_none_or(|size| size == (wanted.0 as u16, wanted.1 as u16)));
    let offset = number("offset").and_then(|offset| u64::try_from(offset).ok());
    match file::offset(&frame) {
        None => assert!(!frame.props.has("offset")),
        Some(read) => assert_eq!(read.ok(), offset),
    }
    if let Some(offset) = offset {
        let ours = file::ack(&sid(), offset, frame.props.str("user_id"));
        assert_eq!(file::offset(&ours), Some(Ok(offset)));
        assert_eq!(ours.user(), frame.user());
    }
    if let Ok(id) = ConnectionId::of(&frame) {
        assert_eq!(ConnectionId::of(&forward::about(&sid(), forward::ACK, &id)), Ok(id));
    }
    // Refusals give the properties back, as far as Go can read them, and name the message.
    let refusal = file::error(&sid(), &frame, "text", None);
    let message = rmpv::decode::read_value(&mut &refusal.encode()[..]).expect("msgpack");
    let props = message["hdr"]["props"].as_map().cloned().unwrap_or_default();
    assert!(props.iter().all(|(name, value)| {
        name.as_str().is_some() && !(value.is_map() || value.is_array() || value.is_ext())
    }));
    for key in ["offset", "terminal_width", "terminal_height"] {
        assert!(number(key).is_none() || refusal.props.int(key) == number(key));
    }
    for key in ["user_id", "connection_id", "msgid"] {
        let text = frame.props.str(key);
        assert!(text.is_none() || refusal.props.str(key) == text);
    }
    let refusal = rmpv::decode::read_value(&mut &refusal.body[..]).expect("msgpack");
    assert_eq!(refusal["msgid"].as_str(), frame.props.str("msgid"));
}
