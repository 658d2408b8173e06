//! Every recorded frame of the reference peers is read, and what we would say in their place compared.

use super::*;
use bytes::Bytes;
use rmpv::Value;

struct Golden {
    name: String,
    from_device: bool,
    bytes: Bytes,
}

fn golden() -> Vec<Golden> {
    let text = include_str!("../../tests/golden/frames.jsonl");
    let frames: Vec<Golden> = text
        .lines()
        .map(|line| {
            let entry: serde_json::Value = serde_json::from_str(line).unwrap();
            let field = |key: &str| entry[key].as_str().unwrap().to_owned();
            let bytes = data_encoding::HEXLOWER.decode(field("hex").as_bytes()).unwrap();
            Golden {
                name: field("name"),
                from_device: field("direction") == "device->server",
                bytes: bytes.into(),
            }
        })
        .collect();
    assert_eq!(frames.len(), 90);
    frames
}

/// An independent reader's finding, with nil and empty taken for absent.
fn independent(bytes: &[u8]) -> (u64, String, String, Vec<(Value, Value)>, Vec<u8>) {
    let value = rmpv::decode::read_value(&mut &bytes[..]).unwrap();
    let get = |map: &Value, key: &str| {
        let map = map.as_map().unwrap();
        map.iter().find(|(k, _)| k.as_str() == Some(key)).map_or(Value::Nil, |(_, v)| v.clone())
    };
    let header = get(&value, "hdr");
    let body = match get(&value, "body") {
        Value::Binary(bytes) => bytes,
        Value::String(text) => text.into_bytes(),
        _ => Vec::new(),
    };
    (
        get(&header, "proto").as_u64().unwrap(),
        get(&header, "typ").as_str().unwrap_or_default().to_owned(),
        get(&header, "sid").as_str().unwrap_or_default().to_owned(),
        get(&header, "props").as_map().cloned().unwrap_or_default(),
        body,
    )
}

#[test]
fn every_frame_is_understood() {
    for Golden { name, bytes, .. } in golden() {
        let frame = Frame::decode(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
        let (proto, typ, sid, props, body) = independent(&bytes);
        assert_eq!(u64::from(frame.proto), proto, "{name}");
        assert_eq!(frame.typ, typ, "{name}");
        assert_eq!(frame.sid, SessionId::new(&sid), "{name}");
        assert_eq!(frame.body, body, "{name}");
        for (key, value) in props {
            let key = key.as_str().unwrap();
            match value {
                Value::Integer(n) => assert_eq!(frame.props.int(key), n.as_i64(), "{name}: {key}"),
                Value::String(s) => assert_eq!(frame.props.str(key), s.as_str(), "{name}: {key}"),
                other => panic!("{name}: {key} is {other}"),
            }
        }
    }
}

#[test]
fn every_frame_of_a_device_is_written_as_it_was() {
    let mut compared = 0;
    for Golden { name, bytes, .. } in golden().into_iter().filter(|g| g.from_device) {
        assert_eq!(Frame::decode(&bytes).unwrap().encode(), bytes, "{name}");
        compared += 1;
    }
    assert_eq!(compared, 40);
}

/// The frames this side makes itself, beside the recorded ones: the same bytes, except where `status`
/// takes eight bytes more than the reference agent gives it.
#[test]
fn our_own_frames_match_the_recorded_ones() {
    let recorded = golden();
    let by_name = |name: &str| recorded.iter().find(|g| g.name == name && g.from_device).unwrap();
    let sid = Frame::decode(&by_name("control/ping").bytes).unwrap().sid.unwrap();
    let cause = |name: &str| {
        let proto = if name == "control/error no handler" { 7 } else { CONTROL };
        let typ = match name {
            "control/error handshake rejected (close)" => "open",
            "control/error unknown type with msgid" => "bogus",
            _ => "",
        };
        let props = if typ == "bogus" { Map::new().with_str("msgid", "42") } else { Map::new() };
        Frame::new(proto, typ, Some(&sid)).with_props(props)
    };
    let about = |name: &str, text: &str, close| control::error_about(&sid, &cause(name), text, close);
    let ours = [
        ("control/ping", control::ping(&sid)),
        ("control/pong", control::pong(&sid)),
        ("control/accept", control::accept(&sid, &[1, 2, 3, 4])),
        ("control/error session timeout (close)", control::error(&sid, "session timeout", true)),
        (
            "control/error handshake rejected (close)",
            about("control/error handshake rejected (close)", "handshake rejected: require version 1", true),
        ),
        (
            "control/error unknown type with msgid",
            about(
                "control/error unknown type with msgid",
                "session: control type message not understood: 'bogus'",
                false,
            ),
        ),
        (
            "control/error no handler",
            about("control/error no handler", "no handler registered for protocol: 0x0007", false),
        ),
    ];
    let user = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee";
    let from_user = Map::new().with_str("user_id", user);
    let request = |typ: &str| Frame::new(FILE_TRANSFER, typ, Some(&sid)).with_props(from_user.clone());
    let info =
        |path: &str, size, mode, modified| file::file_info(&sid, path.as_ref(), size, (0, 0), mode, modified);
    let files = [
        (
            "filetransfer/file_info",
            info("/tmp/stack/work/golden.bin", 5000, 0o100_644, (1_700_000_000, 123_456_789)),
        ),
        (
            "filetransfer/file_info whole-second modtime",
            info("/tmp/stack/work/golden.bin", 5000, 0o100_644, (1_700_000_000, 0)),
        ),
        (
            "filetransfer/file_info directory (mode is Go os.FileMode: dir|sticky|0777)",
            info("/tmp", 4096, 0o041_777, (1_700_000_000, 1)),
        ),
        (
            "filetransfer/error stat",
            file::error(
                &sid,
                &request("stat"),
                "failed to get file info from path '/nonexistent': stat /nonexistent: no such file or directory",
                None,
            ),
        ),
        ("filetransfer/file_chunk EOF", file::chunk(&sid, 5000)),
        ("filetransfer/file_chunk first (4096 B)", file::chunk(&sid, 0).with_body(vec![b'A'; 4096])),
        ("filetransfer/ack put_file", file::ack(&sid, 0, None)),
        ("filetransfer/ack chunk", file::ack(&sid, 0, Some(user))),
        ("filetransfer/ack EOF", file::ack(&sid, 4, Some(user))),
        (
            "filetransfer/error unsupported type",
            file::error(
                &sid,
                &request("bogus"),
                "session: filetransfer message type 'bogus' not supported",
                None,
            ),
        ),
    ];
    let connection = {
        let opened = Frame::decode(&by_name("portforward/new response").bytes).unwrap();
        forward::ConnectionId::of(&opened).unwrap()
    };
    let about = |typ: &str| forward::about(&sid, typ, &connection);
    let refused = "dial tcp 127.0.0.1:1: connect: connection refused";
    let incomplete = "invalid port-forward message: missing connection_id, remote_port or protocol";
    let forwards = [
        ("portforward/new response", about("new")),
        ("portforward/ack", about("ack")),
        ("portforward/stop (remote closed)", about("stop")),
        ("portforward/error connection refused", forward::error(&sid, "new", refused)),
        ("portforward/error invalid new", forward::error(&sid, "new", incomplete)),
        ("portforward/error unknown connection", forward::error(&sid, "forward", "unknown connection")),
    ];
    for (name, frame) in ours.into_iter().chain(files).chain(forwards) {
        assert_eq!(Bytes::from(frame.encode()), by_name(name).bytes, "{name}");
    }
    let wide_status = [
        ("shell/new response ok", shell::started(&sid)),
        ("shell/new response error", shell::failure(&sid, shell::NEW, "user has too many open sessions")),
        ("shell/shell output", shell::output(&sid).with_body(&b"hello\r\n"[..])),
        ("shell/shell error (unknown session)", shell::failure(&sid, shell::DATA, "session not found")),
        ("shell/stop response ok", shell::stopped(&sid)),
        ("shell/ping", shell::ping(&sid)),
    ];
    for (name, frame) in wide_status {
        let recorded = &by_name(name).bytes;
        let bytes = frame.encode();
        assert_eq!(independent(&bytes), independent(recorded), "{name}");
        assert_eq!(bytes.len(), recorded.len() + 8, "{name}: status takes eight bytes more");
    }
}
