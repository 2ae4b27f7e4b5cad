use std::fmt::Write;

use proptest::prelude::*;

use super::*;
use crate::ingest::LineReport;

const LIMITS: Limits = Limits { max_lines: 1_000_000, max_bytes: 1 << 30, max_line_bytes: 400 };

fn check<'a>(limits: Limits, chunks: impl IntoIterator<Item = &'a [u8]>) -> Result<Validated, IngestError> {
    let mut validator = Validator::new(limits, "/nowhere".into());
    for chunk in chunks {
        validator.push(chunk)?;
    }
    validator.finish()
}

fn check_all(file: &str) -> Result<Validated, IngestError> {
    check(LIMITS, [file.as_bytes()])
}

fn line(id: &str, url: &str, model: &str) -> String {
    format!(r#"{{"custom_id":"{id}","method":"POST","url":"/v1/{url}","body":{{"model":"{model}"}}}}"#)
}

fn bad_lines(file: &str) -> Vec<LineReport> {
    match check_all(file) {
        Err(IngestError::Invalid { errors, total }) => {
            assert_eq!(errors.len() as u64, total);
            errors
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_bom_crlf_blank_lines_and_no_final_newline_are_fine() {
    let (a, b, c) = (line("a", "score", "m"), line("b", "score", "n"), line("c", "score", "m"));
    let file = format!("\u{feff}\r\n{a}\r\n \t\n\n{b}\n{c}");
    let found = check_all(&file).unwrap();
    assert_eq!((found.requests, found.bytes), (3, file.len() as u64));
    assert_eq!(found.models, ["m", "n"]);
    assert_eq!(found.endpoint, Endpoint::Score);
    let [segment] = found.segments[..] else { panic!() };
    assert_eq!((segment.first_line, segment.line_span, segment.requests, segment.models), (2, 5, 3, 3));
    assert_eq!(&file[segment.offset as usize..][..segment.length as usize], &file[5..]);
}

#[test]
fn a_bom_is_in_no_segment() {
    let file = format!("\u{feff}{}\n", line("a", "score", "m"));
    let found = check_all(&file).unwrap();
    assert_eq!((found.segments[0].offset, found.segments[0].first_line), (3, 1));
    // Elsewhere it is no JSON.
    let errors = bad_lines(&format!("{}\n\u{feff}{}", line("a", "score", "m"), line("b", "score", "m")));
    assert_eq!(errors[0].line, 2);
}

#[test]
fn bad_lines_are_named_by_number_and_id() {
    let mut file = format!("\n{}\n", line("a", "score", "m"));
    file += "nonsense\r\n";
    writeln!(file, "{}", line("b", "rerank", "m")).unwrap();
    writeln!(file, "{}", line("c", "score", "m").replace("POST", "GET")).unwrap();
    writeln!(file, "\r\n{}", line("a", "score", "m")).unwrap();
    writeln!(file, "{}", line("d", "score", &"m".repeat(400))).unwrap();
    writeln!(file, "{}", line("\\u0061", "score", "m")).unwrap();
    let errors = bad_lines(&file);
    let found: Vec<_> = errors.iter().map(|e| (e.line, e.custom_id.as_deref(), e.message.as_str())).collect();
    assert_eq!(
        found[1..],
        [
            (4, Some("b"), "url is /v1/rerank; expected /v1/score as in line 2: one file, one url"),
            (5, Some("c"), "method is \"GET\"; expected \"POST\""),
            (7, Some("a"), "custom_id is already in line 2; expected it to be unique in the file"),
            (8, None, "the line is longer than the limit of 400 bytes"),
            (9, Some("a"), "custom_id is already in line 2; expected it to be unique in the file"),
        ]
    );
    assert_eq!((found[0].0, found[0].1), (3, None));
    assert!(found[0].2.starts_with("not valid JSON"), "{}", found[0].2);
}

#[test]
fn the_lowest_hundred_are_reported_and_all_are_counted() {
    // The duplicates, found last, are in lower lines than the bad ones.
    let mut file = String::new();
    for n in 0..60 {
        writeln!(file, "{}", line(&format!("{}", n / 2), "score", "m")).unwrap();
    }
    file += &"{}\n".repeat(500);
    let Err(IngestError::Invalid { errors, total }) = check_all(&file) else { panic!() };
    assert_eq!((errors.len(), total), (100, 530));
    assert_eq!(
        errors.iter().map(|error| error.line).collect::<Vec<_>>(),
        (1..=30).map(|n| n * 2).chain(61..=130).collect::<Vec<_>>()
    );
}

#[test]
fn models_are_limited() {
    let file = |models: usize| {
        (0..models).fold(String::new(), |file, n| file + &line(&n.to_string(), "score", &format!("m{n}")) + "\n")
    };
    let found = check_all(&file(32)).unwrap();
    assert_eq!((found.models.len(), found.segments[0].models), (32, (1 << 32) - 1));
    let errors = bad_lines(&file(33));
    assert_eq!((errors[0].line, errors[0].custom_id.as_deref()), (33, Some("32")));
    assert_eq!(errors[0].message, "one model too many: \"m32\"; a file may name at most 32");
}

#[test]
fn limits_end_the_upload_at_once() {
    let two = format!("{}\n\n{}\n\n", line("a", "score", "m"), line("b", "score", "m"));
    let at_most = |max_lines, max_bytes| Limits { max_lines, max_bytes, ..LIMITS };
    assert!(check(at_most(2, two.len() as u64), [two.as_bytes()]).is_ok());
    let mut validator = Validator::new(at_most(1, 10_000), "/nowhere".into());
    assert!(matches!(validator.push(two.as_bytes()), Err(IngestError::TooManyLines { max: 1 })));
    let mut validator = Validator::new(at_most(9, two.len() as u64 - 1), "/nowhere".into());
    assert!(matches!(validator.push(two.as_bytes()), Err(IngestError::TooManyBytes { .. })));
}

#[test]
fn a_file_without_a_request_is_refused() {
    for empty in ["", "\n", "\u{feff}", " \r\n\n\t"] {
        assert!(matches!(check_all(empty), Err(IngestError::Empty)), "{empty:?}");
    }
}

/// A line of a file: good, blank or bad in some way, with its own end.
fn any_line() -> impl Strategy<Value = String> {
    let text = prop_oneof![
        8 => ("[a-e]{1,3}", "[m-q]", any::<bool>()).prop_map(|(id, model, pad)| {
            let url = if pad { "score\"  ,  \"x\":\"y" } else { "score" };
            line(&id, url, &model)
        }),
        1 => Just(line("z", "rerank", "m")),
        1 => "[ \t]{0,3}",
        1 => "[{}\",a-z]{0,9}",
        1 => Just("x".repeat(401)),
    ];
    (text, prop_oneof![Just("\n"), Just("\r\n")]).prop_map(|(text, end)| text + end)
}

/// The whole of an outcome, to compare.
fn outcome(result: &Result<Validated, IngestError>) -> String {
    format!("{result:?}")
}

proptest! {
    #[test]
    fn chunks_do_not_matter(
        bom in any::<bool>(),
        lines in proptest::collection::vec(any_line(), 0..30),
        cut in 0usize..3,
        sizes in proptest::collection::vec(0usize..90, 1..60),
    ) {
        let mut file = format!("{}{}", if bom { "\u{feff}" } else { "" }, lines.concat()).into_bytes();
        file.truncate(file.len().saturating_sub(cut));
        let whole = check(LIMITS, [&file[..]]);
        let (mut chunks, mut rest) = (Vec::new(), &file[..]);
        for size in sizes {
            let (chunk, more) = rest.split_at(size.min(rest.len()));
            chunks.push(chunk);
            rest = more;
        }
        chunks.push(rest);
        prop_assert_eq!(outcome(&check(LIMITS, chunks)), outcome(&whole));
        prop_assert_eq!(outcome(&check(LIMITS, file.chunks(1))), outcome(&whole));
    }

}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Every line that holds a request is in exactly one segment, at its place, with its model.
    #[test]
    fn segments_hold_every_request_once(
        bom in any::<bool>(),
        blanks in proptest::collection::vec(prop_oneof![3 => Just(0usize), 1 => 0usize..4, 1 => Just(40_000)], 1..8),
        requests in 1usize..2_500,
        padding in prop_oneof![Just(0usize), Just(300), Just(20_000)],
        final_newline in any::<bool>(),
    ) {
        let limits = Limits { max_line_bytes: 1 << 20, ..LIMITS };
        let mut file = if bom { "\u{feff}".to_owned() } else { String::new() };
        let mut expected = Vec::new();
        let mut number = 0;
        let every = 97;
        for n in 0..requests {
            if n % every == 0 {
                let blank = blanks[n / every % blanks.len()];
                file += &"\n".repeat(blank);
                number += blank as i64;
            }
            number += 1;
            let model = format!("m{}", n * n / 50 % 32);
            file += &format!("{}{}\n", line(&n.to_string(), "score", &model), " ".repeat(if n % 3 == 0 { padding } else { 0 }));
            expected.push((number, n.to_string(), model));
        }
        if !final_newline {
            file.pop();
        }
        let found = check(limits, [file.as_bytes()]).unwrap();
        let (mut read, mut end) = (Vec::new(), 0);
        for (at, segment) in found.segments.iter().enumerate() {
            prop_assert_eq!(segment.index.0 as usize, at);
            prop_assert!(segment.offset >= end);
            prop_assert!(segment.requests <= 1_000 && segment.line_span <= 65_536);
            prop_assert!(segment.length <= 4 << 20 || segment.requests == 1);
            end = segment.offset + segment.length;
            let bytes = &file.as_bytes()[segment.offset as usize..end as usize];
            let mut mask = 0;
            let before = read.len();
            for (place, line) in request_line::lines(bytes) {
                prop_assert!(place < segment.line_span as u32);
                let request = request_line::parse(line).unwrap();
                mask |= 1 << found.models.iter().position(|model| *model == request.model).unwrap();
                read.push((segment.first_line + i64::from(place), request.custom_id.into_owned(), request.model.into_owned()));
            }
            prop_assert_eq!(read.len() - before, segment.requests as usize);
            prop_assert_eq!(read[before].0, segment.first_line);
            prop_assert_eq!(read.last().unwrap().0, segment.first_line + i64::from(segment.line_span) - 1);
            prop_assert_eq!(segment.models, mask);
        }
        prop_assert_eq!(read, expected);
        prop_assert_eq!(found.requests as usize, requests);
    }
}
