"""Demonstrations: the worked examples of a domain that say which experts it needs.

A line of ``demos.jsonl`` is a JSON object with one of

    {"prompt": "...", "answer": "..."}        the chat template goes around it where the tokenizer has one
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}    perhaps with "tools"
    {"text": "..."}                           taken as it is
    {"input_ids": [1, 2, ...], "answer_start": 1}    tokens; without answer_start all of them count as answer

and, if it likes, ``domain``. What a demonstration should hold is the prompt and *the model's own* answer, reasoning
included: Dong et al. (arXiv:2504.06792, tables 5 and 6) measure how much a reference answer, a prompt alone or plain
text of the same domain lose. An answer that is missing (``prompt`` alone, or ``messages`` that end before the
assistant's turn) is therefore generated, by the model itself or by a server that speaks OpenAI's protocol, and kept in
a file beside the demonstrations, so that none is generated twice.

A chat template may leave out of an earlier turn what the model wrote there (reasoning, mostly). The answer is the last
turn and is checked to be there; where the template cuts it, its own text follows the generation prompt instead, which
is how the model produced it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ...moe.files import write_text

KINDS = ("prompt", "messages", "text", "input_ids")
REASONING = ("reasoning_content", "reasoning", "thinking")  # what templates and servers call it
FEW_DEMOS, FEW_TOKENS = 5, 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A checked line of a file of demonstrations, not yet tokens.

    Attributes:
        where: ``file:line``, for errors.
        domain: the domain's name.
        kind: one of ``KINDS``.
        content: the prompt, the messages before the answer, the text or the ids.
        answer: the last turn: ``content``, perhaps ``reasoning_content`` or ``tool_calls``; empty where it is missing,
            and for text.
        tools: what the assistant may call, as chat templates and servers take it.
        answer_ids: the answer's tokens, where the model itself generated it.
        answer_start: of ``input_ids``: the first token of the answer.
    """

    where: str
    domain: str
    kind: str
    content: Any
    answer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tools: tuple[Any, ...] = ()
    answer_ids: tuple[int, ...] = ()
    answer_start: int = 0

    @property
    def missing(self) -> bool:
        """Whether an answer must be generated."""
        return self.kind in ("prompt", "messages") and not self.answer and not self.answer_ids

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The turns before the answer."""
        return [{"role": "user", "content": self.content}] if self.kind == "prompt" else list(self.content)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """A demonstration as the model reads it.

    Attributes:
        where, domain: as in ``Line``.
        input_ids: [T] token ids, prompt and answer.
        answer_start: tokens before the answer; 0 where everything counts as answer.
    """

    where: str
    domain: str
    input_ids: tuple[int, ...]
    answer_start: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def digest(self) -> str:
        """Names the demonstration by what it holds."""
        content = json.dumps([self.domain, list(self.input_ids), self.answer_start])
        return hashlib.sha256(content.encode()).hexdigest()


# reading


def pair_domains(files: Sequence[Path], domains: Sequence[str]) -> list[tuple[Path, str | None]]:
    """Which domain each file is of: the names in the order of the files, or none (``domain`` fields, or file names).

    Raises:
        ValueError: some files have a name and others have none.
    """
    if domains and len(domains) != len(files):
        raise ValueError(
            f"{len(files)} --demos and {len(domains)} --domain: give each file its domain, in the same order, or none "
            'and a "domain" field in the lines'
        )
    return list(zip(files, domains or [None] * len(files), strict=True))


def read_lines(files: Sequence[tuple[Path, str | None]]) -> list[Line]:
    """Reads and checks files of demonstrations.

    Args:
        files: (file, domain). Without a domain a line's ``domain`` field says it, else the file's name without suffix.

    Raises:
        ValueError: a line is no JSON object, says nothing, or says two things; a file is empty. Names ``file:line``.
        FileNotFoundError: a file is not there.
    """
    lines = []
    for file, domain in files:
        try:
            content = Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            number = error.object[: error.start].count(b"\n") + 1
            raise ValueError(f"{file}:{number}: not UTF-8 text ({error.reason}): save the file as UTF-8") from None
        found = [
            _read_line(text, f"{file}:{number}", domain, Path(file).stem)
            for number, text in enumerate(content.split("\n"), start=1)
            if text.strip()
        ]
        if not found:
            raise ValueError(
                f'{file}: no demonstrations: one JSON object a line, such as {{"prompt": ..., "answer": ...}}'
            )
        lines += found
    return lines


def _read_line(text: str, where: str, domain: str | None, stem: str) -> Line:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno}): one JSON object a line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON {type(record).__name__}: each line must be an object with {_one_of(KINDS)}")
    kinds = [kind for kind in KINDS if kind in record]
    if len(kinds) != 1:
        given = f"has {' and '.join(kinds)}" if kinds else f"has {', '.join(map(repr, record)) or 'nothing'}"
        raise ValueError(f"{where}: {given}: each line must have one of {_one_of(KINDS)}")
    own = record.get("domain", domain if domain is not None else stem)
    if not isinstance(own, str) or not own:
        raise ValueError(f'{where}: "domain" is {own!r}: it must be a name')
    if domain is not None and own != domain:
        raise ValueError(f'{where}: the line says domain "{own}", the command "{domain}": leave one of them out')
    kind = kinds[0]
    read = {"prompt": _read_prompt, "messages": _read_messages, "text": _read_text, "input_ids": _read_ids}[kind]
    return Line(where=where, domain=own, kind=kind, **read(record, where))


def _read_prompt(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    answer = record.get("answer")
    return {
        "content": _text(record, "prompt", where),
        "answer": {} if answer is None else {"content": _text(record, "answer", where)},
    }


def _read_messages(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: "messages" must be a list of {{"role": ..., "content": ...}}, and not empty')
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'{where}: message {position} has no "role": each is {{"role": ..., "content": ...}}')
    tools = record.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(
            f'{where}: "tools" must be a list of descriptions of functions, as the chat template takes them'
        )
    if messages[-1]["role"] != "assistant":
        return {"content": tuple(messages), "tools": tuple(tools)}
    if len(messages) == 1:
        raise ValueError(f"{where}: only the assistant speaks: put the user's message before its answer")
    last, place = messages[-1], f"{where}: message {len(messages) - 1}"
    answer = {"tool_calls": last["tool_calls"], "content": last.get("content") or ""} if last.get("tool_calls") else {}
    if not answer or answer["content"]:
        answer["content"] = _text(last, "content", place)
    for name in REASONING:
        if last.get(name):
            answer["reasoning_content"] = _text(last, name, place)
    return {"content": tuple(messages[:-1]), "answer": answer, "tools": tuple(tools)}


def _read_text(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"content": _text(record, "text", where)}


def _read_ids(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    ids, start = record["input_ids"], record.get("answer_start", 0)
    if not isinstance(ids, list) or not ids:
        raise ValueError(f'{where}: "input_ids" must be a list of token ids, and not empty')
    wrong = next((i for i in ids if not isinstance(i, int) or isinstance(i, bool)), None)
    if wrong is not None:
        raise ValueError(f'{where}: "input_ids" holds {wrong!r}: token ids are whole numbers, one sequence a line')
    if not isinstance(start, int) or isinstance(start, bool) or not 0 <= start < len(ids):
        raise ValueError(f'{where}: "answer_start" is {start!r}: it must be from 0 to {len(ids) - 1}')
    return {"content": tuple(ids), "answer_start": start}


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    text = record.get(field)
    if not isinstance(text, str):
        raise ValueError(f'{where}: "{field}" is {_short(text)}: it must be text')
    if not text.strip():
        raise ValueError(f'{where}: "{field}" is empty: a demonstration needs text')
    return text


def _one_of(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names[:-1]) + f' or "{names[-1]}"'


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# tokens


def tokenise(
    lines: Sequence[Line],
    tokenizer: Any,
    *,
    vocab_size: int,
    context: int | None = None,
    truncate: bool = False,
    template: bool = True,
) -> list[Demo]:
    """Turns lines that have their answers into tokens.

    Args:
        tokenizer: of transformers; may be None where all lines are ``input_ids``.
        vocab_size: rows of the model's embedding.
        context: most tokens that the model takes.
        truncate: cuts a longer demonstration after ``context`` tokens rather than refuse it.
        template: puts the chat template, where there is one, around ``prompt`` and ``answer``.

    Raises:
        ValueError: an id that the model has no row for, a demonstration that is too long, a template that refuses or
            is missing. Names ``file:line``.
    """
    return [
        _fit(line, *_tokens(line, tokenizer, template), vocab_size=vocab_size, context=context, truncate=truncate)
        for line in lines
    ]


def prompt_tokens(line: Line, tokenizer: Any, *, template: bool = True) -> list[int]:
    """[P] what the model continues with its answer."""
    if tokenizer is None:
        raise ValueError(f"{line.where}: text, but the model has no tokenizer: give input_ids")
    if _templated(line, tokenizer, template):
        return _encode(tokenizer, _render(line, tokenizer, line.messages, add_generation_prompt=True))
    ids = list(tokenizer(line.content)["input_ids"])
    # a tokenizer that closes what it reads would end the prompt before its answer
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _templated(line: Line, tokenizer: Any, template: bool) -> bool:
    has = getattr(tokenizer, "chat_template", None) is not None
    if line.kind == "messages" and not has:
        raise ValueError(
            f'{line.where}: "messages", but the tokenizer has no chat template: give "prompt" and "answer"'
        )
    return line.kind == "messages" or (has and template)


def _tokens(line: Line, tokenizer: Any, template: bool) -> tuple[list[int], int]:
    """The ids, and where the answer starts."""
    if line.kind == "input_ids":
        return list(line.content), line.answer_start
    if tokenizer is None:
        raise ValueError(f"{line.where}: text, but the model has no tokenizer: give input_ids")
    if line.kind == "text":
        return list(tokenizer(line.content)["input_ids"]), 0
    prompt = prompt_tokens(line, tokenizer, template=template)
    if line.answer_ids:
        return prompt + list(line.answer_ids), len(prompt)
    if _templated(line, tokenizer, template):
        return _chat_tokens(line, tokenizer)
    return prompt + _close(_encode(tokenizer, line.answer["content"]), tokenizer), len(prompt)


def _chat_tokens(line: Line, tokenizer: Any) -> tuple[list[int], int]:
    before = _render(line, tokenizer, line.messages, add_generation_prompt=True)
    prompt = _encode(tokenizer, before)
    for answer in _spellings(line.answer):
        whole = _render(line, tokenizer, [*line.messages, {"role": "assistant", **answer}])
        turn = whole[len(before) :] if whole.startswith(before) else ""
        if turn and all(part.strip() in turn for part in answer.values() if isinstance(part, str)):
            return prompt + _encode(tokenizer, turn), len(prompt)
    for apart in ("reasoning_content", "tool_calls"):
        if apart in line.answer:
            raise ValueError(
                f'{line.where}: the chat template leaves the answer\'s "{apart}" out, or changes what comes before: '
                'write it into "content", as the model does'
            )
    answer = line.answer["content"]
    if before.rstrip().endswith("<think>"):  # the generation prompt opened it already
        answer = answer.removeprefix("<think>").lstrip("\n")
    return prompt + _close(_encode(tokenizer, answer), tokenizer), len(prompt)


def _spellings(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answer with its reasoning under each name that a template may know it by."""
    rest = {name: part for name, part in answer.items() if name != "reasoning_content"}
    if rest.keys() == answer.keys():
        return [rest]
    return [{**rest, name: answer["reasoning_content"]} for name in REASONING]


def _render(line: Line, tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, tools=list(line.tools) or None, **options)
    except Exception as error:  # templates raise what they like
        raise ValueError(f"{line.where}: the chat template refuses these messages: {error}") from None


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _close(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _fit(line: Line, ids: list[int], start: int, *, vocab_size: int, context: int | None, truncate: bool) -> Demo:
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise ValueError(
            f"{line.where}: token id {wrong}, but the model knows 0 to {vocab_size - 1}: these are tokens of another "
            "tokenizer"
        )
    if context is not None and len(ids) > context:
        if not truncate:
            raise ValueError(
                f"{line.where}: {len(ids)} tokens, but the model's context is {context}: shorten it, or cut it with "
                "--truncate"
            )
        ids = ids[:context]
    if len(ids) < 2:
        raise ValueError(f"{line.where}: {len(ids)} token: a demonstration needs at least 2")
    if start >= len(ids):
        raise ValueError(f"{line.where}: the prompt alone fills the context of {context} tokens: shorten it")
    return Demo(where=line.where, domain=line.domain, input_ids=tuple(ids), answer_start=start)


def short_data(demos: Sequence[Demo]) -> list[str]:
    """Warnings, one sentence each: domains with too little to choose experts by."""
    warnings = []
    for domain in dict.fromkeys(demo.domain for demo in demos):
        own = [demo for demo in demos if demo.domain == domain]
        tokens = sum(map(len, own))
        if len(own) < FEW_DEMOS:
            warnings.append(
                f'domain "{domain}" has {len(own)} demonstration{"s" * (len(own) != 1)}: the choice settles at about '
                "25, and fewer than 5 can miss what the domain needs"
            )
        if tokens < FEW_TOKENS:
            warnings.append(f'domain "{domain}" has {tokens} tokens: usual are 30,000 to 300,000')
    return warnings


# answers


class Generator(Protocol):
    """Answers a line. ``name`` is part of what an answer is kept under; ``parallel`` how many may be asked at once."""

    name: str
    parallel: int

    def __call__(self, line: Line) -> dict[str, Any]:
        """``answer`` (text), and perhaps ``reasoning_content``, ``answer_ids``, ``finish_reason``."""
        ...


class Endpoint:
    """A server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, a hosted one.

    Args:
        url: what ``/chat/completions`` and ``/completions`` follow: ``http://localhost:8000/v1``.
        model: as the server calls it.
        key_variable: the environment variable that holds the key; none is sent without.
        max_tokens, temperature, top_p: of the answer; None leaves it to the server.
        chat: False sends prompts as they are, for models without a chat template.
        timeout: seconds for one answer.
        attempts: tries for one answer; what a later one may mend (no connection, 408, 429, 5xx) is tried again after
            1, 2, 4 ... seconds, or what the server's Retry-After says.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str | None = None,
        max_tokens: int = 4096,
        temperature: float | None = None,
        top_p: float | None = None,
        chat: bool = True,
        timeout: float = 600.0,
        attempts: int = 5,
        parallel: int = 4,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint {url!r}: give its address, such as http://localhost:8000/v1")
        if key_variable is not None and not os.environ.get(key_variable):
            raise ValueError(f"the environment variable {key_variable}, which should hold the endpoint's key, is empty")
        self.url = url.rstrip("/")
        self.model = model
        self.parallel = parallel
        self._key_variable = key_variable
        self._chat = chat
        self._timeout = timeout
        self._attempts = attempts
        given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
        self._options = {name: value for name, value in given.items() if value is not None}
        self.name = f"{self.model} {json.dumps(self._options, sort_keys=True)}{'' if chat else ' without template'}"

    def __call__(self, line: Line) -> dict[str, Any]:
        body = {"model": self.model, **self._options}
        if self._chat or line.kind == "messages":
            path, body["messages"] = "/chat/completions", line.messages
            if line.tools:
                body["tools"] = list(line.tools)
        else:
            path, body["prompt"] = "/completions", line.content
        reply = self._post(path, body, line.where)
        try:
            choice = reply["choices"][0]
            message = choice["message"] if "message" in choice else {"content": choice["text"]}
            answer, reasoning = message.get("content"), next(filter(None, map(message.get, REASONING)), None)
            calls = message.get("tool_calls")
        except (LookupError, TypeError, AttributeError):
            raise ValueError(f"{line.where}: {self.url} replied no answer: {_short(reply)}") from None
        if not calls and (not answer or not answer.strip()):
            raise ValueError(
                f"{line.where}: {self.url} replied an empty answer (finish_reason {choice.get('finish_reason')!r}): "
                "allow more tokens with --answer-tokens, or write the answer into the file"
            )
        kept = {"answer": answer or "", "finish_reason": choice.get("finish_reason")}
        if reasoning:
            kept["reasoning_content"] = reasoning
        if calls:
            kept["tool_calls"] = [_parsed(call) for call in calls]
        return kept

    def _post(self, path: str, body: Mapping[str, Any], where: str) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ[self._key_variable]}"
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        for attempt in range(self._attempts):
            wait = float(2**attempt)
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                detail = error.read(300).decode(errors="replace")
                problem = f"{error.code} {error.reason} {detail}".strip()
                if error.code not in (408, 425, 429) and error.code < 500:
                    raise ValueError(f"{where}: {self.url} refuses: {problem}") from None
                after = error.headers.get("Retry-After", "")
                wait = float(after) if after.isdigit() else wait
            except (urllib.error.URLError, TimeoutError, ConnectionError, json.JSONDecodeError) as error:
                problem = str(getattr(error, "reason", error))
            if attempt + 1 < self._attempts:
                time.sleep(min(wait, 60.0))
        raise ValueError(
            f"{where}: {self.url} gave no answer in {self._attempts} attempts: {problem}. Answers so far are kept; run "
            "the same command again to go on"
        )


def _parsed(call: Any) -> Any:
    """A call whose arguments are an object, as chat templates take them; the protocol sends them as text."""
    try:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (LookupError, TypeError, ValueError):
        return call


class ModelGenerator:
    """The model itself, by its own generation settings.

    Args:
        model, tokenizer: of transformers.
        name: of the model: a digest of its configuration and weights.
        max_tokens: of the answer.
        temperature, top_p: None leaves it to the model's generation_config; temperature 0 is greedy.
        template: as in ``tokenise``.
        seed: of the sampling; each demonstration starts from it, so that an answer does not depend on the others.
    """

    parallel = 1

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        max_tokens: int = 4096,
        temperature: float | None = None,
        top_p: float | None = None,
        template: bool = True,
        context: int | None = None,
        seed: int = 0,
    ) -> None:
        self._model, self._tokenizer, self._template, self._context = model, tokenizer, template, context
        self._max_tokens, self._seed = max_tokens, seed
        self._options: dict[str, Any] = {} if temperature is None else {"do_sample": temperature > 0}
        if temperature:
            self._options["temperature"] = temperature
        if top_p is not None:
            self._options["top_p"] = top_p
        options = {**self._options, "max_tokens": max_tokens, "seed": seed, "template": template}
        self.name = f"{name} {json.dumps(options, sort_keys=True)}"

    def __call__(self, line: Line) -> dict[str, Any]:
        import torch

        prompt = prompt_tokens(line, self._tokenizer, template=self._template)
        room = self._max_tokens if self._context is None else min(self._max_tokens, self._context - len(prompt))
        if room < 1:
            raise ValueError(
                f"{line.where}: the prompt has {len(prompt)} tokens, which leaves no room for an answer in a context "
                f"of {self._context}: shorten it"
            )
        ids = torch.tensor([prompt], device=self._model.device)
        pad = self._tokenizer.pad_token_id
        with torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []), torch.no_grad():
            torch.manual_seed(self._seed)
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                pad_token_id=self._tokenizer.eos_token_id if pad is None else pad,
                **self._options,
            )
        answer = out[0, len(prompt) :].tolist()
        return {
            "answer": self._tokenizer.decode(answer, skip_special_tokens=True),
            "answer_ids": answer,
            "finish_reason": "length" if len(answer) >= room else "stop",
        }


def answers_file(demos: Path) -> Path:
    """Where generated answers lie: ``demos.answers.jsonl`` beside ``demos.jsonl``."""
    return demos.with_name(f"{demos.stem}.answers.jsonl")


def fill_answers(
    lines: Sequence[Line],
    generator: Generator,
    *,
    report: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> list[Line]:
    """Gives every line its answer: what lies beside the demonstrations, else what the generator writes.

    Each answer is on disk before the next is counted; the file is replaced whole. The expected time is reported once
    the first is there.

    Raises:
        ValueError: the generator refuses, or the file of answers does not hold answers.
    """
    kept = {file: _read_answers(file) for file in {_answers_of(line) for line in lines if line.missing}}
    wanted = [line for line in lines if line.missing and _key(line, generator) not in kept[_answers_of(line)]]

    def keep(line: Line, answer: dict[str, Any], seconds: float) -> None:
        file = _answers_of(line)
        key = _key(line, generator)
        kept[file][key] = {"key": key, "of": line.where, "by": generator.name, **answer, "seconds": round(seconds, 3)}
        write_text(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept[file].values()))

    if wanted:
        start = time.monotonic()
        report(f"{len(wanted)} of {len(lines)} demonstrations have no answer; generating the first")
        answers = _generate(wanted, generator)
        keep(*next(answers))
        first = time.monotonic() - start
        if len(wanted) > 1:
            about = first * (len(wanted) - 1) / min(generator.parallel, len(wanted) - 1)
            report(f"the first took {duration(first)}; {len(wanted) - 1} more need about {duration(about)}")
        for number, answer in enumerate(answers, start=2):
            keep(*answer)
            report(f"answer {number} of {len(wanted)}, {duration(time.monotonic() - start)}")
    filled = [_filled(line, kept[_answers_of(line)][_key(line, generator)]) if line.missing else line for line in lines]
    cut = sum(
        kept[_answers_of(line)][_key(line, generator)].get("finish_reason") == "length"
        for line in lines
        if line.missing
    )
    if cut:
        report(f"warning: {cut} generated answers were cut at the limit: allow more with --answer-tokens")
    return filled


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _generate(lines: Sequence[Line], generator: Generator) -> Iterator[tuple[Line, dict[str, Any], float]]:
    def one(line: Line) -> tuple[Line, dict[str, Any], float]:
        start = time.monotonic()
        return line, generator(line), time.monotonic() - start

    yield one(lines[0])  # alone: its time is the measure
    if generator.parallel == 1:
        yield from map(one, lines[1:])
        return
    pool = concurrent.futures.ThreadPoolExecutor(generator.parallel)
    try:
        for future in concurrent.futures.as_completed([pool.submit(one, line) for line in lines[1:]]):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _filled(line: Line, record: Mapping[str, Any]) -> Line:
    answer = {"content": record["answer"]}
    answer |= {name: record[name] for name in ("reasoning_content", "tool_calls") if record.get(name)}
    return dataclasses.replace(line, answer=answer, answer_ids=tuple(record.get("answer_ids", ())))


def _answers_of(line: Line) -> Path:
    return answers_file(Path(line.where.rpartition(":")[0]))


def _key(line: Line, generator: Generator) -> str:
    """An answer belongs to its prompt and to who wrote it."""
    asked = [generator.name, line.messages, line.tools]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _read_answers(file: Path) -> dict[str, dict[str, Any]]:
    if not file.exists():
        return {}
    records = {}
    for number, text in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not text:
            continue
        try:
            record = json.loads(text)
            records[record["key"]] = record
            if not isinstance(record["answer"], str):
                raise TypeError
        except (json.JSONDecodeError, LookupError, TypeError):
            raise ValueError(f"{file}:{number}: not an answer that was kept: delete the line, or the file") from None
    return records


# the command line


def add_arguments(parser: argparse.ArgumentParser, flag: str = "--demos") -> None:
    """What every command that reads demonstrations takes."""
    group = parser.add_argument_group("demonstrations" if flag == "--demos" else "data")
    group.add_argument(
        flag,
        dest="demos",
        type=Path,
        action="append",
        default=[],
        required=flag == "--demos",
        metavar="FILE",
        help='JSON lines with "prompt" and "answer", "messages", "text" or "input_ids"; may be repeated',
    )
    group.add_argument(
        "--domain",
        action="append",
        default=[],
        metavar="NAME",
        help="of the file in the same place; otherwise each line's \"domain\", or the file's name",
    )
    group.add_argument("--max-demos", type=int, metavar="N", help="the first N of each domain")
    group.add_argument("--truncate", action="store_true", help="cut what is longer than the context, not refuse it")
    group.add_argument("--no-template", action="store_true", help="no chat template around prompt and answer")


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """Who writes missing answers."""
    answers = parser.add_argument_group("missing answers")
    answers.add_argument("--endpoint", metavar="URL", help="a server with OpenAI's protocol: http://localhost:8000/v1")
    answers.add_argument("--endpoint-model", metavar="NAME", help="what the server calls the model")
    answers.add_argument("--endpoint-key-variable", metavar="NAME", help="environment variable that holds the key")
    answers.add_argument("--endpoint-timeout", type=float, default=600.0, metavar="SECONDS", help="for one answer")
    answers.add_argument("--endpoint-parallel", type=int, default=4, metavar="N", help="answers asked for at once")
    answers.add_argument("--answer-tokens", type=int, default=4096, metavar="N", help="most tokens of an answer")
    answers.add_argument("--temperature", type=float, metavar="T", help="otherwise as the model's own settings say")
    answers.add_argument("--top-p", type=float, metavar="P", help="otherwise as the model's own settings say")


def lines_of(args: argparse.Namespace) -> list[Line]:
    """The lines that the command names, at most ``--max-demos`` a domain."""
    if args.max_demos is not None and args.max_demos < 1:
        raise ValueError(f"--max-demos {args.max_demos}: it must be at least 1")
    return first_of_each(read_lines(pair_domains(args.demos, args.domain)), args.max_demos)


def first_of_each(lines: Sequence[Line], number: int | None) -> list[Line]:
    """At most ``number`` lines of each domain, in their order."""
    seen: dict[str, int] = {}
    kept = []
    for line in lines:
        seen[line.domain] = seen.get(line.domain, 0) + 1
        if number is None or seen[line.domain] <= number:
            kept.append(line)
    return kept


def endpoint_of(args: argparse.Namespace, tokenizer: Any) -> Endpoint | None:
    """The server that the command names, if any.

    Raises:
        ValueError: an option about answers that cannot be.
    """
    for option, value, fine, allowed in (
        ("--answer-tokens", args.answer_tokens, args.answer_tokens > 0, "at least 1"),
        ("--temperature", args.temperature, (args.temperature or 0) >= 0, "from 0, which is greedy"),
        ("--top-p", args.top_p, args.top_p is None or 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("--endpoint-parallel", args.endpoint_parallel, args.endpoint_parallel > 0, "at least 1"),
        ("--endpoint-timeout", args.endpoint_timeout, args.endpoint_timeout > 0, "above 0"),
    ):
        if not fine:
            raise ValueError(f"{option} {value}: it must be {allowed}")
    if (args.endpoint is None) != (args.endpoint_model is None):
        raise ValueError("--endpoint and --endpoint-model go together")
    if args.endpoint is None:
        if args.endpoint_key_variable is not None:
            raise ValueError("--endpoint-key-variable is for --endpoint, which is not given")
        return None
    return Endpoint(
        args.endpoint,
        args.endpoint_model,
        key_variable=args.endpoint_key_variable,
        max_tokens=args.answer_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        chat=not args.no_template and getattr(tokenizer, "chat_template", None) is not None,
        timeout=args.endpoint_timeout,
        parallel=args.endpoint_parallel,
    )
