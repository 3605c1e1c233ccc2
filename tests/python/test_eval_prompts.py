# SPDX-License-Identifier: Apache-2.0
"""Prompts of an evaluation: filled once, tokenised once, cut in the middle, with the end of the context known."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from uncomp.eval.prompts import Example, adds_bos, build, fill
from uncomp.testing import tiny_tokenizer

CHAT = "{% for m in messages %}<s>[{{ m.content | trim }}]{% endfor %}{% if add_generation_prompt %}>>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def example(context="abcdefgh", question="why?", **given):
    text, ends = fill("\n{context}|{input}", {"context": context, "input": question})
    values = {"task": "t", "subset": "s", "id": "1", "max_new_tokens": 4, "metrics": ("qa_f1",), "answers": ["a"]}
    return Example(text=text, context_end=ends["context"], **{**values, **given})


def shown(tokenizer, prompt):
    return tokenizer.decode(list(prompt.ids))


def make(tokenizer, made, most=1000, chat="auto", bos=False):
    return build(tokenizer, made, chat=chat, max_prompt=most, bos=bos)


def test_fill_puts_in_once_and_searches_nothing_that_was_put_in():
    text, ends = fill("{a}-{b}-{c}", {"a": "{b}", "b": "{a}"})
    assert text == "{b}-{a}-{c}"
    assert ends == {"a": 3, "b": 7}


def test_boundary_is_the_first_id_behind_the_context(tokenizer):
    prompt = make(tokenizer, example())
    assert shown(tokenizer, prompt) == "\nabcdefgh|why?"
    assert tokenizer.decode(list(prompt.ids)[prompt.boundary :]) == "|why?"
    assert prompt.cut == 0


def test_cut_in_the_middle(tokenizer):
    """The first M // 2 ids and the last M - M // 2 stay; the boundary moves with them."""
    prompt = make(tokenizer, example(), most=11)
    assert shown(tokenizer, prompt) == "\nabcd" + "h|why?"
    assert prompt.cut == 3
    assert tokenizer.decode(list(prompt.ids)[prompt.boundary :]) == "|why?"


@pytest.mark.parametrize("most", [8, 2, 1])
def test_a_cut_must_not_reach_the_question(tokenizer, most):
    with pytest.raises(ValueError, match=rf"^uncomp eval: s 1: --max-prompt must leave room .*; got {most}$"):
        make(tokenizer, example(), most=most)


def test_answer_tokens_are_found_and_move_with_the_cut(tokenizer):
    made = example(context="abXYcdXY", evidence=["XY"])
    assert make(tokenizer, made).evidence == [3, 4, 7, 8]
    cut = make(tokenizer, made, most=11)  # ids 5 to 7 are gone
    assert cut.evidence == [3, 4, 5] and tokenizer.decode(list(cut.ids))[5] == "Y"


def test_chat_frame(tokenizer, monkeypatch):
    """The text is found in the frame though the template strips it; what the answer begins with stands behind."""
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    prompt = make(tokenizer, example(prefix="It is"))
    assert shown(tokenizer, prompt) == "<s>[abcdefgh|why?]>>It is"
    assert tokenizer.decode(list(prompt.ids)[prompt.boundary :]) == "|why?]>>It is"
    assert shown(tokenizer, make(tokenizer, example(chat=False))) == "\nabcdefgh|why?"
    assert shown(tokenizer, make(tokenizer, example(), chat="off")) == "\nabcdefgh|why?"
    assert shown(tokenizer, make(tokenizer, example(chat=False), chat="on")) == "<s>[abcdefgh|why?]>>"


def test_one_bos(tokenizer, monkeypatch):
    assert not adds_bos(tokenizer)
    prompt = make(tokenizer, example(evidence=["ab"]), bos=True)
    assert prompt.ids[0] == tokenizer.bos_token_id and prompt.evidence == [2, 3]
    assert tokenizer.decode(list(prompt.ids)[prompt.boundary :]) == "|why?"
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    assert list(make(tokenizer, example(), bos=True).ids).count(tokenizer.bos_token_id) == 1
    monkeypatch.setattr(tokenizer, "chat_template", "<s>" + CHAT)
    with pytest.raises(ValueError, match=r"^uncomp eval: s 1: the prompt begins with two BOS tokens"):
        make(tokenizer, example(), bos=True)


def test_refused(tokenizer, monkeypatch):
    with pytest.raises(ValueError, match=r"^uncomp eval: --chat on needs a tokenizer with a chat template"):
        make(tokenizer, example(), chat="on")
    monkeypatch.setattr(tokenizer, "chat_template", "nothing")
    with pytest.raises(ValueError, match=r"^uncomp eval: the chat template changes the text"):
        make(tokenizer, example())


def test_no_context(tokenizer):
    """Where a task has none, the boundary is 0 and any cut is allowed."""
    made = Example("t", "s", "1", "abcdef", 0, 4, ("qa_f1",), ["a"])
    prompt = make(tokenizer, made, most=3)
    assert (shown(tokenizer, prompt), prompt.boundary, prompt.cut) == ("aef", 0, 3)
