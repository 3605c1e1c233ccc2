# SPDX-License-Identifier: Apache-2.0
"""RULER-style tasks of any length from a seed, and files of whole prompts in RULER's own form."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from uncomp.eval.prompts import Example, encode
from uncomp.eval.reading import Reader, are_strings, is_text
from uncomp.eval.tasks import ruler_lists
from uncomp.eval.tasks.base import Options, Source
from uncomp.eval.tasks.hay import Hay, essays, insert, place
from uncomp.eval.tasks.ruler_lists import Made, draw_words, random_uuid

FRAME = 60  # tokens left for a chat frame
TRIES = 1000  # draws for a key or value that is not there yet
LENGTH = 4096
FILLER = "The lamp is lit. Rain falls on the roof. A dog sleeps by the door. The night goes on."
NEED_DATA = ("qa_1", "qa_2")


@dataclass(frozen=True)
class Retrieval:
    """Counts and kinds of one retrieval task: keys in the text, values of a key, keys that are asked for."""

    hay: str  # "filler", "essay" or "needle"
    key: str = "word"
    value: str = "number"
    keys: int = 1
    values: int = 1
    asked: int = 1


RETRIEVAL = {
    "niah_single_1": Retrieval("filler"),
    "niah_single_2": Retrieval("essay"),
    "niah_single_3": Retrieval("essay", value="uuid"),
    "niah_multikey_1": Retrieval("essay", keys=4),
    "niah_multikey_2": Retrieval("needle"),
    "niah_multikey_3": Retrieval("needle", key="uuid", value="uuid"),
    "niah_multivalue": Retrieval("essay", values=4),
    "niah_multiquery": Retrieval("essay", keys=4, asked=4),
}
LISTS = {"vt": ruler_lists.variables, "cwe": ruler_lists.common_words, "fwe": ruler_lists.frequent_words}
NEW_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50}  # 128 for the others


def read(options: Options, reader: Reader) -> Source:
    """Reads essays where a subset needs them; a subset that is the name of a file under `ruler/` is read from there.

    Raises:
        ValueError: an unknown subset or one whose data are not at hand, no essays, a bad line, a length out of range.
    """
    folder = options.folder("ruler")
    files = {path.stem: path for place in ("ruler", ".") for path in sorted((folder / place).glob("*.jsonl"))}
    for name in options.subsets or ():
        if name in NEED_DATA:
            raise ValueError(f"uncomp eval: {name} needs questions and passages that this task does not generate")
    names = options.chosen("ruler", [*RETRIEVAL, *LISTS, *files], [*RETRIEVAL, *LISTS])
    text = essays(options, reader, "ruler") if any(name not in files for name in names) else ""
    lengths = list(options.lengths or [LENGTH])
    ready = {name: _from_file(name, files[name], options, reader) for name in names if name in files}

    def examples(tokenizer: Any, positions: int) -> list[Example]:
        maker = _Maker(tokenizer, text, options.seed)
        made = []
        for name in names:
            some = list(ready.get(name, ()))
            new = options.max_new_tokens or NEW_TOKENS.get(name, 128)
            for length in lengths if name not in ready else ():
                if length > positions - new:
                    raise ValueError(
                        f"uncomp eval: --length must be at most {positions - new} for {name}, what the model takes; "
                        f"got {length}"
                    )
                some += [maker.example(name, length, i, new) for i in range(options.samples)]
            made += some[: options.limit]
        return made

    settings = {"subsets": names, "lengths": lengths, "samples": options.samples, "seed": options.seed}
    return Source(settings, examples)


def split_question(text: str) -> tuple[str, str, int]:
    """A whole prompt of RULER: what the user says, what the answer begins with, and where the context ends.

    The last line holds the question, up to its question mark, and the beginning of the answer.
    """
    line = text.rfind("\n") + 1
    mark = text.rfind("?", line)
    end = mark + 1 if mark >= 0 else len(text)
    return text[:end], text[end:], line


def _from_file(name: str, path: Any, options: Options, reader: Reader) -> list[Example]:
    made = []
    for number, record in reader.lines(path, {"input": is_text, "outputs": are_strings}, identity="index"):
        said, prefix, context_end = split_question(record["input"])
        if not context_end:
            reader.refuse(path, number, "field 'input' must end in a line with the question")
            continue
        made.append(
            Example(
                task="ruler",
                subset=name,
                id=str(record.get("index", number)),
                text=said,
                context_end=context_end,
                max_new_tokens=options.max_new_tokens or 128,
                metrics=("contained_share",),
                answers=record["outputs"],
                prefix=prefix,
                evidence=record["outputs"],
            )
        )
    return made


class _Maker:
    """Generates examples; essays are tokenised once."""

    def __init__(self, tokenizer: Any, text: str, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.hay = {"essay": Hay(tokenizer, text), "filler": Hay(tokenizer, FILLER)} if text else {}
        self.pool = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)))

    def example(self, name: str, length: int, number: int, new: int) -> Example:
        """The same for the same seed, subset, length and number."""
        room = length - FRAME
        seed = f"{self.seed}:{name}:{length}:{number}"

        def at(size: int) -> Made:
            draw = random.Random(seed)  # the same draws at every size that is tried
            if name in LISTS:
                return LISTS[name](draw, size, self.pool)
            return self._retrieval(RETRIEVAL[name], draw, size)

        made = self._fit(name, length, room, at)
        return Example(
            task="ruler",
            subset=f"{name}_{length}",
            id=str(number),
            text=f"{made.context}\n{made.question}",
            context_end=len(made.context) + 1,
            max_new_tokens=new,
            metrics=("contained_share",),
            answers=made.answers,
            prefix=made.prefix,
            evidence=made.evidence,
            details={"length": length},
        )

    def _fit(self, name: str, length: int, room: int, at: Callable[[int], Made]) -> Made:
        """A size, in tokens of hay, whose whole prompt has at most `room` tokens and not many fewer."""
        if room < 1:
            raise ValueError(f"uncomp eval: --length must be more than {FRAME} for {name}; got {length}")
        best, near = None, max(32, length // 100)
        fits, too_long, size = -1, 4 * room, room  # sizes are about tokens: words of lists have fewer
        for tries in range(24):
            made = at(size)
            spare = room - len(encode(self.tokenizer, f"{made.context}\n{made.question}{made.prefix}")[0])
            if spare >= 0:
                best, fits = made, size
            else:
                too_long = size
            if 0 <= spare <= near or too_long - fits <= 1:
                break
            guess = size + spare - near // 2 if tries < 6 else (fits + too_long) // 2
            size = min(max(guess, fits + 1), too_long - 1)
        if best is None:
            raise ValueError(f"uncomp eval: --length must be longer for {name}; {length} tokens do not hold its text")
        return best

    def _retrieval(self, kind: Retrieval, draw: random.Random, size: int) -> Made:
        taken: set[str] = set()

        def fresh(what: str) -> str:
            for _ in range(TRIES):
                value = self._value(what, draw)
                if value not in taken:
                    taken.add(value)
                    return value
            raise ValueError(
                f"uncomp eval: the essays must have more different words of 4 to 9 letters; {len(self.pool)} do not "
                "make enough pairs"
            )

        pairs = [(fresh(kind.key), [fresh(kind.value) for _ in range(kind.values)]) for _ in range(kind.keys)]
        asked = draw.sample(pairs, kind.asked)
        needles = [_needle(kind.value, key, value) for key, values in pairs for value in values]
        if kind.hay == "needle":
            context = self._among_needles(kind, draw, size, needles, fresh)
        else:
            text, starts = self.hay[kind.hay].cut(size)
            depths = [draw.uniform(0, 100) for _ in needles]
            context = insert(
                text, [(place(text, starts, d), f" {n}") for d, n in zip(depths, needles, strict=True)]
            ).strip()
        several = kind.values * kind.asked > 1
        what = kind.value + ("s" if several else "")
        keys = [key for key, _ in asked]
        listed = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + f", and {keys[-1]}"
        hidden = f"{'Some' if several else 'A'} special magic {what} {'are' if several else 'is'} hidden"
        rest = f"Make sure to memorize it. I will quiz you about the {what} afterwards."
        verb = "are all the" if several else "is the"
        return Made(
            context=f"{hidden} within the following text. {rest}\n{context}",
            question=f"What {verb} special magic {what} for {listed} mentioned in the provided text?",
            prefix=f" The special magic {what} for {listed} mentioned in the provided text "
            + ("are" if several else "is"),
            answers=[value for _, values in asked for value in values],
            evidence=[_needle(kind.value, key, value) for key, values in asked for value in values],
        )

    def _among_needles(
        self,
        kind: Retrieval,
        draw: random.Random,
        size: int,
        needles: Sequence[str],
        fresh: Callable[[str], str],
    ) -> str:
        """Lines of the same form with other keys, as many as `size` tokens hold."""
        one = len(encode(self.tokenizer, needles[0] + "\n")[0])
        lines = [_needle(kind.value, fresh(kind.key), fresh(kind.value)) for _ in range(size // one)]
        for needle in needles:
            lines.insert(draw.randint(0, len(lines)), needle)
        return "\n".join(lines)

    def _value(self, what: str, draw: random.Random) -> str:
        if what == "uuid":
            return random_uuid(draw)
        if what == "number":
            return str(draw.randint(10**6, 10**7 - 1))
        return "-".join(draw_words(draw, self.pool, 2))


def _needle(what: str, key: str, value: str) -> str:
    return f"One of the special magic {what}s for {key} is: {value}."
