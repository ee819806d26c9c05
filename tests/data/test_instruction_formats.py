import pytest

from spectral_lightning.data.instruction_formats import (
    Chat,
    Pair,
    parse_record,
    read_dialogue,
    write_dialogue,
)


def test_alpaca_prompts_are_word_for_word_the_standard_ones():
    record = {"instruction": "Add {x}.", "input": "2 and 2", "output": "4"}
    assert parse_record(record, "auto", "here") == Pair(
        "Below is an instruction that describes a task, paired with an input that provides further"
        " context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Add {x}.\n\n### Input:\n2 and 2\n\n### Response:",
        "4",
    )


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None}, {"context": " "}], ids=str)
def test_alpaca_prompt_without_input_has_no_input_section(empty):
    record = {"instruction": "Greet.", "output": "Hi", **empty}
    assert parse_record(record, "alpaca", "here") == Pair(
        "Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request.\n\n### Instruction:\nGreet.\n\n### Response:",
        "Hi",
    )


def test_dolly_records_are_alpaca_records_of_other_names():
    dolly = {"instruction": "a", "context": "b", "response": "c", "category": "d"}
    alpaca = {"instruction": "a", "input": "b", "output": "c"}
    assert parse_record(dolly, "auto", "here") == parse_record(alpaca, "auto", "here")


def test_sharegpt_conversations_are_chats_of_other_names():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    chat = parse_record({"messages": messages}, "auto", "here")
    assert chat == Chat(tuple(messages))
    assert parse_record({"conversations": turns, "id": 3}, "chat", "here") == chat


def test_turns_after_the_last_answer_are_dropped():
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    assert len(parse_record({"messages": turns}, "auto", "here").messages) == 2
    assert parse_record({"messages": turns[:1]}, "auto", "here") == Chat(())


@pytest.mark.parametrize("prompt", ["prompt", "question", "input"])
@pytest.mark.parametrize("answer", ["completion", "response", "answer", "output"])
def test_pairs_are_taken_as_they_are(prompt, answer):
    record = {prompt: " 2 + 2 = ", answer: "4"}
    assert parse_record(record, "auto", "here") == Pair(" 2 + 2 = ", "4")


def test_given_format_decides_between_columns():
    record = {"messages": [], "instruction": "a", "output": "b", "prompt": "c"}
    assert parse_record(record, "auto", "here") == Chat(())
    assert parse_record(record, "alpaca", "here").answer == "b"
    assert parse_record(record, "text-pairs", "here") == Pair("c", "b")


@pytest.mark.parametrize("dialogue", [Pair("a", "b"), Chat(({"role": "user", "content": "é"},))])
def test_dialogue_survives_writing(dialogue):
    assert read_dialogue(write_dialogue(dialogue)) == dialogue


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a", "id": 1}, r"`format` 'auto', but record 7 has \['id', 'text'\]"),
        ("text", "must be records with named columns, but record 7 is str"),
        ({"prompt": "a", "answer": None}, "'answer' must hold text, but in record 7 it holds None"),
        ({"instruction": ["a"], "output": "b"}, "'instruction' must hold text, .* it holds list"),
        ({"prompt": "a", "answer": "\ud800"}, "record 7 holds half a surrogate pair"),
        ({"messages": "Hi"}, "must be a list of turns .* but record 7 holds str"),
        ({"messages": [{"role": "user"}]}, r"one in record 7 has \['role'\]"),
        ({"messages": [{"role": "judge", "content": "a"}]}, "but record 7 has 'judge'"),
    ],
)
def test_record_of_another_kind_is_named_with_what_it_has(record, message):
    with pytest.raises(ValueError, match=message):
        parse_record(record, "auto", "record 7")
