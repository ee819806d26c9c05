"""What the columns of instruction data mean: from a record to a dialogue.

Pure functions on plain values. Where records come from is the matter of `instruction_records`,
how a dialogue becomes tokens that of `instruction_encoding` and `chat`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

Format = Literal["auto", "alpaca", "chat", "text-pairs"]
"""What the columns of a record mean; ``"auto"`` goes by their names."""

# Word for word those of Stanford Alpaca (2023), train.py.
# https://github.com/tatsu-lab/stanford_alpaca
ALPACA_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""Prompt of an Alpaca record whose input is not empty."""
ALPACA_PROMPT_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
"""Prompt of an Alpaca record without an input."""

# The first name is the standard one; the others are those of Dolly and of question sets.
_INPUTS, _OUTPUTS = ("input", "context"), ("output", "response")
_PROMPTS, _ANSWERS = ("prompt", "question", "input"), ("completion", "response", "answer", "output")
_CHATS = ("messages", "conversations")
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
}


class Message(TypedDict):
    """One turn of a chat, as chat templates take it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and its answer, which follows it directly."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Chat:
    """Turns of system, user and assistant; ends with the assistant, or is empty."""

    messages: tuple[Message, ...]


def write_dialogue(dialogue: Pair | Chat) -> str:
    """Write a dialogue as JSON, equal for equal dialogues."""
    if isinstance(dialogue, Chat):
        return json.dumps(dialogue.messages)
    return json.dumps({"prompt": dialogue.prompt, "answer": dialogue.answer})


def read_dialogue(document: str) -> Pair | Chat:
    """Read what `write_dialogue` wrote."""
    content = json.loads(document)
    return Chat(tuple(content)) if isinstance(content, list) else Pair(**content)


def parse_record(record: Mapping[str, Any], format: Format, place: str) -> Pair | Chat:
    """Find the dialogue in a record.

    ``"alpaca"``: ``instruction``, ``output`` (or ``response``) and, if there is one, ``input`` (or
    ``context``), written into one of the two standard prompts. ``"chat"``: ``messages`` or
    ``conversations``, a list of ``role`` and ``content`` or, as ShareGPT has it, ``from`` and
    ``value``. ``"text-pairs"``: a ``prompt``, ``question`` or ``input`` and a ``completion``,
    ``response``, ``answer`` or ``output``, taken as they are. ``"auto"`` is the first of
    ``"chat"``, ``"alpaca"`` and ``"text-pairs"`` whose columns are there.

    Args:
        record: Values by column.
        format: What the columns mean.
        place: Where the record stands, for error messages.

    Raises:
        ValueError: If the columns are not those of the format, or do not hold text.

    Example:
        >>> parse_record({"question": "2 + 2 =", "answer": " 4"}, "auto", "record 1")
        Pair(prompt='2 + 2 =', answer=' 4')
    """
    if not isinstance(record, Mapping):
        raise ValueError(
            f"Instruction data must be records with named columns, but {place} is"
            f" {type(record).__name__}."
        )
    if format in ("auto", "chat") and (chat := _column(record, _CHATS)):
        return _parse_chat(record[chat], place)
    output = _column(record, _OUTPUTS)
    if format in ("auto", "alpaca") and "instruction" in record and output:
        return _parse_alpaca(record, output, place)
    prompt, answer = _column(record, _PROMPTS), _column(record, _ANSWERS)
    if format in ("auto", "text-pairs") and prompt and answer:
        return Pair(_text(record, prompt, place), _text(record, answer, place))
    raise ValueError(
        "`source` must have the columns 'instruction' and 'output' (alpaca), 'messages' or"
        " 'conversations' (chat), or 'prompt' and 'completion' (text-pairs) to fit `format`"
        f" '{format}', but {place} has {sorted(map(str, record))}. Rename its columns."
    )


def _column(record: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in record), None)


def _text(record: Mapping[str, Any], column: str, place: str) -> str:
    text = record[column]
    if not isinstance(text, str):
        raise ValueError(
            f"'{column}' must hold text, but in {place} it holds {type(text).__name__}."
        )
    # JSON can spell half a surrogate pair, which no tokenizer accepts.
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"Text must be valid Unicode, but {place} holds half a surrogate pair.")
    return text


def _parse_alpaca(record: Mapping[str, Any], output: str, place: str) -> Pair:
    instruction = _text(record, "instruction", place)
    column = _column(record, _INPUTS)
    # A table without a value there has None.
    context = _text(record, column, place) if column and record[column] is not None else ""
    template = ALPACA_PROMPT if context.strip() else ALPACA_PROMPT_NO_INPUT
    prompt = template.format(instruction=instruction, input=context)
    return Pair(prompt, _text(record, output, place))


def _parse_chat(turns: object, place: str) -> Chat:
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(
            f"A chat must be a list of turns with 'role' and 'content', but {place} holds"
            f" {type(turns).__name__}."
        )
    messages = [_parse_turn(turn, place) for turn in turns]
    # Nothing is learnt from what comes after the last answer.
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return Chat(tuple(messages))


def _parse_turn(turn: Mapping[str, Any], place: str) -> Message:
    role, content = ("from", "value") if "from" in turn else ("role", "content")
    if role not in turn or content not in turn:
        raise ValueError(
            "A turn must have 'role' and 'content', or 'from' and 'value', but one in"
            f" {place} has {sorted(map(str, turn))}."
        )
    name = _text(turn, role, place)
    if name not in _ROLES:
        raise ValueError(
            f"A turn must be that of one of {sorted(_ROLES)}, but {place} has '{name}'."
        )
    return {"role": _ROLES[name], "content": _text(turn, content, place)}
