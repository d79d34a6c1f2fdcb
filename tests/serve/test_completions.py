"""What a request may contain, and the format of the response, without a server."""

import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from openai.types import Completion as OpenAICompletion

from nanogpt.config import ServeConfig
from nanogpt.generate import Token
from nanogpt.serve.batching import Part
from nanogpt.serve.completions import MAX_LOGPROBS, ApiError, Choice, Completion, CompletionRequest, read_request
from nanogpt.text.tokenizer import ByteTokenizer, CharTokenizer

CFG = ServeConfig(max_tokens=100, max_n=4, max_prompt=50)


def ask(**given):
    return read_request(json.dumps({"prompt": "a"} | given).encode(), CFG)


def refused(body, cfg=CFG):
    with pytest.raises(ApiError) as caught:
        read_request(body if isinstance(body, bytes) else json.dumps(body).encode(), cfg)
    assert caught.value.status == 400 and "\n" not in caught.value.message and len(caught.value.message) < 500
    return caught.value


# Requests


def test_the_defaults_are_those_of_openai():
    found = ask()
    expected = (16, 1.0, 1.0, 1, None, None, False, False, [])
    names = ("max_tokens", "temperature", "top_p", "n", "seed", "logprobs", "echo", "stream", "stop")
    assert tuple(getattr(found, name) for name in names) == expected
    assert (found.top_k, found.min_p, found.prompt) == (0, 0.0, ["a"])


def test_null_means_the_default():
    assert ask(**dict.fromkeys(("max_tokens", "temperature", "n", "stop", "logprobs", "stream_options"))) == ask()


@pytest.mark.parametrize(
    "prompt, prompts",
    [
        ("ab", ["ab"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_prompt_formats(prompt, prompts):
    assert ask(prompt=prompt).prompt == prompts


@pytest.mark.parametrize("stop, stops", [("x", ["x"]), (["x", "yz"], ["x", "yz"]), ([], [])])
def test_stop_formats(stop, stops):
    assert ask(stop=stop).stop == stops


@pytest.mark.parametrize(
    "field, value, why",
    [
        ("max_tokens", 101, "should be less than or equal to 100, not 101"),
        ("max_tokens", -1, "should be greater than or equal to 0, not -1"),
        ("max_tokens", True, "should be a valid integer, not true"),
        ("max_tokens", "7", 'should be a valid integer, not "7"'),
        ("n", 5, "should be less than or equal to 4, not 5"),
        ("temperature", 2.1, "should be less than or equal to 2, not 2.1"),
        ("temperature", "hot", 'should be a valid number, not "hot"'),
        ("top_p", -0.1, "should be greater than or equal to 0, not -0.1"),
        ("top_k", -1, "should be greater than or equal to 0, not -1"),
        ("seed", 1.5, "should be a valid integer, not 1.5"),
        ("seed", 2**63, "should be less than"),
        ("logprobs", MAX_LOGPROBS + 1, f"should be less than or equal to {MAX_LOGPROBS}"),
        ("stream", 1, "should be a valid boolean, not 1"),
        ("model", 5, "should be a valid string, not 5"),
        ("prompt", [], "expected 1 to 20 texts"),
        ("prompt", {}, "should be text, a list of token ids, or a list of such, not {}"),
        ("prompt", [True], "should be text"),
        ("prompt", [1, "a"], "should be text"),
        ("prompt", [[1.5]], "should be text"),
        ("prompt", ["a"] * 21, "expected 1 to 20 texts in a request, not 21 prompts x n 1"),
        ("prompt", "a" * 51, "has 51 characters; the limit is 50"),
        ("prompt", [1] * 51, "has 51 tokens; the limit is 50"),
        ("stop", 5, "should be a valid array, not 5"),
        ("stop", [""], "string should have at least 1 character"),
        ("stop", ["a"] * 5, "list should have at most 4 items"),
        ("stream_options", {"include_usage": True}, "is allowed only with stream"),
        ("logit_bias", {"5": 101}, "should be less than or equal to 100, not 101"),
        ("logit_bias", {"a": 1}, 'should be a valid integer, not "a"'),
        ("logit_bias", [5], "should be an object, not [5]"),
        ("logit_bias", {str(i): 1 for i in range(1025)}, "dictionary should have at most 1024 items"),
        ("frequency_penalty", 2.5, "should be less than or equal to 2, not 2.5"),
        ("presence_penalty", -2.5, "should be greater than or equal to -2, not -2.5"),
        ("suffix", "b", "is not supported"),
        ("max_completion_tokens", 101, "should be less than or equal to 100, not 101"),
        ("repetition_penalty", 0, "should be greater than 0, not 0"),
        ("repetition_penalty", True, "should be a valid number, not true"),
        ("ignore_eos", True, "is not supported, except with false"),
        ("stop_token_ids", [5], "is not supported, except with []"),
        ("skip_special_tokens", False, "is not supported, except with true"),
        ("add_special_tokens", "yes", "is not supported, except with true or false"),
        ("response_format", {"type": "json_object"}, 'is not supported, except with {"type": "text"}'),
        ("tools", [{"type": "function"}], "is not supported, except with []"),
        ("store", True, "is not supported, except with false"),
        ("service_tier", "flex", 'is not supported, except with "auto" or "default"'),
        ("metadata", 5, "should be an object, not 5"),
        ("user", 5, "should be a valid string, not 5"),
        ("best_of", 5, "should be less than or equal to 4, not 5"),
    ],
)
def test_an_invalid_field_is_named(field, value, why):
    error = refused({"prompt": "a"} | {field: value})
    assert error.message.startswith(f"{field}: {why}") and error.param == field
    assert error.body()["error"] == dict(message=error.message, type="invalid_request_error", param=field, code=None)


@pytest.mark.parametrize(
    "asked, why",
    [
        (dict(prompt=["a"] * 11, n=2), "prompt: expected 1 to 20 texts in a request, not 11 prompts x n 2"),
        (dict(max_tokens=5, max_completion_tokens=6), "max_tokens and max_completion_tokens differ"),
        (dict(prompt=["a"] * 6, best_of=4), "prompt: expected 1 to 20 texts in a request, not 6 prompts x best_of 4"),
        (dict(n=3, best_of=2), "best_of: should be at least n, which is 3, not 2"),
        (dict(n=2, best_of=3, stream=True), "best_of: must not exceed n with stream"),
        (dict(stream=True, stream_options=dict(include_usage=1)), "stream_options: should be a valid boolean, not 1"),
        (dict(stream=True, stream_options=[]), "stream_options: should be an object, not []"),
        (dict(stop=["x" * 257]), "stop: string should have at most 256 characters"),
    ],
)
def test_an_invalid_combination_is_named(asked, why):
    assert refused({"prompt": "a"} | asked).message.startswith(why)


def test_a_request_may_have_more_texts_than_there_are_places():
    """They wait for places."""
    assert len(ask(prompt=["a"] * 20).prompt) == 20
    assert ask(prompt=["a"] * 5, n=4).n == 4
    cfg = ServeConfig(max_n=30, max_batch=3)
    assert read_request(b'{"prompt": "a", "n": 30}', cfg).n == 30
    assert "n: should be less than or equal to 30, not 31" in refused(dict(prompt="a", n=31), cfg).message


@pytest.mark.parametrize(
    "asked", [dict(seed="9" * 9999), {"x" * 9999: 1}, dict(stop=["x" * 9999] * 5)], ids=["value", "name", "texts"]
)
def test_long_values_are_shortened_in_messages(asked):
    refused({"prompt": "a"} | asked)  # which looks at the length


def test_all_problems_are_reported_together():
    error = refused(dict(prompt=[], max_tokens=-1, temprature=1))
    assert [p.split(":")[0] for p in error.message.split("; ") if ":" in p] == ["max_tokens", "prompt", '"temprature"']
    assert "did you mean temperature?" in error.message


def test_no_prompt_is_an_empty_one():
    assert read_request(b"{}", CFG).prompt == ask(prompt="").prompt == ask(prompt=None).prompt == [""]
    assert ask(prompt=[[]]).prompt == [[]]


def test_penalties_and_biases():
    found = ask(frequency_penalty=-2, presence_penalty=0.5, repetition_penalty=1.2, logit_bias={"5": -100, "6": 0.5})
    assert (found.frequency_penalty, found.presence_penalty, found.repetition_penalty) == (-2.0, 0.5, 1.2)
    assert found.logit_bias == {5: -100.0, 6: 0.5}
    assert ask(logit_bias=None, frequency_penalty=None) == ask()


def test_the_number_of_texts_to_generate():
    assert (ask().texts, ask(n=3).texts, ask(n=2, best_of=4).texts, ask(n=3, best_of=3, stream=True).texts) == (
        1,
        3,
        4,
        3,
    )


def test_neutral_values_of_unsupported_fields_are_accepted():
    ask(suffix="", user="somebody")
    ask(ignore_eos=False, stop_token_ids=[], skip_special_tokens=True, add_special_tokens=False)
    ask(
        cache_prompt=True,
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        response_format={"type": "text"},
        tools=[],
    )


def test_max_tokens_and_max_completion_tokens_mean_the_same():
    assert ask(max_completion_tokens=7) == ask(max_tokens=7) == ask(max_tokens=7, max_completion_tokens=7)
    assert ask(max_completion_tokens=7).max_tokens == 7


def test_a_byte_order_mark_is_ignored():
    assert read_request(b'\xef\xbb\xbf{"prompt": "a"}', CFG) == ask()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"5",
        b'"a"',
        b"null",
        b'{"prompt": NaN}',
        b'{"temperature": -Infinity}',
        b"[" * 100_000,
        rb'{"prompt": "\ud800"}',
        rb'{"prompt": "a", "stop": "\udc00"}',
    ]
    + [b'{"seed": ' + b"9" * 5000 + b"}", b'{"a": ' * 50_000],
)
def test_a_body_that_is_not_a_json_object_is_refused(body):
    assert any(word in refused(body).message for word in ("JSON", "seed", "not NaN", "not -Infinity"))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(
    "model prompt max_tokens temperature top_p n seed stop stream logprobs echo stream_options x".split()
)


@given(st.one_of(st.binary(), st.dictionaries(names, values).map(lambda d: json.dumps(d).encode())))
@example(b'{"prompt": "a", "stream": true, "stream_options": {"include_usage": 1}}')
def test_any_body_gives_a_request_or_one_error(body):
    try:
        found = read_request(body, CFG)
    except ApiError as error:
        assert error.status == 400 and error.message and json.dumps(error.body())
    else:
        assert (
            isinstance(found, CompletionRequest) and 0 < len(found.prompt) * found.n <= 20 and found.max_tokens <= 100
        )


# Responses


def part(text, id=None, start=0, finish=None, logprob=-1.0, likeliest=(), **more):
    token = None if id is None else Token(None, id, logprob, likeliest, None)
    return Part(0, text, token, start, finish, **more)


def body(choice, parts):
    for each in parts:
        choice.add(each)
    return choice.body()


def test_a_choice_has_the_format_that_the_client_expects():
    choice = Choice(0, "", True, CharTokenizer("ab€"))
    parts = [part("a", 0, 0, None, -0.5, ((0, -0.5), (1, -2.0))), part("€", 2, 1, "length", -torch.inf, ((0, -0.1),))]
    completion = Completion(ask(logprobs=1), "m", 3).body([body(choice, parts)], 2)
    found = OpenAICompletion.model_validate(json.loads(json.dumps(completion, allow_nan=False)))
    assert found.choices[0].text == "a€" and found.choices[0].finish_reason == "length"
    logprobs = found.choices[0].logprobs
    assert (logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset) == (["a", "€"], [-0.5, -9999.0], [0, 1])
    assert logprobs.top_logprobs == [{"a": -0.5, "b": -2.0}, {"a": -0.1, "€": -9999.0}]
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (3, 2, 5)


def test_an_echoed_prompt_comes_once_and_shifts_the_offsets():
    choice = Choice(0, "ab", True, CharTokenizer("ab"))
    first, second = body(choice, [part("a", 0, 0)]), body(choice, [part("b", 1, 1)])
    assert (first["text"], second["text"]) == ("aba", "b")
    assert (first["logprobs"]["text_offset"], second["logprobs"]["text_offset"]) == ([2], [3])


def test_a_token_is_reported_when_its_text_is_shown():
    choice = Choice(0, "", True, CharTokenizer("abc"))
    held = body(choice, [part("a", 0, 0), part("", 1, 1)])  # b may begin a stop string
    assert held["logprobs"]["tokens"] == ["a"]
    assert body(choice, [part("bc", 2, 2)])["logprobs"] == dict(
        tokens=["b", "c"], token_logprobs=[-1.0, -1.0], top_logprobs=[{"b": -1.0}, {"c": -1.0}], text_offset=[1, 2]
    )
    stopped = body(choice, [part("", 1, 3), part("", 2, 4, "stop")])
    assert stopped["logprobs"]["tokens"] == [] and choice.tokens == 5


def test_a_partial_character_is_named_by_its_bytes():
    class Halves:
        def token_bytes(self, id):
            return "€".encode()[id : id + 1]

    choice = Choice(0, "", True, Halves())
    found = body(choice, [part("", 0), part("", 1), part("€", 2)])["logprobs"]
    assert found["tokens"] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"] and found["text_offset"] == [0, 0, 0]


PROMPT = [Token(None, 0, None, (), None), Token(None, 1, -0.25, ((2, -0.125),), None)]


def test_the_tokens_of_an_echoed_prompt_are_reported_and_nothing_predicts_the_first():
    choice = Choice(0, "ab", True, CharTokenizer("abc"))
    found = body(choice, [part("c", 2, 0, "length", prompt=PROMPT)])
    assert found["text"] == "abc"
    assert found["logprobs"] == dict(
        tokens=["a", "b", "c"],
        token_logprobs=[None, -0.25, -1.0],
        top_logprobs=[None, {"c": -0.125, "b": -0.25}, {"c": -1.0}],
        text_offset=[0, 1, 2],
    )


def test_the_end_token_is_reported_after_an_echoed_prompt():
    """Programs that score a prompt ask for one more token and leave out the last one reported."""
    tok = CharTokenizer("abc", separated=True)
    end = Token(None, tok.eot, -0.5, (), "stop")
    for prompt, names in ((PROMPT, ["a", "b", "<|endoftext|>"]), ((), [])):
        choice = Choice(0, "ab", True, tok)
        found = body(choice, [part("", finish="stop", end=end, prompt=prompt)])
        assert (found["text"], found["logprobs"]["tokens"], choice.tokens) == ("ab", names, 0)


def test_without_new_tokens_only_the_prompt_is_reported():
    choice = Choice(0, "ab", True, CharTokenizer("abc"), prompt_only=True)
    found = body(choice, [part("c", 2, 0, "length", prompt=PROMPT)])
    assert (found["text"], found["finish_reason"], choice.tokens) == ("ab", "length", 0)
    assert found["logprobs"]["token_logprobs"] == [None, -0.25]


def test_the_offsets_of_a_prompt_whose_characters_have_several_tokens():
    choice = Choice(0, "€a", True, ByteTokenizer())
    prompt = [Token(None, id, -1.0, (), None) for id in "€a".encode()]
    assert body(choice, [part("b", 98, 0, "length", prompt=prompt)])["logprobs"]["text_offset"] == [0, 0, 0, 1, 2]
