"""`nanogpt serve` in a process of its own, with the OpenAI client and with clients that misbehave."""

import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest
from serving import CHARS, Served, write_run

from nanogpt.serve.app import curve
from nanogpt.text.tokenizer import UNKNOWN, ByteTokenizer, CharTokenizer

CHARS_BY_ID = CharTokenizer.train(CHARS).chars
FOREVER = 10**6  # tokens: more than are written while a test looks


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run in out-tiny/."""
    place = tmp_path_factory.mktemp("served")
    write_run(place / "out-tiny")
    return place


@pytest.fixture(scope="module")
def server(place):
    """A server with 8 places, for all tests of this file."""
    served = Served(
        place,
        "--out_dir=out-tiny",
        "--max_batch=8",
        "--max_requests=12",
        "--max_prompt=1000",
        "--max_body=4096",
        f"--max_tokens={FOREVER}",
    )
    yield served
    served.close()


@pytest.fixture
def another(place):
    """another("--max_seconds=1") starts a server for a single test."""
    started = []

    def another(*args, **kwargs):
        started.append(
            Served(place, "--out_dir=out-tiny", *args, name=f"log-{len(started)}-{time.monotonic_ns()}", **kwargs)
        )
        return started[-1]

    yield another
    for served in started:
        served.close()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="unused", max_retries=0) as client:
        yield client


def ask(client, **options):
    return client.completions.create(**dict(model="out-tiny", prompt="abc", max_tokens=30, temperature=0) | options)


# The OpenAI client


def test_the_openai_client_lists_the_model(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("out-tiny", "model", "nanogpt")
    assert client.models.retrieve("out-tiny").id == "out-tiny"


def test_the_openai_client_completes(client):
    found = ask(client)
    (choice,) = found.choices
    assert len(choice.text) == 30 and set(choice.text) <= set(CHARS)
    assert (choice.finish_reason, choice.index, choice.logprobs, found.model) == ("length", 0, None, "out-tiny")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (3, 30, 33)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}, {"n": 3, "temperature": 1.0, "seed": 5}])
def test_a_stream_has_the_same_text_as_a_whole_response(client, options):
    whole = ask(client, **options)
    texts, reasons, usages = [""] * len(whole.choices), {}, []
    for part in ask(client, stream=True, stream_options={"include_usage": True}, **options):
        usages += [part.usage] if part.usage else []
        for choice in part.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == dict.fromkeys(range(len(texts)), "length")
    assert [u.model_dump() for u in usages] == [whole.usage.model_dump()]


def test_a_seed_repeats_a_text_and_choices_differ(client):
    three = [c.text for c in ask(client, temperature=1, seed=7, n=3).choices]
    assert len(set(three)) == 3
    assert three[1] == ask(client, temperature=1, seed=8).choices[0].text
    assert ask(client, temperature=1).choices[0].text != ask(client, temperature=1).choices[0].text


def test_several_prompts_are_answered_in_order(client):
    found = ask(client, prompt=["abc", [1, 2, 3]], n=2)
    assert [c.index for c in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text == found.choices[1].text == ask(client).choices[0].text
    assert found.choices[2].text == ask(client, prompt=[1, 2, 3]).choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_twenty_prompts_wait_for_places(client, stream):
    prompts = ["abcdefghij"[i % 10 :] for i in range(20)]
    found, texts = ask(client, prompt=prompts, stream=stream), [""] * 20
    for choice in [c for part in (found if stream else [found]) for c in part.choices]:
        texts[choice.index] += choice.text
    assert texts[:3] == [ask(client, prompt=prompt).choices[0].text for prompt in prompts[:3]]
    assert texts[10:] == texts[:10] and all(len(text) == 30 for text in texts)


def test_extra_fields_of_common_clients_are_accepted(client):
    extra = dict(
        repetition_penalty=1.0, ignore_eos=False, stop_token_ids=[], metadata={}, store=False, service_tier="auto"
    )
    assert ask(client, extra_body=extra).choices[0].text == ask(client).choices[0].text
    assert len(ask(client, max_tokens=None, extra_body=dict(max_completion_tokens=7)).choices[0].text) == 7
    with pytest.raises(openai.BadRequestError, match="ignore_eos: is not supported, except with false"):
        ask(client, extra_body=dict(ignore_eos=True))


def test_extensions_of_the_api_reach_the_model(client):
    greedy = ask(client).choices[0].text
    assert ask(client, temperature=1, extra_body={"top_k": 1}).choices[0].text == greedy
    assert ask(client, temperature=1, extra_body={"min_p": 1.0}).choices[0].text == greedy
    assert ask(client, temperature=1, top_p=0.0).choices[0].text == greedy


def test_each_prompt_draws_from_seeds_of_its_own(client):
    found = ask(client, prompt=["abc", "abc"], n=2, temperature=1, seed=7).choices
    assert [c.text for c in found] == [ask(client, temperature=1, seed=7 + i).choices[0].text for i in range(4)]


def test_logprobs_name_each_token_and_its_alternatives(client):
    choice = ask(client, logprobs=4).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text and found.text_offset == list(range(30))
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 4 and max(top.values()) == top[token] == logprob <= 0  # greedy
    parts = [c.logprobs for part in ask(client, logprobs=4, stream=True) for c in part.choices if c.logprobs]
    assert [t for p in parts for t in p.tokens] == found.tokens
    assert [o for p in parts for o in p.text_offset] == found.text_offset


def test_a_stop_string_is_cut_off_across_tokens(client):
    text = ask(client, temperature=1, seed=3).choices[0].text
    stop = text[10:13]
    for stream in (False, True):
        found = ask(client, temperature=1, seed=3, stop=["nowhere", stop], stream=stream)
        parts = list(found) if stream else [found]
        choices = [c for part in parts for c in part.choices]
        assert "".join(c.text for c in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_echo_puts_the_prompt_before_the_text(client):
    text = ask(client).choices[0].text
    assert ask(client, echo=True).choices[0].text == "abc" + text
    assert "".join(c.text for part in ask(client, echo=True, stream=True) for c in part.choices) == "abc" + text


def test_the_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'; this server has 'out-tiny'"):
        ask(client, model="gpt-4")
    with pytest.raises(
        openai.BadRequestError, match=r"max_tokens: should be less than or equal to 1000000, not 1000001"
    ) as caught:
        ask(client, max_tokens=FOREVER + 1)
    assert caught.value.param == "max_tokens"


def test_a_path_is_not_a_model(client):
    for path in ("../out-tiny", "/etc/passwd", "out-tiny/checkpoints"):
        with pytest.raises(openai.NotFoundError):
            ask(client, model=path)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(path)


def test_echo_with_logprobs_scores_the_prompt(client):
    text = "abc" + ask(client).choices[0].text[:10]
    whole = ask(client, prompt=text, max_tokens=0, echo=True, logprobs=2)
    (choice,) = whole.choices
    assert (choice.text, choice.finish_reason, whole.usage.completion_tokens) == (text, "length", 0)
    found = choice.logprobs
    assert "".join(found.tokens) == text and found.text_offset == list(range(13))
    assert found.token_logprobs[0] is found.top_logprobs[0] is None
    written = ask(client, max_tokens=10, logprobs=2).choices[0].logprobs
    assert found.token_logprobs[3:] == pytest.approx(written.token_logprobs, abs=1e-4)
    assert [set(top) for top in found.top_logprobs[3:]] == [set(top) for top in written.top_logprobs]
    both = ask(client, max_tokens=10, logprobs=2, echo=True, n=2).choices
    for other in both:
        assert other.text == text and other.logprobs.token_logprobs[1:] == pytest.approx(
            found.token_logprobs[1:], abs=1e-4
        )
    parts = [c for p in ask(client, max_tokens=10, logprobs=2, echo=True, stream=True) for c in p.choices if c.logprobs]
    assert [o for part in parts for o in part.logprobs.text_offset] == list(range(13))


def test_many_prompts_of_ids_are_scored_in_one_request(client):
    prompts = [[1 + i, 2, 3 + i] for i in range(20)]
    found = ask(client, prompt=prompts, max_tokens=1, echo=True, logprobs=1).choices
    for prompt, choice in zip(prompts[:3], found, strict=False):
        (alone,) = ask(client, prompt=prompt, max_tokens=0, echo=True, logprobs=1).choices
        assert choice.logprobs.token_logprobs[1:-1] == pytest.approx(alone.logprobs.token_logprobs[1:], abs=1e-4)
    assert len(found) == 20 and all(len(choice.logprobs.tokens) == 4 for choice in found)


def test_a_prompt_to_score_must_fit_the_context(client):
    with pytest.raises(
        openai.BadRequestError, match="prompt: has 17 tokens; with echo and logprobs, the limit is the 16 "
    ):
        ask(client, prompt="a" * 17, max_tokens=0, echo=True, logprobs=1)


def test_no_new_tokens_are_none(client):
    assert ask(client, max_tokens=0).choices[0].text == ""
    assert ask(client, max_tokens=0, echo=True).choices[0].text == "abc"
    (*_, last) = ask(client, max_tokens=0, stream=True)
    assert (last.choices[0].text, last.choices[0].finish_reason) == ("", "length")


def test_best_of_returns_the_most_probable_texts(client):
    asked = dict(temperature=1.0, seed=7, max_tokens=5, logprobs=0)
    eight = ask(client, n=8, **asked).choices
    mean = {choice.text: sum(choice.logprobs.token_logprobs) / 5 for choice in eight}
    found = ask(client, n=2, best_of=8, **asked)
    assert [choice.text for choice in found.choices] == sorted(mean, key=mean.get, reverse=True)[:2]
    assert [choice.index for choice in found.choices] == [0, 1] and found.usage.completion_tokens == 40
    two = ask(client, prompt=["abc", "b"], best_of=4, temperature=1.0, seed=7, max_tokens=5).choices
    assert [choice.index for choice in two] == [0, 1] and two[0].logprobs is None
    assert two[0].text == ask(client, best_of=4, temperature=1.0, seed=7, max_tokens=5).choices[0].text


def test_penalties_and_biases_reach_the_model(client):
    plain = ask(client).choices[0].text
    assert ask(client, logit_bias={"5": 100}).choices[0].text == CHARS_BY_ID[5] * 30
    assert ask(client, logit_bias={str(CHARS_BY_ID.index(plain[0])): -100}).choices[0].text[0] != plain[0]
    for penalty in (
        dict(frequency_penalty=2.0),
        dict(presence_penalty=2.0),
        dict(extra_body=dict(repetition_penalty=9.0)),
    ):
        assert ask(client, **penalty, max_tokens=200).choices[0].text != ask(client, max_tokens=200).choices[0].text
    with pytest.raises(openai.BadRequestError, match="logit_bias: token id 99 lies outside the vocabulary of"):
        ask(client, logit_bias={"99": 1})


def test_an_empty_prompt_is_the_end_of_text_token_if_there_is_one(place, client, another):
    with pytest.raises(openai.BadRequestError, match="prompt: is empty; a text has to begin with at least one token"):
        ask(client, prompt="")
    write_run(place / "out-bytes", ByteTokenizer())
    server = another("--out_dir=out-bytes")
    expected = server.text(prompt=[256])
    assert server.text(prompt="") == server.text(prompt=None) == server.text(prompt=[[]]) == expected


# Several requests


def test_texts_generated_together_are_the_same_as_alone(server):
    asked = [
        dict(prompt="abcdefg"[: 1 + i % 7], temperature=i % 3 / 2, seed=i, max_tokens=20 + 3 * i) for i in range(12)
    ]
    alone = [server.text(**body) for body in asked]
    together = [None] * len(asked)

    def one(i):
        together[i] = server.text(**asked[i])

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_requests_share_the_steps_of_the_model(another):
    server = another("--max_batch=4")
    before = server.metric("steps_total")
    server.complete(max_tokens=50, n=4)
    assert server.metric("tokens_total") == 200
    assert server.metric("steps_total") - before < 60


def test_a_request_joins_the_batch_of_another(server):
    with server.connect(dict(prompt="a", max_tokens=FOREVER, stream=True)) as slow:
        assert slow.recv(1000)
        assert len(server.text(max_tokens=5)) == 5
        assert server.metric("texts") == 1
    server.until("texts", 0)


def test_text_is_sent_while_it_is_generated(server):
    with server.connect(dict(prompt="a", max_tokens=FOREVER, stream=True)) as sock:
        assert b"data: " in sock.recv(2000) + sock.recv(2000)
        assert server.metric("completions") == 1  # it is not finished
    server.until("texts", 0)


def test_no_character_is_cut_in_a_stream(place):
    """The tokens are random bytes, most of which are not whole characters."""
    write_run(place / "out-bytes", ByteTokenizer())
    server = Served(place, "--out_dir=out-bytes", name="log-bytes")
    try:
        asked = dict(prompt="€", max_tokens=300, temperature=1.5, seed=1, logprobs=0)
        whole = server.complete(**asked)["choices"][0]
        events = server.ask("POST", "/v1/completions", asked | {"stream": True})[2].decode("utf-8").split("\n\n")
        parts = [json.loads(e.removeprefix("data: "))["choices"][0] for e in events if e and not e.endswith("[DONE]")]
        assert "".join(part["text"] for part in parts) == whole["text"] and len(parts) > 1
        assert [t for part in parts for t in part["logprobs"]["tokens"]] == whole["logprobs"]["tokens"]
        assert len(whole["logprobs"]["tokens"]) == 300
        assert any(name.startswith("bytes:\\x") for name in whole["logprobs"]["tokens"])
    finally:
        server.close()


def test_the_end_of_text_ends_a_text(place, another):
    tok = CharTokenizer(["a", "b", UNKNOWN], unknown=UNKNOWN, separated=True)
    write_run(place / "out-ends", tok)
    server = another("--out_dir=out-ends")
    found = server.complete(prompt="ab", temperature=2.0, seed=1, max_tokens=1000)
    (choice,) = found["choices"]
    assert choice["finish_reason"] == "stop" and "endoftext" not in choice["text"]
    assert len(choice["text"]) == found["usage"]["completion_tokens"] < 1000


# Limits


def test_a_prompt_of_few_characters_may_have_too_many_tokens(place, another):
    write_run(place / "out-bytes", ByteTokenizer())
    server = another("--out_dir=out-bytes", "--max_prompt=100")
    status, error = server.refused({"prompt": "€" * 50})
    assert (status, error["message"]) == (400, "prompt: has 150 tokens; expected 1 to 100")


def test_a_body_that_is_too_large_is_refused(server):
    assert server.refused({"prompt": "a" * 5000})[0] == 413
    status, error = server.refused({"prompt": "a" * 1001})
    assert (status, error["param"]) == (400, "prompt")


def test_a_chunked_body_that_is_too_large_is_refused_before_its_end(server):
    with socket.create_connection((server.host, server.port), timeout=60) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(5):
            sock.sendall(b"400\r\n" + b"a" * 1024 + b"\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 4000])
def test_a_malformed_body_is_refused(server, body):
    assert server.refused(body, Content_Type="application/json")[0] == 400


CURLS = "application/x-www-form-urlencoded"  # what `curl -d` sends


@pytest.mark.parametrize("headers", [{}, {"Content_Type": CURLS}])
def test_a_body_without_a_json_content_type_is_read_as_json(server, headers):
    for bom in (b"", b"\xef\xbb\xbf"):
        assert server.ask("POST", "/v1/completions", bom + b'{"prompt": "a"}', **headers)[0] == 200
    assert server.refused(b"prompt=a", **headers)[0] == 400


@pytest.mark.parametrize(
    "headers",
    [{"Content_Type": "text/plain"}, {"Content_Type": "multipart/form-data; boundary=a"}]
    + [{"Content_Type": CURLS} | page for page in ({"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"})]
    + [{"Origin": "http://example.com"}],
)
def test_a_form_from_another_page_is_refused(server, headers):
    """Browsers let any page send forms, and bodies without a type, to any server, but add headers that reveal it."""
    assert server.refused(b'{"prompt": "a"}', **headers)[0] == 415


@pytest.mark.parametrize(
    "path", ["/", "/health", "/metrics", "/losses", "/v1/models", "/v1/models/out-tiny", "/v1/models/x", "/nope"]
)
def test_head_responds_like_get_without_the_body(server, path):
    status, headers, body = server.ask("HEAD", path)
    expected, others, _ = server.ask("GET", path)
    assert (status, headers["Content-Type"], body) == (expected, others["Content-Type"], b"")


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl_needs_no_header(server):
    command = ["curl", "-sS", "-d", '{"prompt": "abc", "max_tokens": 30, "temperature": 0}']
    done = subprocess.run([*command, f"{server.address}/v1/completions"], capture_output=True, timeout=60)
    assert json.loads(done.stdout)["choices"][0]["text"] == server.text(max_tokens=30)


@pytest.mark.parametrize(
    "method, path, status",
    [("GET", "/v1/completions", 405), ("POST", "/", 405), ("GET", "/nope", 404), ("GET", "/v1/models/x", 404)]
    + [("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("GET", "/../page.html", 404), ("GET", "/%2e%2e/x", 404)],
)
def test_unknown_paths_and_methods_are_errors_in_openais_format(server, method, path, status):
    assert server.refused(None, path, method)[0] == status


def test_characters_outside_the_vocabulary_are_named(server):
    status, error = server.refused({"prompt": "abcX"})
    assert status == 400 and "'X' (U+0058)" in error["message"] and error["param"] == "prompt"
    assert "token id 99 lies outside" in server.refused({"prompt": [99]})[1]["message"]


def test_a_prompt_longer_than_the_context_is_read_from_its_end(server):
    assert server.text(prompt="abc" * 300) == server.text(prompt=("abc" * 300)[-16:])


def test_requests_beyond_max_requests_get_429(another):
    server = another("--max_batch=2", "--max_requests=3", f"--max_tokens={FOREVER}")
    socks = [server.connect(dict(prompt="a", max_tokens=FOREVER, stream=True)) for _ in range(3)]
    server.until("completions", 3)
    server.until("texts", 2)
    assert server.metric("waiting") == 1
    status, headers, body = server.ask("POST", "/v1/completions", {"prompt": "a"})
    assert (status, headers["Retry-After"]) == (429, "1") and json.loads(body)["error"]["type"] == "rate_limit_error"
    socks.pop(0).close()  # who waits takes the place, and there is room to wait again
    server.until("completions", 2)
    server.until("texts", 2)
    for sock in socks:
        sock.close()
    server.until("completions", 0)
    assert len(server.text(max_tokens=5)) == 5


def test_a_request_that_takes_too_long_is_ended(another):
    server = another("--max_batch=1", "--max_seconds=2", f"--max_tokens={FOREVER}")
    status, error = server.refused({"prompt": "a", "max_tokens": FOREVER})
    assert (status, error["type"]) == (408, "timeout_error") and "2 s" in error["message"]
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="unused", max_retries=0) as client:
        text = ""
        with pytest.raises(openai.APIError, match="took longer than 2 s"):
            for part in ask(client, max_tokens=FOREVER, stream=True):
                text += part.choices[0].text
    assert text
    server.until("texts", 0)


# Clients that disconnect, or do not read


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_place(server, stream):
    socks = [server.connect(dict(prompt="a", max_tokens=FOREVER, stream=stream)) for _ in range(4)]
    server.until("texts", 4)
    for sock in socks:
        sock.close()
    server.until("texts", 0)
    server.until("completions", 0)
    assert server.metric("tokens_total") < 4 * FOREVER


def test_a_client_that_disconnects_while_it_waits_frees_its_place(another):
    server = another("--max_batch=1", f"--max_tokens={FOREVER}")
    with server.connect(dict(prompt="a", max_tokens=FOREVER, stream=True)):
        server.until("texts", 1)
        waiting = server.connect(dict(prompt="a", max_tokens=FOREVER, stream=True))
        server.until("waiting", 1)
        waiting.close()
        server.until("waiting", 0)
        assert server.metric("texts") == 1


def test_a_client_that_does_not_read_does_not_delay_others(server):
    body = dict(prompt="a", max_tokens=4000, stream=True, logprobs=20, n=4)  # more than buffers on the way take
    with server.connect(body, receive_buffer=2048):
        assert len(server.text(max_tokens=50)) == 50
        server.until("texts", 0, timeout=120)  # its text is finished though it reads nothing
        assert server.metric("completions") == 1
    server.until("completions", 0)


def test_headers_and_bodies_that_never_end_time_out(another):
    server = another(before=impatient)
    with socket.create_connection((server.host, server.port), timeout=60) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: local")
        assert sock.recv(100) == b""
    with socket.create_connection((server.host, server.port), timeout=60) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        assert sock.recv(100).startswith(b"HTTP/1.1 408 ")


def impatient():
    """Runs in the server's process before it starts: short time limits."""
    from nanogpt.serve import app, connections

    connections.IDLE_TIME = app.BODY_TIME = 0.5


def test_invalid_http_is_refused(server):
    for raw in (
        b"\x16\x03\x01\x02\x00\x01",
        b"GET\r\n\r\n",
        b"\0" * 5000,
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    ):
        with socket.create_connection((server.host, server.port), timeout=60) as sock:
            sock.sendall(raw)
            assert sock.recv(100).startswith(b"HTTP/1.1 400 ") or sock.recv(100) == b""
    assert len(server.text(max_tokens=5)) == 5


TWO_LENGTHS = [
    "Content-Length: 5\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: 5",
    "transfer-encoding: Chunked\r\nCONTENT-LENGTH: 45",
    "Content-Length: 5\r\nContent-Length: 6",
    "Content-Length: 5, 6",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
]


@pytest.mark.parametrize("lengths", TWO_LENGTHS)
@pytest.mark.parametrize("request_line", ["POST /v1/completions", "GET /health", "OPTIONS /health"])
def test_a_request_with_two_lengths_is_refused_and_its_connection_closed(server, request_line, lengths):
    """A proxy may use one length and the server the other; then only one of them sees a second request."""
    raw = (
        f"{request_line} HTTP/1.1\r\nHost: localhost\r\nOrigin: http://a\r\nContent-Type: application/json\r\n{lengths}"
    )
    answer = server.exchange(raw.encode() + b"\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1 ") == 1, answer


# More connections than can be open


def few_files():
    """Runs in the server's process before it starts: few files, including sockets, can be open."""
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def open_most(server):
    """The maximum number of open connections, as the server has printed it."""
    server.door.wait_for("connections are open, the most that fit")
    return int(re.search(r"^(\d+) connections are open", server.door.printed, re.M)[1])


def test_idle_connections_are_closed_if_there_are_too_many(another):
    """There are more idle connections than the server can have open: a new request is served, and a line reports it."""
    server = another(before=few_files)
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(socket.create_connection((server.host, server.port), timeout=60))
        assert len(server.text(max_tokens=5)) == 5
        assert 0 < open_most(server) < 64
        assert len(server.text(max_tokens=5)) == 5
    assert len(server.text(max_tokens=5)) == 5
    said = server.door.printed.partition("serving ")[2].splitlines()
    assert len(said) == 2 and said[1].endswith("idle ones are closed, further ones wait"), said


def test_busy_connections_stay_open_and_further_ones_wait(another):
    """There are more endless texts than connections can be open: those that wait are accepted when others end."""
    server = another("--max_requests=500", f"--max_tokens={FOREVER}", before=few_files)
    body = dict(prompt="a", max_tokens=FOREVER, stream=True)
    with ExitStack() as stack:
        socks = [stack.enter_context(server.connect(body)) for _ in range(80)]
        most, bystander = open_most(server), server.connect(dict(prompt="a", max_tokens=5))
        stack.enter_context(bystander)
        for sock in socks[most:]:
            sock.close()
        for sock in socks[:5]:
            assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
            sock.close()
        assert bystander.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert len(server.door.printed.partition("serving ")[2].splitlines()) == 2, server.door.printed


def test_a_connection_that_takes_the_last_place_is_served(another):
    server = another("--max_requests=500", f"--max_tokens={FOREVER}", before=few_files)
    body = dict(prompt="a", max_tokens=FOREVER, stream=True)
    with ExitStack() as stack:
        socks = [stack.enter_context(server.connect(body)) for _ in range(80)]
        most = open_most(server)
        for sock in socks[most:]:
            sock.close()
        for sock in socks[:3]:
            waiting = stack.enter_context(socket.create_connection((server.host, server.port), timeout=120))
            waiting.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            sock.close()
            assert waiting.recv(1000).startswith(b"HTTP/1.1 200 ")


# Keys, hosts, origins

KEY = "a-very-secret-key"


@pytest.fixture(scope="module")
def locked(place):
    """A server with a key, from a file."""
    (place / "key.txt").write_text(KEY + "\n")
    served = Served(
        place, "--out_dir=out-tiny", "--api_key_file=key.txt", "--allow_origin=https://example.org", name="log-locked"
    )
    yield served
    served.close()


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/metrics", "/losses", "/nope"])
@pytest.mark.parametrize(
    "given",
    [{}]
    + [{"Authorization": given} for given in ("Bearer wrong", KEY, "Bearer é", f"Bearer {KEY}s", f"Bearer {KEY[:-1]}")],
)
def test_without_the_key_every_path_is_refused(locked, path, given):
    status, error = locked.refused(None, path, "GET", **given)
    assert (status, error["code"], error["type"]) == (401, "invalid_api_key", "authentication_error")


def test_with_the_key_every_path_responds(locked):
    with openai.OpenAI(base_url=f"{locked.address}/v1", api_key=KEY, max_retries=0) as client:
        assert len(ask(client).choices[0].text) == 30
    with openai.OpenAI(base_url=f"{locked.address}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            ask(client)
    assert locked.ask("GET", "/metrics")[1]["WWW-Authenticate"] == "Bearer"
    assert locked.ask("GET", "/metrics", Authorization=f"Bearer {KEY}")[0] == 200


@pytest.mark.parametrize("path", ["/", "/health"])
def test_the_page_and_health_need_no_key(locked, path):
    assert locked.ask("GET", path)[0] == 200


def test_the_key_is_never_printed(locked):
    assert KEY not in locked.door.printed


def test_a_key_from_the_environment(another):
    server = another(env={"NANOGPT_API_KEY": KEY})
    assert server.ask("GET", "/v1/models")[0] == 401
    assert server.ask("GET", "/v1/models", Authorization=f"Bearer {KEY}")[0] == 200


def test_another_host_name_is_refused_without_a_key(server, locked):
    assert server.refused(None, "/v1/models", "GET", Host="evil.example:80")[0] == 403
    for host in ("localhost", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"):
        assert server.ask("GET", "/v1/models", Host=host)[0] == 200
    assert locked.ask("GET", "/health", Host="model.example.org")[0] == 200  # the key keeps strangers out


def test_only_pages_of_the_allowed_origin_can_use_the_server(server, locked):
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    for origin, allowed in (("https://example.org", True), ("https://example.com", False)):
        status, headers, _ = locked.ask("OPTIONS", "/v1/completions", Origin=origin, **preflight)
        assert (status == 200) == (headers["Access-Control-Allow-Origin"] == origin) == allowed
        assert not allowed or headers["Access-Control-Allow-Headers"] == "authorization,content-type"
        headers = locked.ask("GET", "/health", Origin=origin)[1]
        assert (headers["Access-Control-Allow-Origin"] == origin) == allowed
        headers = server.ask("GET", "/health", Origin=origin)[1]
        assert headers["Access-Control-Allow-Origin"] is None


def test_pages_of_any_origin_can_use_the_server_if_allowed(another):
    headers = another("--allow_origin=*").ask("GET", "/health", Origin="https://example.com")[1]
    assert headers["Access-Control-Allow-Origin"] == "*"


def test_every_response_has_the_security_headers(server):
    for path in ("/", "/health", "/nope", "/v1/models"):
        headers = server.ask("GET", path)[1]
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"


# Health, metrics, losses


def test_health_and_metrics(server):
    assert json.loads(server.ask("GET", "/health")[2]) == {"status": "ok"}
    server.complete(max_tokens=5)
    server.ask("GET", "/some/path")
    status, headers, body = server.ask("GET", "/metrics")
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    for line in body.decode().splitlines():
        assert re.fullmatch(
            r'# (HELP|TYPE) nanogpt_\w+ .+|nanogpt_\w+(\{\w+="[^"]*"(,\w+="\d+")?\})? [\d.e+-]+', line
        ), line
    assert server.metric('requests_total{path="/v1/completions",status="200"}') >= 1
    assert server.metric('requests_total{path="other",status="404"}') >= 1
    assert server.metric('completion_seconds_bucket{le="+Inf"}') == server.metric("completion_seconds_count") >= 1
    assert server.metric("failures_total") == 0


def test_the_error_for_another_host_name_says_how_to_allow_it(server):
    assert (
        "NANOGPT_API_KEY or --api_key_file"
        in server.refused(None, "/v1/models", "GET", Host="host.docker.internal")[1]["message"]
    )


@pytest.mark.parametrize("later", ["the same run, gone on", "another run"])
def test_the_loss_curve_ends_at_the_checkpoint_served(place, another, later):
    write_run(place / "out-learned")
    path, end = place / "out-learned" / "metrics.jsonl", 20
    if later == "the same run, gone on":
        records = [{"step": s, "loss": 5.0, "train_loss": 5.0, "val_loss": 5.0} for s in range(25, 41, 5)]
        path.write_text(path.read_text() + "".join(json.dumps(r) + "\n" for r in records))
    server = another("--out_dir=out-learned")
    if later == "another run":  # which begins while the model is served
        path.write_text('{"step": 0, "val_loss": 9.0}\n{"step": 5, "val_loss": 8.0}\n')
    curves = json.loads(server.ask("GET", "/losses")[2])
    assert curves["val"] == [[s, 3.1 - s / 20] for s in range(0, 21, 5)] and curves["train"][-1] == [end, 2.0]


def test_the_loss_curve_of_another_run_is_not_shown(place, another):
    write_run(place / "out-other")
    records = [{"step": s, "loss": 2.0, "val_loss": 2.0 - s / 50} for s in range(0, 41, 5)]
    (place / "out-other" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert json.loads(another("--out_dir=out-other").ask("GET", "/losses")[2]) == {"train": [], "val": []}


def test_losses_responds_with_the_loss_curve(server):
    curves = json.loads(server.ask("GET", "/losses")[2])
    assert curves["val"] == [[s, 3.1 - s / 20] for s in range(0, 21, 5)] and len(curves["train"]) == 21


def test_a_long_curve_is_thinned_evenly_to_its_end():
    records = [{"step": s, "loss": float(s)} for s in range(1, 1235)] + [{"step": 1235, "loss": None}]
    found = curve(records, "loss")
    assert 400 < len(found) <= 500 and found[-1] == [1234, 1234.0]
    assert len({b - a for (a, _), (b, _) in zip(found, found[1:], strict=False)}) == 1


# When the model fails, and when the server ends


def broken():
    """Runs in the server's process before it starts: the model fails on prompts that begin with token 1."""
    from nanogpt import generate

    step = generate.Engine.step

    def fail(self):
        if any(row.ids[0] == 1 for row in self.rows):
            raise RuntimeError("out of memory")
        return step(self)

    generate.Engine.step = fail


def test_a_failure_of_the_model_is_reported_and_the_server_continues(another):
    server = another(f"--max_tokens={FOREVER}", before=broken)
    text = server.text(prompt=[2, 3])
    with server.connect(dict(prompt=[2], max_tokens=FOREVER, stream=True)) as bystander:
        bystander.recv(1000)
        assert server.refused({"prompt": [1, 2]})[0] == 500
        while chunk := bystander.recv(65536):
            last = chunk
            if b"[DONE]" in chunk:
                break
        assert b'"error"' in last
    assert server.text(prompt=[2, 3]) == text
    assert server.metric("failures_total") == 1 and "out of memory" in server.door.printed


def broken_for_good():
    """Runs in the server's process before it starts: the model fails, and no other engine can be made."""
    from nanogpt import generate

    def fail(self):
        generate.Engine.__init__ = fail
        raise RuntimeError("out of memory")

    generate.Engine.step = fail


def test_health_is_503_if_the_model_cannot_be_run(another):
    server = another(before=broken_for_good)
    assert server.ask("GET", "/health")[0] == 200
    assert server.refused({"prompt": "a"})[0] == 500
    end = time.monotonic() + 60
    while server.ask("GET", "/health")[0] == 200:
        assert time.monotonic() < end
    assert server.refused(None, "/health", "GET")[0] == server.refused({"prompt": "a"})[0] == 503


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_an_idle_server(another, signum, code):
    server = another()
    server.door.send(signum)
    assert server.door.end() == code
    assert server.door.printed.splitlines()[-1] == f"{signum.name}: stopped" and "Traceback" not in server.door.printed


def test_a_stopping_server_finishes_responses_and_accepts_no_connections(place, another):
    server = another(before=long_grace)
    (place / "finish").unlink(missing_ok=True)
    with server.connect(dict(prompt="abc", max_tokens=20, stream=True, temperature=0)) as sock:
        received = sock.recv(1000)
        server.door.send(signal.SIGTERM)
        server.door.wait_for("stopping: 1 ")
        with pytest.raises(OSError):
            socket.create_connection((server.host, server.port), timeout=5).close()
        (place / "finish").touch()
        while chunk := sock.recv(65536):
            received += chunk
    assert b'"finish_reason":"length"' in received and b"data: [DONE]\n\n" in received
    assert server.door.end() == 143


def test_a_response_that_cannot_finish_ends_with_an_error(another):
    server = another(f"--max_tokens={FOREVER}", before=short_grace)
    with server.connect(dict(prompt="abc", max_tokens=FOREVER, stream=True)) as sock:
        received = sock.recv(1000)
        server.door.send(signal.SIGINT)
        while chunk := sock.recv(65536):
            received += chunk
    assert b"the server is stopping" in received and received.rstrip(b"\r\n0").endswith(b"data: [DONE]")
    assert server.door.end() == 130 and "Traceback" not in server.door.printed


def test_a_second_ctrl_c_ends_the_server_at_once(another):
    server = another(f"--max_tokens={FOREVER}")
    with server.connect(dict(prompt="abc", max_tokens=FOREVER, stream=True)) as sock:
        assert sock.recv(1000)
        server.door.send(signal.SIGINT)
        server.door.wait_for("stopping: 1 ")
        server.door.send(signal.SIGINT)
        assert server.door.end() == 130 and "Traceback" not in server.door.printed


def test_a_client_that_does_not_read_cannot_keep_the_server_running(another):
    server = another(f"--max_tokens={FOREVER}", "--max_n=16", before=short_grace)
    body = dict(prompt="abc", max_tokens=FOREVER, stream=True, logprobs=20, n=16)
    with server.connect(body, receive_buffer=2048):
        while server.metric("tokens_total") < 60_000:
            time.sleep(0.1)
        server.door.send(signal.SIGTERM)
        assert server.door.end() == 143 and "Traceback" not in server.door.printed


def long_grace():
    """Runs in the server's process before it starts: texts may take long to finish, and wait for the test."""
    from nanogpt import generate
    from nanogpt.serve import connections

    connections.GRACE_TIME = 100

    def step(self, real=generate.Engine.step):
        while any(row.new == 10 for row in self.rows) and not Path("finish").exists():
            time.sleep(0.01)
        return real(self)

    generate.Engine.step = step


def short_grace():
    from nanogpt.serve import connections

    connections.GRACE_TIME = 0.2


# Errors at the start


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--out_dir=elsewhere"], "--out_dir=elsewhere: holds no checkpoint"),
        (["--port=99999"], "--port=99999: expected an integer from 0 to 65535"),
        (["--host=203.0.113.1"], "--host=203.0.113.1: not an address of this machine"),
        (["--host=no such host"], "--host=no such host: not an address of this machine"),
        (["--max_n=0"], "--max_n=0: expected an integer from 1 to 1000000"),
        (["--allow_origin=example.org"], "--allow_origin=example.org: must be an origin such as"),
        (["--api_key_file=nowhere"], "--api_key_file=nowhere: cannot be read (No such file or directory)"),
        (["--api_key_file=out-tiny/metrics.jsonl"], "expected one word of ASCII characters"),
    ],
)
def test_a_server_that_cannot_start_prints_one_line(place, monkeypatch, capsys, args, expected):
    from nanogpt.commands import cli

    monkeypatch.chdir(place)
    keep = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        assert cli.main(["serve", "--device=cpu", "--port=0", "--out_dir=out-tiny", *args]) == 2
    finally:
        signal.signal(signal.SIGINT, keep[0]), signal.signal(signal.SIGTERM, keep[1])
    said = capsys.readouterr().err
    assert said.startswith("error: ") and expected in said and len(said.splitlines()) == 1


def test_a_port_in_use_is_reported_before_the_model_loads(server, place, monkeypatch, capsys):
    from nanogpt.commands import cli

    monkeypatch.chdir(place)
    assert cli.main(["serve", "--device=cpu", f"--port={server.port}", "--out_dir=elsewhere"]) == 2
    expected = f"error: --port={server.port}: another program listens there; --port=0 takes a free one\n"
    assert capsys.readouterr().err == expected


def test_an_open_address_without_a_key_is_announced(another):
    server = another("--host=0.0.0.0")
    assert "no key: anyone who can reach" in server.door.printed
    assert server.ask("GET", "/v1/models", Host="this.machine:80")[0] == 200


def test_only_the_loopback_address_listens_by_default(server):
    assert server.host == "127.0.0.1"
    others = {a[4][0] for a in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in others:
        with pytest.raises(OSError):
            socket.create_connection((address, server.port), timeout=2).close()
