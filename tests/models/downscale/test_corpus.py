"""Corpora: what a line may be, how splits fall, what is refused."""

import json

import pytest
from tokenizers.processors import TemplateProcessing

from models.downscale.corpus import (
    Corpus,
    Example,
    Turn,
    generate_corpus,
    load_corpus,
    read_corpus,
    write_corpus,
)
from models.downscale.recipe import CorpusSettings
from models.downscale.render import PLAIN_TEMPLATE, Renderer
from models.errors import CorpusError
from models.tasks.base import Split
from models.training.scratch import build_tokenizer


def questions(count):
    """Distinct question lines."""
    return [
        json.dumps({"question": f"What is {i} + 1?", "answer": str(i + 1)}) for i in range(count)
    ]


def load(file, **settings):
    """The corpus in `file`."""
    return load_corpus("mine", CorpusSettings(corpus=str(file), **settings))


def test_a_tenth_is_held_out_by_content(tmp_path):
    """About 5% each for routers and tests; the same line always falls into the same split, and a
    repeated question never into two."""
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(questions(1000)))
    corpus = load(file)
    sizes = {split: len(corpus.of(split)) for split in Split}
    assert sum(sizes.values()) == 1000
    assert 25 <= sizes[Split.ROUTER] <= 80
    assert 25 <= sizes[Split.TEST] <= 80
    file.write_text("\n".join([*reversed(questions(1000)), *questions(1000)]))
    again = load(file)
    assert {e.asked: e.split for e in again.examples} == {e.asked: e.split for e in corpus.examples}


def test_all_kinds_of_lines_survive_a_file(tmp_path):
    """Conversations, questions and texts are read, written and read back unchanged."""
    lines = [
        *questions(60),
        json.dumps(
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello"},
                ],
                "split": "test",
            }
        ),
        json.dumps({"text": "Just text.", "split": "router"}),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = load(tmp_path / "a.jsonl")
    assert corpus.examples[60].turns[0] == Turn(role="system", content="Be brief.")
    assert corpus.examples[60].answer is None
    assert corpus.examples[61] == Example(text="Just text.", split=Split.ROUTER)
    assert corpus.examples[0].question == "What is 0 + 1?"
    write_corpus(corpus, tmp_path / "b.jsonl")
    assert read_corpus("mine", tmp_path / "b.jsonl") == corpus


def test_text_files_are_paragraphs(tmp_path):
    """A .txt file holds one example per paragraph."""
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(f"Paragraph {i}\nof two lines." for i in range(200)))
    assert load(file).examples[7].text == "Paragraph 7\nof two lines."


def test_a_held_out_file_keeps_its_questions_out_of_training(tmp_path):
    """Questions of the held-out file leave training, even where the corpus has them too."""
    (tmp_path / "a.jsonl").write_text("\n".join(questions(100)))
    (tmp_path / "b.jsonl").write_text("\n".join(questions(10)))
    corpus = load(tmp_path / "a.jsonl", held_out=str(tmp_path / "b.jsonl"))
    assert {split: len(corpus.of(split)) for split in Split} == {
        Split.TRAIN: 90, Split.ROUTER: 5, Split.TEST: 5
    }  # fmt: skip
    trained = {example.question for example in corpus.of(Split.TRAIN)}
    assert not trained & {f"What is {i} + 1?" for i in range(10)}


@pytest.mark.parametrize(
    "other",
    [
        {"question": "what is 3 + 1", "answer": "4"},
        {"messages": [{"role": "system", "content": "Be brief."},
                      {"role": "user", "content": " What is  3 + 1?"},
                      {"role": "assistant", "content": "4"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
                      {"role": "user", "content": "What is 3 + 1?"},
                      {"role": "assistant", "content": "4"}]},
        {"text": "Sums.\nWhat is 3 + 1?\n4"},
    ],
    ids=["typed", "system", "turn", "text"],
)  # fmt: skip
def test_a_held_out_question_leaves_training_in_every_form(tmp_path, other):
    """As it is typed, with a system prompt, as a later turn and within a text."""
    lines = [*questions(100)[10:], json.dumps(other)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join(questions(10)))
    corpus = load(tmp_path / "a.jsonl", held_out=str(tmp_path / "b.jsonl"))
    assert len(corpus.of(Split.TRAIN)) == 90


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b"])
@pytest.mark.parametrize("escaped", [True, False])
def test_lines_end_at_line_feeds_alone(tmp_path, mark, escaped):
    """Other separators may stand in a string, escaped or not, and survive our own copy."""
    if not escaped and mark == "\x0b":
        pytest.skip("JSON wants it escaped")
    records = [{"question": f"{i}{mark}?", "answer": "x"} for i in range(200)]
    lines = (json.dumps(record, ensure_ascii=escaped) for record in records)
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    corpus = load(tmp_path / "a.jsonl")
    assert corpus.examples[7].question == f"7{mark}?"
    write_corpus(corpus, tmp_path / "b.jsonl")
    assert read_corpus("mine", tmp_path / "b.jsonl") == corpus


def test_half_a_character_is_replaced(tmp_path):
    """A lone surrogate, as dumps of cut chats hold it, is no Unicode text; a pair stays."""
    lines = ['{"question": "a \\ud83d b?", "answer": "\\ud83d\\ude00"}', *questions(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    first = load(tmp_path / "a.jsonl").examples[0]
    assert first.question == "a \ufffd b?"
    assert first.answer == "\U0001f600"


def test_joined_files_and_odd_strings_are_read(tmp_path):
    """A byte-order mark within, where files were joined; a carriage return between values; control
    characters and half characters anywhere; what nests too deep is named."""
    odd = '{"question":\r "a\\u001c b\\r?", "answer": "x", "skill": "\\ud83d"}'
    (tmp_path / "a.jsonl").write_bytes(
        "\n".join([*questions(60), "\ufeff" + odd, *questions(60)]).encode("utf-8")
    )
    corpus = load(tmp_path / "a.jsonl")
    [found] = [one for one in corpus.examples if one.answer == "x"]
    assert found.question == "a\x1c b\r?"
    assert found.skill == "\ufffd"
    write_corpus(corpus, tmp_path / "b.jsonl")
    assert read_corpus("mine", tmp_path / "b.jsonl") == corpus
    (tmp_path / "a.jsonl").write_text('{"question": ' + "[" * 100_000)
    with pytest.raises(CorpusError, match=r"a\.jsonl:1: not valid JSON"):
        load(tmp_path / "a.jsonl")


def document(number, count=300):
    """A text of words of its own."""
    return " ".join(f"d{number}w{i}" for i in range(count))


def test_a_folder_is_split_by_document(tmp_path):
    """A file is a document; few of them still leave one for each held-out split, the same
    whenever they are read; nothing of one is elsewhere."""
    for number in range(12):
        (tmp_path / f"{number}.md").write_text(f"{document(number)}\n\n{document(number + 100)}")
    corpus = load(tmp_path)
    sizes = {split: len(corpus.of(split)) for split in Split}
    assert sum(sizes.values()) == 12
    assert min(sizes.values()) >= 1
    assert load(tmp_path) == corpus
    assert {example.text.count("\n\n") for example in corpus.examples} == {1}


def test_copies_of_documents_are_left_out_and_counted(tmp_path):
    """One of each is kept, the held-out one where there is; so are empty and foreign files."""
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(document(number))
    (tmp_path / "again.txt").write_text(document(0).upper())
    (tmp_path / "nearly.md").write_text(document(1) + " and a word more")
    (tmp_path / "empty.html").write_text("")
    (tmp_path / "page.pdf").write_text("%PDF")
    held = {"text": "Said before: " + document(2), "split": "test"}
    (tmp_path / "held.jsonl").write_text(json.dumps(held))
    corpus = load(tmp_path)
    assert corpus.left_out == {
        "files that end in '.pdf'": 1, "empty files": 1, "exact copies": 1, "near copies": 2
    }  # fmt: skip
    [kept] = [e for e in corpus.examples if "d2w5 " in e.text]
    assert kept.split is Split.TEST
    assert len(corpus.examples) == 12


def test_what_gives_away_a_held_out_question_is_counted(tmp_path):
    """Left out of training, and said."""
    (tmp_path / "a.jsonl").write_text("\n".join(questions(100)))
    (tmp_path / "b.jsonl").write_text("\n".join(questions(10)))
    corpus = load(tmp_path / "a.jsonl", held_out=str(tmp_path / "b.jsonl"))
    assert corpus.left_out == {"examples that give away what is held out": 10}


def test_built_in_tasks_are_reproducible():
    """A generator gives the same corpus for the same seed, and its held-out questions once each."""
    settings = CorpusSettings(corpus="tasks:numerals", examples=100)
    one, two, other = (generate_corpus("n", settings, held_out=10, seed=seed) for seed in (1, 1, 2))
    assert one == two
    assert one != other
    assert len(one.questions(Split.TEST)) == len(one.questions(Split.ROUTER)) == 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl:2: not valid JSON"),
        ("[1]", r"a\.jsonl:2: not a JSON object"),
        ('{"question": "Why?"}', "a.jsonl:2: answer: must be a text"),
        ('{"prompt": "Why?"}', "needs 'messages', 'question' and 'answer', or 'text'"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "role 'robot' is unknown"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no turn of the assistant"),
        ('{"text": "x", "split": "dev"}', "split: 'dev' is unknown; allowed are train, router"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    """The error names the file, the line, the key and what is allowed."""
    (tmp_path / "a.jsonl").write_text(questions(1)[0] + "\n" + line)
    with pytest.raises(CorpusError, match=message):
        load(tmp_path / "a.jsonl")


def test_empty_tiny_missing_and_foreign_files_are_refused(tmp_path):
    """Each has its own message; nothing is guessed."""
    file = tmp_path / "a.jsonl"
    with pytest.raises(CorpusError, match="there is no corpus at"):
        load(file)
    file.write_text("\n")
    with pytest.raises(CorpusError, match="the corpus is empty"):
        load(file)
    file.write_text("\n".join(questions(20)))
    with pytest.raises(CorpusError, match="at least 32 are needed"):
        load(file)
    with pytest.raises(CorpusError, match="there is no task domain 'poetry'; allowed are"):
        generate_corpus("x", CorpusSettings(corpus="tasks:poetry"), held_out=1, seed=1)


def conversation(*contents):
    """User and assistant in turn."""
    roles = ("user", "assistant")
    turns = (Turn(role=roles[i % 2], content=content) for i, content in enumerate(contents))
    return Example(turns=tuple(turns))


def spans(tokenizer, rendered):
    """The decoded text, with what the assistant wrote in brackets."""
    text, inside = "", False
    for token, written in zip(rendered.tokens, rendered.is_answer, strict=True):
        if written != inside:
            text, inside = text + ("[" if written else "]"), written
        text += tokenizer.decode([token])
    return text + ("]" if inside else "")


def test_rendering_follows_the_chat_template_and_marks_answers():
    """Tokens are the template's; answers with their end token are marked, in every turn."""
    tokenizer = build_tokenizer()
    (rendered,) = Renderer(tokenizer).render(
        [conversation("Hi", "Yes", "And?", "No")], max_tokens=64
    )
    assert spans(tokenizer, rendered) == (
        "<|user|>Hi<|end|><|assistant|>[Yes<|end|>]<|user|>And?<|end|><|assistant|>[No<|end|>]"
    )


@pytest.mark.parametrize("content", ["<|end|>", " padded ", "a < b", "plain"])
def test_contents_that_templates_treat_specially_are_rendered_as_they_treat_them(content):
    """The quick way for plain contents and the slow way for others agree with the template."""
    tokenizer = build_tokenizer()
    example = conversation(content, content)
    (rendered,) = Renderer(tokenizer).render([example], max_tokens=64)
    messages = [{"role": turn.role, "content": turn.content} for turn in example.turns]
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(rendered.tokens) == expected


def test_long_texts_become_several_and_conversations_stay_whole():
    """Nothing of a text is lost and it ends with the end token; a conversation is never cut."""
    tokenizer = build_tokenizer()
    renderer = Renderer(tokenizer)
    parts = renderer.render([Example(text="abcdefghij")], max_tokens=4)
    assert [len(part.tokens) for part in parts] == [4, 4, 3]
    assert all(all(part.is_answer) for part in parts)
    assert parts[-1].tokens[-1] == tokenizer.eos_token_id
    (whole,) = renderer.render([conversation("abcdefgh", "abcdefgh")], max_tokens=6)
    assert sum(whole.is_answer) == 9


def test_a_text_begins_as_a_prompt_of_plain_text_does():
    """Each piece is learnt after the token that the model expects at the start, if it has one; the
    halves of held-out pieces are the text, and nothing of its other pieces."""
    tokenizer = build_tokenizer()
    mark = tokenizer.convert_tokens_to_ids("<|end|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", mark)]
    )
    text = "abcdefghijklmnop"
    renderer = Renderer(tokenizer)
    parts = renderer.render([Example(text=text)], max_tokens=9)
    assert [part.tokens[0] for part in parts] == [mark] * len(parts)
    assert list(parts[0].is_answer) == [False, *[True] * 8]
    halves = renderer.halves(text, max_tokens=9)
    assert "".join(half.opening + half.goes_on for half in halves) == text
    for half in halves:
        at = half.conversation.is_answer.index(True)
        assert list(half.conversation.tokens[:at]) == tokenizer.encode(half.opening)
        assert tokenizer.decode(half.conversation.tokens[at:]) == half.goes_on


@pytest.mark.parametrize("content", ['say "a"', "two\nlines", "caf\xe9 \\ b"])
def test_templates_that_rewrite_contents_are_asked_each_time(content):
    """With a filter such as tojson, what is learnt is still the prompt that is served."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{%- for m in messages -%}<|{{ m.role }}|>{{ m.content | tojson(ensure_ascii=True) }}"
        "<|end|>{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
    )
    (rendered,) = Renderer(tokenizer).render([conversation(content, content)])
    messages = [{"role": "user", "content": content}]
    served = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer.encode(served, add_special_tokens=False)
    assert list(rendered.tokens[: len(prompt)]) == prompt
    assert not any(rendered.is_answer[: len(prompt)])
    assert rendered.is_answer[len(prompt)]


THINKING = (
    "{%- for m in messages -%}<|{{ m.role }}|>"
    "{%- if m.role == 'assistant' and loop.last -%}<think></think>{%- endif -%}"
    "{{ m.content }}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
OPENED = THINKING.replace("<think></think>", "").replace("<|assistant|>{", "<|assistant|><think>{")


@pytest.mark.parametrize("template", [THINKING, OPENED], ids=["block", "opened"])
@pytest.mark.parametrize("content", ["Hi", "a <b> c"])
def test_a_chunk_is_trained_on_the_prompt_that_it_is_served_with(template, content):
    """Whatever a template writes into a finished turn or at the end of a prompt: each answer is
    learnt after the prompt that is served, and is its content and end."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    turns = [content, "Yes", "So", "No"]
    rendered = Renderer(tokenizer).render([conversation(*turns)])
    for at in (1, 3):
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": turns[i]} for i in range(at)]
        served = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(served, add_special_tokens=False)
        answer = tokenizer.encode(f"{turns[at]}<|end|>", add_special_tokens=False)
        end = len(prompt) + len(answer)
        [one] = [one for one in rendered if list(one.tokens[:end]) == [*prompt, *answer]]
        assert list(one.is_answer[len(prompt) - 1 : end]) == [False, *[True] * len(answer)]


def test_the_plain_template_ends_answers():
    """A checkpoint without a template gets one whose answers end with the end token."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = PLAIN_TEMPLATE
    (rendered,) = Renderer(tokenizer).render([conversation("Hi", "Yes")], max_tokens=64)
    assert spans(tokenizer, rendered) == "user: Hi\nassistant: [Yes\n<|end|>]"


def test_a_template_that_refuses_a_role_is_an_error_of_the_corpus():
    """The message carries the template's own words."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{- raise_exception('no systems here') -}}"
    with pytest.raises(CorpusError, match="no systems here"):
        Renderer(tokenizer).render([conversation("Hi", "Yes")], max_tokens=64)
    tokenizer.chat_template = "{{- messages[0].content -}}"
    with pytest.raises(CorpusError, match="does not write an answer"):
        Renderer(tokenizer).render([conversation("Hi", "Yes")], max_tokens=64)


def test_corpora_are_frozen():
    """A corpus can be shared between stages."""
    with pytest.raises(AttributeError):
        Corpus(name="x", examples=()).name = "y"
