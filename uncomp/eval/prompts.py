# SPDX-License-Identifier: Apache-2.0
"""From an example to token ids: chat frame, one tokenisation, one BOS, a cut in the middle, the end of the context.

Source: docs/evaluation.md "Prompts".
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CHAT = ("auto", "on", "off")


@dataclass(frozen=True)
class Example:
    """One question to a model, before it has a tokenizer.

    Fields:
        task, subset, id: which it is; (subset, id) is unique in a run.
        text: the filled template, without a chat frame.
        context_end: characters of `text` up to the end of the context; 0 where there is no context.
        max_new_tokens: the most that is generated.
        metrics: names of `scores.METRICS`; the first is the one that counts.
        answers: references.
        prefix: text that stands behind the generation prompt, as the beginning of the answer.
        chat: whether --chat auto may wrap the text in a chat frame.
        one_line: only the first line of a prediction is scored.
        classes, options: see `metrics.Case`.
        evidence: pieces of the context that hold the answer; whether their tokens stay is counted.
        details: what a report may sort by: length, depth, ...
    """

    task: str
    subset: str
    id: str
    text: str
    context_end: int
    max_new_tokens: int
    metrics: Sequence[str]
    answers: Sequence[str]
    prefix: str = ""
    chat: bool = True
    one_line: bool = False
    classes: Sequence[str] = ()
    options: Sequence[str] = ()
    evidence: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """Token ids of an example.

    Fields:
        ids: of the whole prompt, after the cut.
        boundary: index of the first id that starts after the context; 0 where there is no context.
        cut: ids that the cut in the middle removed.
        evidence: indices of the ids that hold the answer, in front of the boundary.
    """

    ids: Sequence[int]
    boundary: int
    cut: int
    evidence: list[int]


def fill(template: str, values: Mapping[str, str]) -> tuple[str, dict[str, int]]:
    """Puts values into `{name}` fields, each field once; what is put in is not searched for fields.

    Returns:
        the text; and where each value ends in it, in characters.
    """
    parts, ends, last, length = [], {}, 0, 0
    for found in re.finditer(r"\{(\w+)\}", template):
        name = found[1]
        if name not in values or name in ends:
            continue
        parts += [template[last : found.start()], values[name]]
        length += found.start() - last + len(values[name])
        ends[name], last = length, found.end()
    parts.append(template[last:])
    return "".join(parts), ends


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a BOS in front of plain text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a").input_ids[:1]) == [bos]


def encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text without special tokens, and the characters that each stands for.

    Raises:
        ValueError: a tokenizer without offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"uncomp eval: tokenizer must tell offsets (a fast one); got {type(tokenizer).__name__}")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(found.input_ids), list(found.offset_mapping)


def render(tokenizer: Any, example: Example, chat: str) -> tuple[str, int]:
    """The text that is tokenised, and the characters up to the end of its context."""
    template = getattr(tokenizer, "chat_template", None)
    if chat == "on" and not template:
        raise ValueError("uncomp eval: --chat on needs a tokenizer with a chat template; this one has none")
    if chat == "off" or not template or (chat == "auto" and not example.chat):
        return example.text + example.prefix, example.context_end
    turn = [{"role": "user", "content": example.text}]
    framed = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    core = example.text.strip()  # templates may strip what the user says
    start = framed.find(core)
    if start < 0:
        raise ValueError("uncomp eval: the chat template changes the text of the prompt; use --chat off")
    lead = len(example.text) - len(example.text.lstrip())
    end = max(0, min(example.context_end - lead, len(core)))
    return framed + example.prefix, start + end if example.context_end else 0


def build(tokenizer: Any, example: Example, *, chat: str, max_prompt: int, bos: bool) -> Prompt:
    """Token ids of an example.

    Args:
        tokenizer: a fast tokenizer of transformers.
        chat: one of `CHAT`.
        max_prompt: the most ids M; more are cut in the middle: the first M // 2 and the last M - M // 2 stay.
        bos: what `adds_bos` says.
    Raises:
        ValueError: names the example: two BOS, no ids, a cut that takes ids behind the context.
    """
    text, context_end = render(tokenizer, example, chat)
    ids, offsets = encode(tokenizer, text)
    boundary = next((i for i, (start, _) in enumerate(offsets) if start >= context_end), len(ids)) if context_end else 0
    evidence = sorted(_evidence(example.evidence, text[:context_end], offsets[:boundary]))
    if bos and ids[:1] != [tokenizer.bos_token_id]:
        ids, boundary = [tokenizer.bos_token_id, *ids], boundary + 1 if context_end else 0
        evidence = [i + 1 for i in evidence]
    name = f"uncomp eval: {example.subset} {example.id}:"
    if not ids:
        raise ValueError(f"{name} the prompt has no tokens")
    if bos and ids[1:2] == [tokenizer.bos_token_id]:
        raise ValueError(f"{name} the prompt begins with two BOS tokens; use --chat off")
    cut = max(0, len(ids) - max_prompt)
    if cut:
        head = max_prompt // 2
        if context_end and (head == 0 or boundary < head + cut):
            tail = len(ids) - boundary
            raise ValueError(
                f"{name} --max-prompt must leave room for {tail} tokens behind the context and as many before; "
                f"got {max_prompt}"
            )
        ids, boundary = ids[:head] + ids[head + cut :], boundary - cut if context_end else 0
        evidence = [i if i < head else i - cut for i in evidence if i < head or i >= head + cut]
    return Prompt(array("i", ids), boundary, cut, evidence)


def _evidence(pieces: Sequence[str], context: str, offsets: Sequence[tuple[int, int]]) -> set[int]:
    """Ids that overlap with any occurrence of a piece in the context."""
    starts, ends, found = [a for a, _ in offsets], [b for _, b in offsets], set()
    for piece in pieces:
        piece = piece.strip()
        at = context.find(piece) if piece else -1
        while at >= 0:
            found.update(range(bisect_right(ends, at), bisect_left(starts, at + len(piece))))
            at = context.find(piece, at + 1)
    return found
