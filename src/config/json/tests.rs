use super::*;

#[derive(Debug, Default, Clone, PartialEq)]
struct Inner {
    small: u16,
    medium: u32,
    large: u64,
    signed: i64,
    deep: Deep,
}

#[derive(Debug, Default, Clone, PartialEq)]
struct Deep {
    text: String,
}

#[derive(Debug, Default, Clone, PartialEq)]
struct Outer {
    name: String,
    flag: bool,
    list: Vec<String>,
    maybe: Option<Vec<String>>,
    objects: Vec<Deep>,
    inner: Inner,
}

keys!(Outer {
    "Name" => name,
    "Flag" => flag,
    "List" => list,
    "Maybe" => maybe,
    "Objects" => objects,
    "Inner" => inner,
});

keys!(Inner {
    "Small" => small,
    "Medium" => medium,
    "Large" => large,
    "Signed" => signed,
    "Deep" => deep,
});

keys!(Deep { "Text" => text });

fn walk(text: &str) -> Walk {
    merge(text.as_bytes(), &mut Outer::default()).unwrap()
}

fn over(mut target: Outer, text: &str) -> Outer {
    let walk = merge(text.as_bytes(), &mut target).unwrap();
    assert!(walk.errors.is_empty(), "{walk:?}");
    target
}

fn read(text: &str) -> Outer {
    over(Outer::default(), text)
}

fn unknown(text: &str) -> Vec<String> {
    walk(text).unknown
}

/// The first.
fn error(text: &str) -> String {
    match merge(text.as_bytes(), &mut Outer::default()) {
        Ok(walk) => walk.errors[0].1.to_string(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn keys_match_in_any_case() {
    assert_eq!(read(r#"{"NAME": "a"}"#).name, "a");
    assert_eq!(read(r#"{"name": "a"}"#).name, "a");
    assert_eq!(read(r#"{"iNNer": {"dEEp": {"TEXT": "a"}}}"#).inner.deep.text, "a");
    assert_eq!(read("{\"li\u{17f}t\": [\"a\"]}").list, ["a"], "Go folds the long s");
    assert_eq!(unknown("{\"n\u{e0}me\": 1}"), ["n\u{e0}me"]);
}

#[test]
fn of_duplicate_keys_the_last_wins_whatever_its_case() {
    assert_eq!(read(r#"{"Name": "a", "name": "b", "NAME": "c"}"#).name, "c");
    assert_eq!(read(r#"{"name": "c", "Name": "a"}"#).name, "a");
    assert_eq!(read(r#"{"name": "a", "name": null}"#).name, "a");
    let merged = read(r#"{"inner": {"small": 1, "medium": 2}, "Inner": {"small": 3}}"#);
    assert_eq!((merged.inner.small, merged.inner.medium), (3, 2));
}

#[test]
fn objects_merge_and_arrays_are_replaced() {
    let first = read(r#"{"list": ["a", "b"], "inner": {"small": 1, "deep": {"text": "x"}}}"#);
    let second = over(first, r#"{"list": ["c"], "inner": {"medium": 2}}"#);
    assert_eq!(second.list, ["c"]);
    assert_eq!((second.inner.small, second.inner.medium), (1, 2));
    assert_eq!(second.inner.deep.text, "x");
    assert!(over(second, r#"{"list": []}"#).list.is_empty());
}

#[test]
fn null_leaves_values_and_empties_arrays() {
    let before = Outer {
        name: "a".into(),
        flag: true,
        list: vec!["x".into()],
        maybe: Some(vec!["y".into()]),
        objects: Vec::new(),
        inner: Inner { small: 7, ..Inner::default() },
    };
    let text = r#"{"name": null, "flag": null, "list": null, "maybe": null, "inner": null}"#;
    let after = over(before.clone(), text);
    assert_eq!(after, Outer { list: Vec::new(), maybe: None, ..before.clone() });
    assert_eq!(over(before.clone(), r#"{"inner": {"small": null, "deep": null}}"#), before);
    assert_eq!(over(before.clone(), "null"), before);
    assert_eq!(read(r#"{"list": ["a", null]}"#).list, ["a", ""]);
}

#[test]
fn an_optional_array_tells_absent_from_empty() {
    assert_eq!(read("{}").maybe, None);
    assert_eq!(read(r#"{"maybe": []}"#).maybe, Some(vec![]));
    assert_eq!(read(r#"{"maybe": [""]}"#).maybe, Some(vec![String::new()]));
    let both = over(read(r#"{"maybe": ["a", "b"]}"#), r#"{"maybe": ["c"]}"#);
    assert_eq!(both.maybe, Some(vec!["c".to_owned()]));
}

#[test]
fn unknown_keys_are_named_once_with_their_path() {
    let text = r#"{"A": 1, "inner": {"deep": {"B": {"C": 1}}}, "A": 2, "objects": [{"D": [1e3]}, {"D": 0}]}"#;
    assert_eq!(unknown(text), ["A", "inner.deep.B", "objects[0].D", "objects[1].D"]);
    assert!(unknown("{}").is_empty());
}

#[test]
fn integers_at_the_edges_fit() {
    let text = r#"{"inner": {"small": 65535, "medium": 4294967295, "large": 18446744073709551615,
        "signed": -9223372036854775808}}"#;
    let inner = read(text).inner;
    assert_eq!(inner.small, u16::MAX);
    assert_eq!(inner.medium, u32::MAX);
    assert_eq!(inner.large, u64::MAX);
    assert_eq!(inner.signed, i64::MIN);
}

#[test]
fn integers_beyond_the_edges_are_type_errors() {
    for (field, number, top) in [
        ("small", "65536", "0 to 65535"),
        ("small", "-1", "0 to 65535"),
        ("medium", "4294967296", "0 to 4294967295"),
        ("large", "-1", "0 to 18446744073709551615"),
        ("signed", "9223372036854775808", "-9223372036854775808 to 9223372036854775807"),
    ] {
        let expected = format!(
            "Error parsing config file: inner.{field}: expected an integer from {top}, found {number}"
        );
        assert_eq!(error(&format!(r#"{{"inner": {{"{field}": {number}}}}}"#)), expected);
    }
    let error = error(r#"{"inner": {"large": 18446744073709551616}}"#);
    assert!(error.starts_with("Error parsing config file: inner.large: "), "{error}");
}

#[test]
fn numbers_with_fraction_or_exponent_are_not_integers() {
    for (number, found) in [("1.5", "1.5"), ("1.0", "1.0"), ("1e3", "1000.0"), ("-0.0", "-0.0")] {
        let error = error(&format!(r#"{{"inner": {{"small": {number}}}}}"#));
        assert!(error.ends_with(&format!("found {found}")), "{error}");
    }
}

#[test]
fn wrong_types_are_named_with_their_path() {
    for (text, message) in [
        (r#"{"Name": 1}"#, "Name: expected a string, found 1"),
        (r#"{"name": ["a"]}"#, "name: expected a string, found an array"),
        (r#"{"flag": "true"}"#, "flag: expected a boolean, found a string"),
        (r#"{"flag": 1}"#, "flag: expected a boolean, found 1"),
        (r#"{"list": "a"}"#, "list: expected an array, found a string"),
        (r#"{"list": {}}"#, "list: expected an array, found an object"),
        (r#"{"list": ["a", false]}"#, "list[1]: expected a string, found a boolean"),
        (r#"{"maybe": "a"}"#, "maybe: expected an array, found a string"),
        (r#"{"inner": []}"#, "inner: expected an object, found an array"),
        (r#"{"objects": [{}, {"Text": 1}]}"#, "objects[1].Text: expected a string, found 1"),
        (r#"{"inner": {"Small": "1"}}"#, "inner.Small: expected an integer from 0 to 65535, found a string"),
        ("[]", "top level: expected an object, found an array"),
        ("\"a\"", "top level: expected an object, found a string"),
    ] {
        assert_eq!(error(text), format!("Error parsing config file: {message}"));
    }
}

#[test]
fn every_type_error_is_told_in_its_order_and_the_rest_is_taken() {
    let mut target = Outer { list: vec!["before".into()], ..Outer::default() };
    let text = r#"{"flag": 1, "list": ["a", 2, 3], "maybe": {}, "inner": {"small": 9, "MEDIUM": "x"}, "name": "a",
        "objects": [{"text": true}]}"#;
    let walk = merge(text.as_bytes(), &mut target).unwrap();
    let keys: Vec<_> = walk.errors.iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(keys, ["Flag", "List", "List", "Maybe", "Inner.Medium", "Objects.Text"]);
    let texts: Vec<_> = walk.errors.iter().map(|(_, error)| error.to_string()).collect();
    let of = |n: usize, path: &str| assert!(texts[n].contains(&format!(": {path}: expected")), "{texts:?}");
    of(0, "flag");
    of(2, "list[2]");
    of(4, "inner.MEDIUM");
    of(5, "objects[0].text");
    let inner = Inner { small: 9, ..Inner::default() };
    assert_eq!(target, Outer { name: "a".into(), list: vec!["before".into()], inner, ..Outer::default() });
    assert_eq!(walk.given, ["Inner.Small", "Name"]);
}

#[test]
fn what_was_given_is_told_in_our_spelling() {
    let text = r#"{"NAME": "a", "flag": null, "maybe": null, "objects": [{"text": "x"}], "name": "b", "x": 1,
        "inner": {"deep": {"tEXT": ""}}}"#;
    assert_eq!(walk(text).given, ["Name", "Maybe", "Objects", "Name", "Inner.Deep.Text"]);
}

#[test]
fn values_are_listed_by_their_whole_keys() {
    let target = read(r#"{"list": ["a", "b"], "inner": {"signed": -1}}"#);
    let mut values = Vec::new();
    target.list("", &mut values);
    let lines: Vec<_> = values.iter().map(|(key, value)| format!("{key} {value}")).collect();
    let expected = [
        "Name \"\"",
        "Flag false",
        "List [\"a\",\"b\"]",
        "Maybe null",
        "Objects []",
        "Inner.Small 0",
        "Inner.Medium 0",
        "Inner.Large 0",
        "Inner.Signed -1",
        "Inner.Deep.Text \"\"",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn syntax_errors_have_their_own_text_and_come_first() {
    let deep = "[".repeat(100_000);
    for text in [
        "",
        " \n",
        "{",
        "{}{}",
        "{} x",
        r#"{"name": "a",}"#,
        r#"{name: "a"}"#,
        "{'name': 'a'}",
        "{\"name\": \"a\nb\"}",
        r#"{"name": "\x"}"#,
        r#"{"inner": {"small": 01}}"#,
        "// comment\n{}",
        "\u{feff}{}",
        r#"{"flag": 1"#,
        r#"{"name": NaN}"#,
        &deep,
    ] {
        let error = error(text);
        assert!(error.starts_with("Error parsing mender configuration file: "), "{text:.20}: {error}");
    }
}

#[test]
fn invalid_utf8_becomes_one_replacement_character_per_byte() {
    let mut target = Outer::default();
    merge(b"{\"name\": \"a\xe2\x82b\xff\xc3\xa9\"}", &mut target).unwrap();
    assert_eq!(target.name, "a\u{fffd}\u{fffd}b\u{fffd}\u{e9}");
    let outside = merge(b"{\xff}", &mut target).unwrap_err();
    assert!(matches!(outside, JsonError::Syntax(_)));
}

#[test]
fn escapes_are_undone() {
    assert_eq!(read(r#"{"name": "\u00e9\ud83d\ude00\"\\\/\t"}"#).name, "\u{e9}\u{1f600}\"\\/\t");
}
