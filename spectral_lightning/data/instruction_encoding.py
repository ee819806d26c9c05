"""From a dialogue to token ids, with a note of which ones belong to an answer."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from spectral_lightning.data.chat import ChatRenderer, Span, UnusableDialogueError
from spectral_lightning.data.instruction_formats import Chat, Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EncodedDialogue(NamedTuple):
    """One example."""

    ids: list[int]
    """Token ids, at most ``sequence_len``."""
    is_answer: list[bool]
    """Whether the token belongs to an answer or ends one."""
    is_cut: bool
    """Whether the end did not fit into ``sequence_len``."""


class DialogueEncoder:
    """Turn dialogues into token ids.

    A pair is the tokens that the tokenizer puts in front of every text (BOS), prompt, answer and
    the end-of-sequence token; a chat is what its template writes, with an end-of-sequence token
    after the last turn if the template ends it with no special token. Prompt and answer are
    tokenized as one text, unless a token would reach from one into the other: a model that is
    prompted never sees such a token, so they are then tokenized apart.

    Args:
        tokenizer: The tokenizer; needs an end-of-sequence token.
        sequence_len: Largest number of tokens of an example.

    Raises:
        ValueError: If the tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", sequence_len: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "`tokenizer` must have an end-of-sequence token, which ends every answer, but"
                f" {tokenizer.name_or_path or type(tokenizer).__name__} has none. Set its"
                " `eos_token`."
            )
        self.tokenizer = tokenizer
        self.sequence_len = sequence_len
        self.chat = ChatRenderer(tokenizer)
        self._eos: int = tokenizer.eos_token_id
        self._lead = _leading_ids(tokenizer)

    def encode(self, dialogue: Pair | Chat) -> EncodedDialogue:
        """Encode one dialogue; what does not fit into ``sequence_len`` is cut off at the end.

        Raises:
            UnusableDialogueError: If nothing can be learnt from it, because it has no answer or
                its prompt leaves no room for one.
        """
        ids, is_answer = (
            self._pair(dialogue) if isinstance(dialogue, Pair) else self._chat(dialogue)
        )
        length = self.sequence_len
        # The first token is never predicted.
        if not any(is_answer[1:length]):
            raise UnusableDialogueError(
                f"whose prompt leaves no room for an answer in `sequence_len` = {length}"
            )
        return EncodedDialogue(ids[:length], is_answer[:length], is_cut=len(ids) > length)

    def _pair(self, pair: Pair) -> tuple[list[int], list[bool]]:
        text = pair.prompt + pair.answer
        ids, is_answer = self._tokens(text, [Span(len(pair.prompt), len(text))])
        lead = self._lead
        return [*lead, *ids, self._eos], [*([False] * len(lead)), *is_answer, True]

    def _chat(self, chat: Chat) -> tuple[list[int], list[bool]]:
        if not chat.messages:
            raise UnusableDialogueError("without a turn of the assistant")
        text, answers, closed = self.chat.render(chat.messages)
        ids, is_answer = self._tokens(text, answers)
        return (ids, is_answer) if closed else ([*ids, self._eos], [*is_answer, True])

    def _tokens(self, text: str, answers: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """Tokenize a text and tell which tokens hold a character of an answer."""
        if not self.tokenizer.is_fast:
            # Without offsets, what is tokenized apart is known to be apart.
            return self._pieces(text, answers, [edge for answer in answers for edge in answer])
        ids, offsets = self._encode(text)
        starts = {start for start, _ in answers}
        if any(low < start < high for low, high in offsets for start in starts):
            return self._pieces(text, answers, [start for start, _ in answers])
        return ids, _overlaps(offsets, answers)

    def _pieces(
        self, text: str, answers: Sequence[Span], cuts: Sequence[int]
    ) -> tuple[list[int], list[bool]]:
        """Tokenize the pieces between the cuts on their own."""
        ids: list[int] = []
        is_answer: list[bool] = []
        for start, stop in pairwise([0, *cuts, len(text)]):
            piece, offsets = self._encode(text[start:stop])
            ids += piece
            shifted = [(low + start, high + start) for low, high in offsets]
            is_answer += _overlaps(shifted, answers)
        return ids, is_answer

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids and the characters they stand for, the whole text for all if unknown."""
        is_fast = self.tokenizer.is_fast
        encoding = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=is_fast, verbose=False
        )
        ids: list[int] = encoding["input_ids"]
        return ids, encoding["offset_mapping"] if is_fast else [(0, len(text))] * len(ids)


def _overlaps(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[bool]:
    """Tell for each token whether it holds a character of a span; both in ascending order."""
    remaining = iter(spans)
    span = next(remaining, None)
    found: list[bool] = []
    for low, high in offsets:
        while span is not None and span.stop <= low:
            span = next(remaining, None)
        found.append(span is not None and low < span.stop and high > span.start)
    return found


def _leading_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return what the tokenizer puts in front of a text, such as BOS."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    lead = next((n for n in range(len(full)) if full[n : n + len(bare)] == bare), 0)
    return list(full[:lead])
