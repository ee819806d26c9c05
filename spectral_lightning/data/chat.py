r"""Chats as text: a chat template, and where in its text the assistant's turns stand.

Turning text into tokens is the matter of `instruction_encoding`.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from spectral_lightning.data.instruction_formats import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "Assistant:{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
r"""For tokenizers without a template: ``"User: Hi\nAssistant: Hello</s>\n"``, BOS in front.

Assign it to ``tokenizer.chat_template`` to prompt a model that was trained with it.
"""

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Private-use characters, so that no text and no template spells a marker.
_MARKER = "\ue000{}\ue001"
_NO_TURN = "in which the chat template writes no turn of the assistant"
_MARKERS = re.compile("\ue000(\\d+)\ue001")


class UnusableDialogueError(Exception):
    """A dialogue that cannot be trained on; the text says why, after "examples"."""


class Span(NamedTuple):
    """Characters ``start`` to ``stop`` (exclusive) of a text."""

    start: int
    stop: int


class RenderedChat(NamedTuple):
    """A chat as one text."""

    text: str
    """The text, with the special tokens the template writes."""
    answers: list[Span]
    """Where the assistant's turns stand, with the token that ends each."""
    closed: bool
    """Whether a special token ends the last turn."""


class _Slot(NamedTuple):
    """Where a template puts the content of one message."""

    message: int  # its index
    header: str  # what stands before, since the content before; of an answer, what it is given
    closing: str  # what stands after and belongs to the turn


class ChatRenderer:
    """Write chats with a tokenizer's chat template and find the assistant's turns in the text.

    A template with ``{% generation %}`` tags says where they stand. For others they are found by
    writing a chat of the same roles with a marker for every message, which shows the text around
    each. A turn starts where the template's generation prompt ends, so that what a reasoning
    template opens a turn with is trained on, and ends with the special token that closes it.

    Args:
        tokenizer: Its template, or `PLAIN_CHAT_TEMPLATE` if it has none, and its special tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        has_template = tokenizer.chat_template is not None
        self.template = tokenizer.get_chat_template() if has_template else PLAIN_CHAT_TEMPLATE
        self._tagged = _GENERATION_TAG.search(self.template) is not None
        self._tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        special = [token.content for token in tokenizer.added_tokens_decoder.values()]
        special = sorted(filter(str.strip, [*special, *self._tokens.values()]), key=len)
        self._special = re.compile("|".join(map(re.escape, reversed(special))) or r"(?!)")
        self._layouts: dict[tuple[str, ...], tuple[list[_Slot], str]] = {}

    def render(self, messages: Sequence[Message]) -> RenderedChat:
        """Write one chat that ends with the assistant.

        Raises:
            UnusableDialogueError: If the template refuses it or hides where its turns stand.
        """
        if self._tagged:
            return self._close_blocks(*self._render(messages, tagged=True))
        text, _ = self._render(messages)
        return self._find_answers(text, messages)

    def _render(
        self, messages: Iterable[Message], *, tagged: bool = False, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        # Rather than `apply_chat_template`, whose mask of tokens covers all that follows a turn
        # that ends in a character without a token of its own.
        options: dict[str, Any] = {"return_assistant_tokens_mask": tagged, **self._tokens}
        try:
            rendered: Any = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self.template,
                add_generation_prompt=prompt,
                **options,
            )
        except TemplateError as error:
            raise UnusableDialogueError(f"that the chat template refuses ({error})") from error
        (text,), blocks = rendered
        return text, [Span(*block) for block in blocks[0]] if tagged else []

    def _close_blocks(self, text: str, blocks: list[Span]) -> RenderedChat:
        """Add the token that ends a turn to blocks that the template closes before it."""
        if not blocks:
            raise UnusableDialogueError(_NO_TURN)
        last = blocks[-1]
        if self._ends_special(text[slice(*last)]):
            return RenderedChat(text, blocks, closed=True)
        follows = self._special.match(text, last.stop)
        closing = follows.group() if follows else ""
        answers = [
            Span(start, stop + len(closing) if text.startswith(closing, stop) else stop)
            for start, stop in blocks
        ]
        return RenderedChat(text, answers, closed=closing != "")

    def _ends_special(self, text: str) -> bool:
        return any(match.end() == len(text.rstrip()) for match in self._special.finditer(text))

    def _find_answers(self, text: str, messages: Sequence[Message]) -> RenderedChat:
        slots, end = self._layout(tuple(message["role"] for message in messages))
        answers: list[Span] = []
        start = cursor = 0
        previous: _Slot | None = None
        for slot in [*slots, None]:
            # What follows the last message is looked for at the end of the text.
            at = text.find(slot.header, cursor) if slot else len(text) - len(end)
            if at < cursor or (slot is None and not text.endswith(end)):
                raise UnusableDialogueError(
                    "in which the chat template hides where the answers stand (mark them in the"
                    " template with {% generation %} tags)"
                )
            if previous and messages[previous.message]["role"] == "assistant":
                answers.append(Span(start, at + len(previous.closing)))
            if slot:
                start = at + len(slot.header)
                content = messages[slot.message]["content"]
                # Step over the content, which may itself spell what stands after it.
                begin = start + len(text[start:]) - len(text[start:].lstrip())
                spelt = ((content, start), (content.strip(), begin))
                known = (at + len(part) for part, at in spelt if text.startswith(part, at))
                cursor = next(known, start)
            previous = slot
        if not answers:
            raise UnusableDialogueError(_NO_TURN)
        return RenderedChat(text, answers, closed=self._ends_special(text[slice(*answers[-1])]))

    def _layout(self, roles: tuple[str, ...]) -> tuple[list[_Slot], str]:
        """Return the text around each message of a chat with these roles, and at its end."""
        if roles not in self._layouts:
            marked: list[Message] = [
                {"role": role, "content": _MARKER.format(index)} for index, role in enumerate(roles)
            ]
            pieces = _MARKERS.split(self._render(marked)[0])
            indices, texts = list(map(int, pieces[1::2])), pieces[0::2]
            prompt = self._generation_prompt()
            slots = []
            for index, (before, after) in zip(indices, pairwise(texts), strict=True):
                if roles[index] == "assistant":
                    closing = self._closing(after, texts[-1])
                    slots.append(_Slot(index, _given(before, prompt), closing))
                else:
                    slots.append(_Slot(index, before, ""))
            self._layouts[roles] = slots, texts[-1]
        return self._layouts[roles]

    def _generation_prompt(self) -> str:
        messages: list[Message] = [{"role": "user", "content": _MARKER.format(0)}]
        without, with_prompt = self._render(messages)[0], self._render(messages, prompt=True)[0]
        return with_prompt[len(without) :] if with_prompt.startswith(without) else ""

    def _closing(self, after: str, end: str) -> str:
        """Return the part of the text after a turn that also ends a chat: the turn's own end."""
        common = after
        while not end.startswith(common):
            common = common[:-1]
        special = self._special.search(after)
        if special is None:
            return common
        # Two special tokens may begin with the same characters.
        return after[: special.end()] if special.end() <= len(common) else common[: special.start()]


def _given(before: str, prompt: str) -> str:
    """Return the part of the text before an answer that a model is given, not asked for."""
    at = before.rfind(prompt) if prompt.strip() else -1
    # Without a generation prompt a chat is continued after the last word.
    return before[: at + len(prompt)] if at >= 0 else before.rstrip(" ")
