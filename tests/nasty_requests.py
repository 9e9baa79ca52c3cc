"""Requests that a server must refuse in JSON with a 4xx, and stay the same: for tests over a fake backend and a real server.

Each is (name, method, path, content, headers). The served model is called as given, has at most 10,000 token ids and takes at
most `MAX_BODY_BYTES` and `MAX_INPUTS`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

MAX_BODY_BYTES = 2_000_000
MAX_INPUTS = 200
JSON = {"content-type": "application/json"}

Request = tuple[str, str, str, bytes, dict[str, str]]


def nasty_requests(model: str) -> list[Request]:
    found = [*_bodies(model), *_routes()]
    names = [request[0] for request in found]
    assert len(set(names)) == len(names)
    assert len(found) >= 200
    return found


# Values no `input`, `inputs` or `ids` may have.
_NO_INPUT: dict[str, Any] = {
    "null": None,
    "true": True,
    "a number": 7,
    "a float": 1.5,
    "an object": {"text": "x"},
    "empty": "",
    "empty list": [],
    "empty text": ["x", ""],
    "text and id": ["x", 1],
    "id and list": [1, [2]],
    "no ids": [[]],
    "no ids among others": [[1], []],
    "negative id": [-1],
    "id out of range": [10**6],
    "huge id": [[2**80]],
    "float ids": [1.0, 2.5],
    "booleans": [False],
    "nulls": [None],
    "three levels": [[[1]]],
    "texts in lists": [["x"]],
    "objects": [{"a": 1}],
    "too many texts": ["x"] * (MAX_INPUTS + 1),
    "too many lists": [[1]] * (MAX_INPUTS + 1),
}
_DIMENSIONS: list[Any] = [0, -1, -(2**63), 10**30, 2**31, "8", 8.5, True, [8], {}]
_WORDS: list[Any] = ["nonsense", "", 3, True, [], {}, "FLOAT", "\ud800"]
# What is no JSON object in UTF-8 at all.
_RAW: dict[str, bytes] = {
    "nothing": b"",
    "a brace": b"{",
    "a list": b"[]",
    "null": b"null",
    "a string": b'"x"',
    "a number": b"1e999",
    "no utf-8": b"\xff\xfe",
    "latin-1": '{"input": "é", "inputs": "é"}'.encode("latin-1"),
    "utf-16": '{"input": "x"}'.encode("utf-16"),
    "utf-32": '{"input": "x"}'.encode("utf-32"),
    "byte order mark": b'\xef\xbb\xbf{"inputs": "x"}',
    "two objects": b"{}{}{}",
    "cut off": b'{"input": "x", "inputs": "x", "mod',
    "deep lists": b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "NaN": b'{"input": [NaN], "inputs": [NaN], "ids": [NaN]}',
    "infinity": b'{"input": [-Infinity], "inputs": [Infinity], "ids": [Infinity]}',
    "6000 digits": b'{"input": [' + b"9" * 6000 + b'], "inputs": [' + b"9" * 6000 + b'], "ids": [' + b"9" * 6000 + b"]}",
    "1e999": b'{"input": [1e999], "inputs": [1e999], "ids": [1e999]}',
    "single quotes": b"{'inputs': 'x'}",
    "a comment": b'{"inputs": "x" /* y */}',
    "a raw control character": b'{"inputs": "\x01"}',
    "a form": b"inputs=x&model=y",
    "too large": b'{"inputs": "' + b"y" * MAX_BODY_BYTES + b'"}',
    "ten megabytes": b'{"inputs": "' + b"z" * 10_000_000 + b'"}',
}


def _bodies(model: str) -> Iterator[Request]:
    def post(name: str, path: str, body: Any) -> Request:
        return f"{path}: {name}", "POST", path, json.dumps(body).encode(), JSON

    paths = ("/v1/embeddings", "/embed", "/embed_all", "/similarity", "/tokenize", "/decode")
    for path in paths:
        for name, raw in _RAW.items():
            yield f"{path}: {name}", "POST", path, raw, JSON
    fields = {"/v1/embeddings": "input", "/embed": "inputs", "/embed_all": "inputs", "/tokenize": "inputs", "/decode": "ids"}
    for path, field in fields.items():
        for name, value in _NO_INPUT.items():
            yield post(f"{field} {name}", path, {field: value, "model": model})
        yield post("no input", path, {"model": model})
        yield post("half a surrogate pair", path, {field: "\ud83d", "model": model})
        yield post("model gpt", path, {field: "x", "model": "gpt"})
        for position, name in enumerate([3, [], {}, True, "../../etc/passwd", "\udfff", "m" * 100_000, "%00", "\0"]):
            yield post(f"model {position}", path, {field: "x", "model": name})
    for path, field in (("/v1/embeddings", "input"), ("/embed", "inputs")):
        for position, value in enumerate(_DIMENSIONS):
            yield post(f"dimensions {position}", path, {field: "x", "model": model, "dimensions": value})
        for key in ("output_dtype", "truncate"):
            for position, value in enumerate(_WORDS if key == "output_dtype" else ["true", 1, 0, [], {}]):
                yield post(f"{key} {position}", path, {field: "x", "model": model, key: value})
    for key in ("encoding_format", "input_type"):
        for position, value in enumerate(_WORDS):
            yield post(f"{key} {position}", "/v1/embeddings", {"input": "x", "model": model, key: value})
    for position, extra in enumerate([{"user": 3}, {"x": 1}, {"\udfff": 1}, {"Input": "x"}, {"__proto__": {}}]):
        yield post(f"extra field {position}", "/v1/embeddings", {"input": "x", "model": model} | extra)
    yield post("model null", "/v1/embeddings", {"input": "x", "model": None})
    for path in ("/embed", "/embed_all"):
        for key in ("prompt_name", "truncation_direction"):
            for position, value in enumerate(_WORDS):
                yield post(f"{key} {position}", path, {"inputs": "x", key: value})
    sentences: list[Any] = [None, 3, "x", [], {}, {"source_sentence": "x"}, {"sentences": ["x"]}]
    sentences += [{"source_sentence": s, "sentences": ["x"]} for s in ("", None, 3, ["x"], "\ud800")]
    sentences += [{"source_sentence": "x", "sentences": s} for s in ([], "x", None, [""], [3], [["x"]], ["x"] * 201, {"x": 1})]
    for position, value in enumerate(sentences):
        yield post(f"sentences {position}", "/similarity", {"inputs": value})
    for position, value in enumerate([3, "x", [], {"prompt_name": "x"}, {"truncate": "x"}]):
        yield post(
            f"parameters {position}",
            "/similarity",
            {"inputs": {"source_sentence": "x", "sentences": ["y"]}, "parameters": value},
        )
    yield post("special tokens", "/tokenize", {"inputs": "x", "add_special_tokens": "yes"})
    yield post("special tokens", "/decode", {"ids": [1], "skip_special_tokens": 1})


def _routes() -> Iterator[Request]:
    good = b'{"inputs": "x"}'
    others = [("GET", "/v1/embeddings"), ("PUT", "/embed"), ("POST", "/health"), ("GET", "/nope"), ("POST", "/v1/embeddings/")]
    others += [("GET", "/v1/models/other"), ("GET", "/%ff/../etc"), ("GET", "/v1/models/%2e%2e%2fetc"), ("DELETE", "/info")]
    others += [("PATCH", "/metrics"), ("POST", "/openapi.json"), ("GET", "/embed"), ("GET", "/decode"), ("POST", "/load")]
    for method, path in others:
        yield f"{method} {path}", method, path, b"", JSON
    odd = {"type": {"content-type": "text/plain"}, "form": {"content-type": "multipart/form-data; boundary=x"}}
    odd |= {"gzip": JSON | {"content-encoding": "gzip"}, "br": JSON | {"content-encoding": "br"}}
    odd |= {f"timeout {value}": JSON | {"x-timeout-ms": value} for value in ("0", "-1", "1e3", "soon", "9" * 40, "0x10")}
    for name, headers in odd.items():
        yield f"header {name}", "POST", "/embed", good, headers
