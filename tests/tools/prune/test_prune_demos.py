import argparse
import http.server
import json
import threading

import pytest
from prune_text import BYTES_VOCABULARY, EOS, TEMPLATE, byte_tokenizer, write_lines

from gatewright.tools.prune import demos
from gatewright.tools.prune.demos import (
    Endpoint,
    Line,
    answers_file,
    fill_answers,
    pair_domains,
    prompt_tokens,
    read_lines,
    short_data,
    tokenise,
)

VALID = {"prompt": "2+2?", "answer": "4"}


def read(tmp_path, *records, domain=None):
    return read_lines([(write_lines(tmp_path / "maths.jsonl", *records), domain)])


def tokens(lines, tokenizer=None, **options):
    return tokenise(lines, tokenizer or byte_tokenizer(), **{"vocab_size": BYTES_VOCABULARY, **options})


def text(demo, tokenizer=None):
    ids = [i for i in demo.input_ids if i != EOS]
    return (tokenizer or byte_tokenizer()).decode(ids)


# reading


def test_domains_come_from_the_command_the_line_or_the_file(tmp_path):
    lines = read(tmp_path, {**VALID, "domain": "code"}, VALID)
    assert [line.domain for line in lines] == ["code", "maths"]
    assert [line.domain for line in read(tmp_path, VALID, domain="exam")] == ["exam"]
    assert pair_domains(["a", "b"], []) == [("a", None), ("b", None)]
    assert pair_domains(["a", "b"], ["x", "y"]) == [("a", "x"), ("b", "y")]


def test_blank_lines_and_line_separators_inside_text_are_no_lines(tmp_path):
    file = tmp_path / "demos.jsonl"
    file.write_text('\n{"text": "one\u2028two"}\n\n{"text": "three"}\n')
    assert [line.where.rpartition(":")[2] for line in read_lines([(file, None)])] == ["2", "4"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "a JSON list"),
        ({}, "has nothing"),
        ({"question": "?"}, "has 'question'"),
        ({"prompt": "a", "text": "b"}, "has prompt and text"),
        ({"prompt": "a", "answer": "  "}, '"answer" is empty'),
        ({"prompt": "", "answer": "b"}, '"prompt" is empty'),
        ({"prompt": 3, "answer": "b"}, '"prompt" is 3: it must be text'),
        ({"text": ""}, '"text" is empty'),
        ({"text": "a", "domain": 3}, '"domain" is 3'),
        ({"messages": []}, '"messages" must be a list'),
        ({"messages": ["hello"]}, 'message 0 has no "role"'),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "only the assistant speaks"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}, "message 1: "),
        ({"input_ids": []}, '"input_ids" must be a list'),
        ({"input_ids": [1, "2"]}, "holds '2'"),
        ({"input_ids": [[1, 2]]}, "one sequence a line"),
        ({"input_ids": [1, 2], "answer_start": 2}, '"answer_start" is 2'),
    ],
)
def test_a_bad_line_is_refused_by_file_and_line(tmp_path, record, message):
    with pytest.raises(ValueError, match=r"maths\.jsonl:2: ") as caught:
        read(tmp_path, VALID, record)
    assert message in str(caught.value)


def test_a_file_that_is_not_json_lines_is_refused(tmp_path):
    file = tmp_path / "demos.jsonl"
    for content, message in [
        (b"", "no demonstrations"),
        (b"\n\n", "no demonstrations"),
        (b'{"text": "a"}\n{"text": \n', r"demos\.jsonl:2: not JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}', r"demos\.jsonl:2: not UTF-8"),
    ]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_lines([(file, None)])
    with pytest.raises(FileNotFoundError):
        read_lines([(tmp_path / "none.jsonl", None)])


def test_domains_that_do_not_fit_the_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 --demos and 1 --domain"):
        pair_domains(["a", "b"], ["x"])
    with pytest.raises(ValueError, match='the line says domain "code", the command "exam"'):
        read(tmp_path, {**VALID, "domain": "code"}, domain="exam")


# tokens


def test_prompt_and_answer_are_tokens_one_after_the_other(tmp_path):
    (demo,) = tokens(read(tmp_path, VALID))
    assert text(demo) == "2+2?4" and demo.input_ids[-1] == EOS
    assert demo.answer_start == 4 and len(demo) == 6


def test_text_and_ids_count_as_answer_unless_told_otherwise(tmp_path):
    whole, given, split = tokens(
        read(tmp_path, {"text": "abc"}, {"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7], "answer_start": 2})
    )
    assert text(whole) == "abc" and whole.answer_start == 0
    assert given.input_ids == (5, 6, 7) and given.answer_start == 0
    assert split.answer_start == 2


def test_ids_need_no_tokenizer_and_text_does(tmp_path):
    lines = read(tmp_path, {"input_ids": [5, 6]}, {"text": "abc"})
    assert tokenise(lines[:1], None, vocab_size=10)[0].input_ids == (5, 6)
    with pytest.raises(ValueError, match=r"maths\.jsonl:2: text, but the model has no tokenizer"):
        tokenise(lines, None, vocab_size=10)


def test_the_chat_template_goes_around_prompt_and_answer(tmp_path):
    tokenizer = byte_tokenizer(TEMPLATE)
    lines = read(tmp_path, VALID)
    (demo,) = tokens(lines, tokenizer)
    assert text(demo, tokenizer) == "[user]2+2?[assistant]4"
    assert demo.answer_start == len("[user]2+2?[assistant]")
    (bare,) = tokens(lines, tokenizer, template=False)
    assert text(bare) == "2+2?4"


def test_messages_end_with_the_answer(tmp_path):
    turns = [("system", "calm"), ("user", "hi"), ("assistant", "hello"), ("user", "2+2?"), ("assistant", "4")]
    (demo,) = tokens(
        read(tmp_path, {"messages": [{"role": role, "content": content} for role, content in turns]}),
        byte_tokenizer(TEMPLATE),
    )
    prompt = "[system]calm[user]hi[assistant]hello[user]2+2?[assistant]"
    assert text(demo) == prompt + "4"
    assert demo.input_ids[demo.answer_start - 1 :].count(EOS) == 1  # the earlier turn's end is in the prompt


def test_reasoning_that_the_template_cuts_stays_in_the_answer(tmp_path):
    answer = "<think>two and two</think>4"
    (demo,) = tokens(read(tmp_path, {"prompt": "2+2?", "answer": answer}), byte_tokenizer(TEMPLATE))
    assert text(demo) == "[user]2+2?[assistant]" + answer
    assert demo.input_ids[-1] == EOS
    opened = TEMPLATE.replace("%}[assistant]{%", "%}[assistant]<think>\n{%")
    assert opened != TEMPLATE
    (demo,) = tokens(read(tmp_path, {"prompt": "2+2?", "answer": answer}), byte_tokenizer(opened))
    assert text(demo) == "[user]2+2?[assistant]<think>\ntwo and two</think>4"


def test_reasoning_apart_that_the_template_leaves_out_is_refused(tmp_path):
    last = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}
    lines = read(tmp_path, {"messages": [{"role": "user", "content": "2+2?"}, last]})
    with pytest.raises(ValueError, match=r'maths\.jsonl:1: the chat template leaves .*"reasoning_content" out'):
        tokens(lines, byte_tokenizer(TEMPLATE))
    for name in ("reasoning_content", "reasoning", "thinking"):  # as one family or another calls it
        keeps = TEMPLATE.replace("{{ m['content'].split", f"{{{{ m.get('{name}', '') }}}}{{{{ m['content'].split")
        assert name in keeps
        (demo,) = tokens(lines, byte_tokenizer(keeps))
        assert text(demo) == "[user]2+2?[assistant]two and two4"


def test_tools_and_calls_of_them_go_through_the_template(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    record = {
        "tools": [tool],
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
    }
    lines = read(tmp_path, record)
    knows = (
        "{% if tools %}[tools]{{ tools[0]['function']['name'] }}{% endif %}"
        "{% for m in messages %}[{{ m['role'] }}]{% for c in m.tool_calls or [] %}call {{ c['function']['name'] }}"
        "{% endfor %}{{ m['content'] or '' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (demo,) = tokens(lines, byte_tokenizer(knows))
    assert text(demo) == "[tools]add[user]2+2?[assistant]call add"
    assert demo.answer_start == len("[tools]add[user]2+2?[assistant]")
    changes = knows.replace("{% endfor %}{{ m['content']", "{% endfor %}{{ messages | length }}{{ m['content']")
    with pytest.raises(ValueError, match='"tool_calls" out, or changes what comes before'):
        tokens(lines, byte_tokenizer(changes))
    with pytest.raises(ValueError, match='"tools" must be a list'):
        read(tmp_path, {**record, "tools": "add"})


def test_messages_without_a_template_and_a_template_that_raises_are_refused(tmp_path):
    lines = read(tmp_path, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    with pytest.raises(ValueError, match=r"maths\.jsonl:1: .*no chat template"):
        tokens(lines)
    with pytest.raises(ValueError, match=r"maths\.jsonl:1: the chat template refuses these messages: no users"):
        tokens(lines, byte_tokenizer("{{ raise_exception('no users') }}"))


def test_ids_of_another_tokenizer_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"maths\.jsonl:1: token id 300, but .* 0 to 258: .*another tokenizer"):
        tokens(read(tmp_path, {"input_ids": [1, 300]}))
    with pytest.raises(ValueError, match="token id -1"):
        tokens(read(tmp_path, {"input_ids": [1, -1]}))
    with pytest.raises(ValueError, match="another tokenizer"):
        tokens(read(tmp_path, {"text": "ab\u00ff"}), vocab_size=20)


def test_what_is_longer_than_the_context_is_refused_or_cut(tmp_path):
    lines = read(tmp_path, {"prompt": "abcd", "answer": "efgh"})
    with pytest.raises(ValueError, match=r"maths\.jsonl:1: 9 tokens, but the model's context is 6.*--truncate"):
        tokens(lines, context=6)
    (demo,) = tokens(lines, context=6, truncate=True)
    assert text(demo) == "abcdef"
    with pytest.raises(ValueError, match="the prompt alone fills the context of 4"):
        tokens(lines, context=4, truncate=True)
    with pytest.raises(ValueError, match="at least 2"):
        tokens(read(tmp_path, {"input_ids": [5]}))


def test_a_tokenizer_that_closes_the_prompt_does_not_end_it():
    class Closing:
        chat_template, eos_token_id = None, EOS

        def __call__(self, text, **options):
            return {"input_ids": [7, 8, EOS]}

    assert prompt_tokens(Line(where="x:1", domain="a", kind="prompt", content="hi"), Closing()) == [7, 8]


def test_little_data_is_warned_of(tmp_path):
    few, enough = [{"text": "abc", "domain": "few"}] * 4, [{"text": "abc" * 100, "domain": "enough"}] * 5
    warnings = short_data(tokens(read(tmp_path, *few, *enough)))
    assert len(warnings) == 2 and all('"few"' in warning for warning in warnings)
    assert "4 demonstrations" in warnings[0] and "12 tokens" in warnings[1]


# answers


class Counting:
    name, parallel = "counting", 1

    def __init__(self, fail_at=None):
        self.asked, self.fail_at = [], fail_at

    def __call__(self, line):
        if len(self.asked) == self.fail_at:
            raise ValueError("no more")
        self.asked.append(line.content)
        return {"answer": f"answer to {line.content}", "finish_reason": "stop"}


def test_missing_answers_are_generated_once_and_kept_beside_the_file(tmp_path):
    lines = read(tmp_path, {"prompt": "a"}, VALID, {"prompt": "b"}, {"prompt": "c"})
    said = []
    stopped = Counting(fail_at=2)
    with pytest.raises(ValueError, match="no more"):
        fill_answers(lines, stopped, report=said.append)
    assert stopped.asked == ["a", "b"]
    assert said[0].startswith("3 of 4 demonstrations have no answer")
    assert "the first took" in said[1] and "2 more need about" in said[1]

    again = Counting()
    filled = fill_answers(lines, again, report=said.append)
    assert again.asked == ["c"]
    assert [line.answer["content"] for line in filled] == ["answer to a", "4", "answer to b", "answer to c"]
    assert not any(line.missing for line in filled)
    records = [json.loads(text) for text in answers_file(tmp_path / "maths.jsonl").read_text().splitlines()]
    assert [record["of"].rpartition(":")[2] for record in records] == ["1", "3", "4"]
    assert fill_answers(lines, Counting(fail_at=0), report=said.append) == filled  # nothing is asked


def test_another_models_answers_are_not_taken(tmp_path):
    lines = read(tmp_path, {"prompt": "a"})
    fill_answers(lines, Counting(), report=lambda text: None)
    other = Counting()
    other.name = "other"
    fill_answers(lines, other, report=lambda text: None)
    assert other.asked == ["a"]


def test_a_kept_file_that_holds_no_answers_is_refused(tmp_path):
    lines = read(tmp_path, {"prompt": "a"})
    for content in ("nonsense\n", '{"answer": "b"}\n', '{"key": "a", "answer": 3}\n', "[]\n"):
        answers_file(tmp_path / "maths.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"maths\.answers\.jsonl:1: not an answer"):
            fill_answers(lines, Counting())


def test_the_models_own_tokens_are_taken_as_they_are(tmp_path):
    class Own(Counting):
        def __call__(self, line):
            return {"answer": "xy", "answer_ids": [9, 8, 7], "finish_reason": "length"}

    said = []
    (line,) = fill_answers(read(tmp_path, {"prompt": "ab"}), Own(), report=said.append)
    (demo,) = tokens([line])
    assert demo.input_ids[demo.answer_start :] == (9, 8, 7) and demo.answer_start == 2
    assert any("were cut at the limit" in text for text in said)


# a server


class Server(http.server.BaseHTTPRequestHandler):
    """Plays the replies that its server has, in order, then the last one for ever."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, self.headers.get("Authorization"), body))
            replies = self.server.replies
            status, headers, reply = replies.pop(0) if len(replies) > 1 else replies[0]
        content = reply(body) if callable(reply) else reply
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(*replies):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
        server.replies, server.requests, server.lock = list(replies), [], threading.Lock()
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server, f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def chat(body):
    last = body["messages"][-1]["content"]
    return {"choices": [{"message": {"role": "assistant", "content": f"to {last}"}, "finish_reason": "stop"}]}


@pytest.fixture
def no_wait(monkeypatch):
    waited = []
    monkeypatch.setattr(demos.time, "sleep", waited.append)
    return waited


def test_an_endpoint_answers_chats(tmp_path, serve, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    server, url = serve((200, {}, chat))
    endpoint = Endpoint(url + "/", "m", key_variable="A_KEY", max_tokens=7, temperature=0.0, parallel=3)
    asks = {"messages": [{"role": "user", "content": "u"}], "tools": [{"a": 1}]}
    lines = read(tmp_path, *({"prompt": f"p{i}"} for i in range(6)), asks)
    filled = fill_answers(lines, endpoint, report=lambda text: None)
    assert [line.answer["content"] for line in filled] == [*(f"to p{i}" for i in range(6)), "to u"]
    assert len(server.requests) == 7
    path, key, body = server.requests[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body == {
        "model": "m",
        "max_tokens": 7,
        "temperature": 0.0,
        "messages": [{"role": "user", "content": "p0"}],
    }
    assert [body.get("tools") for _, _, body in server.requests if body["messages"][0]["content"] == "u"] == [
        [{"a": 1}]
    ]
    assert "secret" not in answers_file(tmp_path / "maths.jsonl").read_text()


def test_an_endpoint_without_template_completes_text(tmp_path, serve):
    server, url = serve((200, {}, {"choices": [{"text": " four", "finish_reason": "stop"}]}))
    (line,) = fill_answers(read(tmp_path, {"prompt": "p"}), Endpoint(url, "m", chat=False), report=lambda text: None)
    assert line.answer["content"] == " four"
    path, key, body = server.requests[0]
    assert path == "/v1/completions" and key is None and body["prompt"] == "p"


def test_an_endpoint_is_asked_again_when_that_may_help(tmp_path, serve, no_wait):
    server, url = serve(
        (503, {}, b"starting"), (429, {"Retry-After": "7"}, b"slow down"), (200, {}, b"{not json"), (200, {}, chat)
    )
    (line,) = fill_answers(read(tmp_path, {"prompt": "p"}), Endpoint(url, "m"), report=lambda text: None)
    assert line.answer["content"] == "to p" and len(server.requests) == 4
    assert no_wait == [1.0, 7.0, 4.0]


def test_an_endpoint_that_stays_down_or_refuses_is_named(tmp_path, serve, no_wait):
    lines = read(tmp_path, {"prompt": "p"})
    server, url = serve((500, {}, b"broken"))
    with pytest.raises(ValueError, match=r"maths\.jsonl:1: http.* gave no answer in 3 attempts: 500 .*broken"):
        fill_answers(lines, Endpoint(url, "m", attempts=3), report=lambda text: None)
    assert len(server.requests) == 3
    server, url = serve((401, {}, b"who are you"))
    with pytest.raises(ValueError, match=r"refuses: 401 .*who are you"):
        fill_answers(lines, Endpoint(url, "m"), report=lambda text: None)
    assert len(server.requests) == 1
    server, url = serve((200, {}, chat))
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match="gave no answer in 2 attempts"):
        fill_answers(lines, Endpoint(url, "m", attempts=2), report=lambda text: None)
    assert not answers_file(tmp_path / "maths.jsonl").exists()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"error": "no such model"}, "replied no answer: {'error'"),
        ({"choices": []}, "replied no answer"),
        ({"choices": [{"message": {"content": None}, "finish_reason": "length"}]}, "empty answer .*'length'"),
    ],
)
def test_replies_without_an_answer_are_refused(tmp_path, serve, reply, message):
    _, url = serve((200, {}, reply))
    with pytest.raises(ValueError, match=rf"maths\.jsonl:1: .*{message}"):
        fill_answers(read(tmp_path, {"prompt": "p"}), Endpoint(url, "m"), report=lambda text: None)


def test_reasoning_that_a_server_splits_off_is_not_lost(tmp_path, serve):
    message = {"content": "4", "reasoning_content": "two and two"}
    _, url = serve((200, {}, {"choices": [{"message": message}]}))
    (line,) = fill_answers(read(tmp_path, {"prompt": "p"}), Endpoint(url, "m"), report=lambda text: None)
    assert line.answer == message


def test_calls_of_tools_that_a_server_makes_are_answers(tmp_path, serve):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    _, url = serve((200, {}, {"choices": [{"message": {"content": None, "tool_calls": [call]}}]}))
    lines = read(tmp_path, {"messages": [{"role": "user", "content": "u"}]})
    for _ in range(2):  # asked, then read from the file
        (line,) = fill_answers(lines, Endpoint(url, "m"), report=lambda text: None)
        assert line.answer["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}
        assert line.answer["content"] == "" and not line.missing


def test_an_endpoint_that_cannot_be_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="give its address"):
        Endpoint("localhost:8000", "m")
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ValueError, match="environment variable NO_KEY"):
        Endpoint("http://localhost", "m", key_variable="NO_KEY")


# the command line


def arguments(*argv):
    parser = argparse.ArgumentParser()
    demos.add_arguments(parser)
    demos.add_answer_arguments(parser)
    return parser.parse_args(list(argv))


def test_the_command_line_names_files_domains_and_limits(tmp_path):
    first = write_lines(tmp_path / "a.jsonl", *[VALID] * 4)
    second = write_lines(tmp_path / "b.jsonl", *[VALID] * 2)
    args = arguments("--demos", str(first), "--domain", "x", "--demos", str(second), "--domain", "y")
    assert [line.domain for line in demos.lines_of(args)] == ["x"] * 4 + ["y"] * 2
    args = arguments("--demos", str(first), "--demos", str(second), "--max-demos", "3")
    assert [line.domain for line in demos.lines_of(args)] == ["a"] * 3 + ["b"] * 2
    with pytest.raises(ValueError, match="--max-demos 0"):
        demos.lines_of(arguments("--demos", str(first), "--max-demos", "0"))
    with pytest.raises(ValueError, match="--endpoint and --endpoint-model go together"):
        demos.endpoint_of(arguments("--demos", str(first), "--endpoint", "http://x"), None)
    endpoint = demos.endpoint_of(
        arguments("--demos", str(first), "--endpoint", "http://x", "--endpoint-model", "m"), byte_tokenizer(TEMPLATE)
    )
    assert endpoint.url == "http://x" and "without template" not in endpoint.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--answer-tokens", "0"], "--answer-tokens 0: it must be at least 1"),
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--top-p", "0"], "--top-p 0.0: it must be above 0"),
        (["--endpoint-parallel", "0"], "--endpoint-parallel 0"),
        (["--endpoint-timeout", "0"], "--endpoint-timeout 0.0"),
        (["--endpoint-key-variable", "KEY"], "is for --endpoint, which is not given"),
        (["--endpoint-model", "m"], "go together"),
    ],
)
def test_impossible_options_about_answers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        demos.endpoint_of(arguments("--demos", "d.jsonl", *options), None)
