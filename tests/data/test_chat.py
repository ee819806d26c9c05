import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from spectral_lightning.data import PLAIN_CHAT_TEMPLATE
from spectral_lightning.data.chat import UnusableDialogueError
from spectral_lightning.data.instruction_encoding import DialogueEncoder
from spectral_lightning.data.instruction_formats import Chat

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)
# Closes the block before the token that ends the turn.
TAGGED_EARLY = TAGGED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
# As Llama 2: the system's words stand inside the user's first turn, all text is trimmed, and there
# is no generation prompt.
LLAMA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = m['content'] %}"
    "{% elif m['role'] == 'user' %}<s>[INST] {% if ns.system %}<<{{ ns.system }}>> {% endif %}"
    "{% set ns.system = '' %}{{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}"
)
LLAMA = "{% set ns = namespace(system='') %}" + LLAMA
# As Qwen 3: only the last turn opens with a (maybe empty) thought; earlier thoughts are dropped.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}"
    "{% if loop.last %}<think>{{ '\n' }}"
    "{{ parts[0].split('<think>')[-1] | trim if parts | length > 1 }}{{ '\n' }}</think>{{ '\n' }}"
    "{% endif %}{{ parts[-1] | trim }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
# Ends a turn with nothing but the next one, and a chat with a token that begins like its opening.
UNENDED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}<|im_end|>"
)
NO_TOKENS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '\n' }}{% endfor %}"

TURNS = (
    ("system", "Be short."),
    ("user", "rank?"),
    ("assistant", "a vector"),
    ("user", "a vector"),
    ("assistant", "assistant\nuser"),
)


def chat(*turns):
    return Chat(tuple({"role": role, "content": content} for role, content in turns))


def trained(encoder, dialogue):
    """The text that is trained on, piece by piece, after a check that no text is lost."""
    ids, is_answer, _ = encoder.encode(dialogue)
    pieces, previous = [], False
    for token, answer in zip(ids, is_answer, strict=True):
        if answer and not previous:
            pieces.append([])
        if answer:
            pieces[-1].append(token)
        previous = answer
    return [encoder.tokenizer.decode(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, ["a vector<|im_end|>", "assistant\nuser<|im_end|>"]),
        (TAGGED, ["a vector<|im_end|>", "assistant\nuser<|im_end|>"]),
        (TAGGED_EARLY, ["a vector<|im_end|>", "assistant\nuser<|im_end|>"]),
        (LLAMA, [" a vector </s>", " assistant\nuser </s>"]),
        (
            THINKING,
            ["a vector<|im_end|>", "<think>\n\n</think>\nassistant\nuser<|im_end|>"],
        ),
        (UNENDED, [" a vector", " assistant\nuser<|im_end|>"]),
        (NO_TOKENS, [" a vector\n", " assistant\nuser\n</s>"]),
        (None, [" a vector</s>", " assistant\nuser</s>"]),
    ],
    ids=["chatml", "tagged", "early", "llama", "thinking", "unended", "no_tokens", "plain"],
)
def test_every_turn_of_the_assistant_is_trained_on_and_nothing_else(
    make_tokenizer, template, answers
):
    encoder = DialogueEncoder(make_tokenizer(chat_template=template), 1000)
    assert trained(encoder, chat(*TURNS)) == answers


def test_tokens_are_those_of_the_chat_template(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=CHATML)
    dialogue = chat(*TURNS)
    ids = DialogueEncoder(tokenizer, 1000).encode(dialogue).ids
    expected = tokenizer.apply_chat_template(list(dialogue.messages), return_dict=False)
    assert ids == expected


def test_a_thought_is_trained_on_where_the_template_keeps_it(make_tokenizer):
    encoder = DialogueEncoder(make_tokenizer(chat_template=THINKING), 1000)
    answer = "<think>\nhm\n</think>\nyes"
    dialogue = chat(("user", "x"), ("assistant", answer), ("user", "y"), ("assistant", answer))
    assert trained(encoder, dialogue) == ["yes<|im_end|>", f"{answer}<|im_end|>"]


def test_answer_that_merges_with_its_header_is_tokenized_as_after_a_prompt(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=CHATML)
    messages = [{"role": "user", "content": "x"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids, is_answer, _ = DialogueEncoder(tokenizer, 1000).encode(
        chat(("user", "x"), ("assistant", "\n\ny"))
    )
    assert ids[: len(prompt)] == prompt
    assert not any(is_answer[: len(prompt)])
    assert all(is_answer[len(prompt) : -1])


def test_turn_that_ends_in_a_character_without_token_does_not_train_what_follows(make_tokenizer):
    # transformers 5.23 gives such a turn's mask to the whole rest of the chat.
    words = Tokenizer(models.WordLevel({"?": 0, "one": 1, "two": 2, "</s>": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + ' ' }}{% endgeneration %}{% else %}{{ m['content'] + ' ' }}{% endif %}"
        "{% endfor %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", chat_template=template
    )
    turns = (("user", "one"), ("assistant", "two"), ("user", "one"), ("assistant", "two"))
    ids, is_answer, _ = DialogueEncoder(tokenizer, 9).encode(chat(*turns))
    assert ids == [1, 2, 1, 2, 3]
    assert is_answer == [False, True, False, True, True]


@pytest.mark.parametrize("template", [CHATML, None], ids=["chatml", "plain"])
def test_tokenizer_without_offsets_trains_on_the_same_text(template):
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = template
    encoder = DialogueEncoder(tokenizer, 1000)
    end, lead = ("<|im_end|>\n", "") if template else ("</s>", " ")
    pieces = [f"{lead}a vector{end}", f"{lead}assistant\nuser{end}"]
    # ChatML's tokens are plain text to this tokenizer, so the end of the sequence is added.
    assert trained(encoder, chat(*TURNS)) == [*pieces[:1], pieces[1] + "</s>" * bool(template)]


def test_plain_template_prompts_a_model_as_it_was_trained(make_tokenizer):
    tokenizer = make_tokenizer(bos_token="<s>")
    ids = DialogueEncoder(tokenizer, 1000).encode(chat(*TURNS)).ids
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    messages = list(chat(*TURNS[:2]).messages)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(prompt) == "<s>System: Be short.\nUser: rank?\nAssistant:"
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Roles must alternate') }}", r"refuses \(Roles must alternate\)"),
        ("{{ messages | length }}", "writes no turn of the assistant"),
        (
            "{% if false %}{% generation %}{% endgeneration %}{% endif %}",
            "writes no turn of the assistant",
        ),
        (
            "{% for m in messages %}{{ m['role'] }}{{ m['content'] | length }}>"
            "{{ m['content'] | upper }}{% endfor %}",
            "hides where the answers stand",
        ),
    ],
)
def test_chat_that_cannot_be_followed_is_unusable(make_tokenizer, template, message):
    encoder = DialogueEncoder(make_tokenizer(chat_template=template), 1000)
    with pytest.raises(UnusableDialogueError, match=message):
        encoder.encode(chat(("user", "abc"), ("assistant", "a longer answer")))


def test_tokenizer_without_end_of_sequence_is_refused(make_tokenizer):
    with pytest.raises(ValueError, match="`tokenizer` must have an end-of-sequence token"):
        DialogueEncoder(make_tokenizer(eos_token=None), 10)


@pytest.mark.parametrize("generation_prompt", ["ASSISTANT:", "ASSISTANT: "])
def test_header_quoted_in_an_answer_is_not_taken_for_a_turn(make_tokenizer, generation_prompt):
    """Also where the prompt to generate ends before the space that answers begin with."""
    template = (
        "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + generation_prompt + "' }}{% endif %}"
    )
    quoting = "log:\nUSER: b\nASSISTANT: ok"
    turns = [("user", "hi"), ("assistant", quoting), ("user", "thanks"), ("assistant", "c")]
    encoder = DialogueEncoder(make_tokenizer(chat_template=template), 1000)
    found = trained(encoder, chat(*turns))
    assert [part.split("</s>")[0].strip() for part in found] == [quoting, "c"]
