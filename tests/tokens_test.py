"""Text of files and of Python's topics as tokens: ids, masks, packing, what is kept, refusals."""

import gzip
import itertools
import json
import pathlib
import pydoc_data.topics
import sys
from concurrent import futures

import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from abkd_jax import Tokens, data
from abkd_jax.data.corpus import Corpus, prompt_template
from abkd_jax.data.packing import Rows

EOS = 256  # of bytes
PAIRS = [
    {"prompt": "Two and two?", "response": "Four."},
    {"prompt": "A colour of the sky", "response": " blue, and at night: black"},
    {"prompt": "?", "response": "From nothing."},
    {"prompt": "Größe in m²?", "response": "42 m² 日本 🙂"},
    {"prompt": "Again?\n", "response": "\n\n  Yes.  "},
    {"prompt": "The end" * 9, "response": "x"},
]
CHATS = [
    [("user", "Two and two?"), ("assistant", "Four.")],
    [
        ("system", "Be short."),
        ("user", "3 > é"),
        ("assistant", "Ho"),
        ("user", "?"),
        ("assistant", "!"),
    ],
]
CHATML = (
    "{% for turn in messages %}\n<|im_start|>{{ turn.role }}\n{{ turn['content'] }}<|im_end|>"
    "{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED = """{{ bos_token }}
{%- for turn in messages %}
    {% if turn.role == 'assistant' %}
A: {% generation %}{{ turn.content }}<|im_end|>{% endgeneration %}

    {%- else %}
{{ turn.role }}: {{ turn.content | trim | tojson }}{{ '\\n' }}
    {%- endif %}
{% endfor %}
end"""
LAST_ALONE = (  # as Qwen3's, which leaves out what earlier turns thought
    "{% for turn in messages %}{{ turn.role }}: {{ 'thought ' if loop.last }}{{ turn.content }}\n"
    "{% endfor %}"
)


def messages(chat):
    return [{"role": role, "content": content} for role, content in chat]


def write_lines(path, lines):
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return str(path)


def write_tokenizer(folder, template=CHATML, begin=False, **configuration):
    """A small byte-level one, trained on the examples; its folder."""
    folder.mkdir(parents=True)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    special = ["<eos>", "<s>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*itertools.chain(*map(dict.values, PAIRS))], trainer)
    if begin:
        (folder / "chat_template.jinja").write_text(template)
        pair = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[pair]
        )
    backend.enable_truncation(7)  # as such files may have, for other uses
    backend.enable_padding(length=9, pad_token="<eos>")
    backend.save(str(folder / "tokenizer.json"))
    known = dict(
        eos_token="<eos>",
        bos_token={"content": "<s>", "__type": "AddedToken"},
        chat_template=[
            {"name": "tools", "template": "unused"},
            {"name": "default", "template": "unused" if begin else template},
        ],
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(known | configuration))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "small")


@pytest.fixture
def read(tmp_path):
    """Reads lines as a set that tests on its training examples, in a cache of its own."""

    def read(lines, name="train.jsonl", **fields):
        path = tmp_path / name
        if isinstance(lines, str):
            path.write_text(lines)
        else:
            write_lines(path, lines)
        known = dict(train=str(path), test=str(path), validation=0, tokenizer="bytes", length=64)
        known |= dict(cache_dir=str(tmp_path / "cache"), data_seed=0, stream="always")
        return data.text(**known | fields)

    return read


def rows_of(stream):
    """Each row: ids, positions, segments, labels, where."""
    records = map(stream.records.__getitem__, stream.rows)
    return [(*jax.tree.leaves(x["inputs"]), x["labels"], x["where"]) for x in records]


def predicted(split):
    """The tokens that count, of each row."""
    return [labels[where].tolist() for *_, labels, where in rows_of(split)]


def test_of_an_empty_response_the_end_is_left(read):
    """As a network writes it that stops at once."""
    found = read([{"prompt": "ab", "response": ""}, {"prompt": "c", "response": "d"}])
    assert predicted(found.train) == [[256], [ord("d"), 256]]


def equal(a, b):
    same = jax.tree.structure(a) == jax.tree.structure(b)
    return same and all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


# --- tokenizers ---------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_bytes_are_those_of_utf_8(text):
    tokenizer = data.read_tokenizer("bytes")
    (found,) = tokenizer.encode([text])
    assert bytes(found.ids.tolist()) == text.encode()
    assert tokenizer.decode([*found.ids, tokenizer.eos]) == text + "<eos>"
    of_byte = [i for i, character in enumerate(text) for _ in character.encode()]
    assert found.starts.tolist() == of_byte
    assert found.ends.tolist() == [i + 1 for i in of_byte]
    assert tokenizer.size == 257 and tokenizer.eos == EOS


def test_a_folder_is_read_whole(folder):
    """Neither cut nor padded, and each token with its characters, spaces included."""
    tokenizer = data.read_tokenizer(folder)
    texts = [pair["prompt"] + pair["response"] + "<eos>" for pair in PAIRS]
    for text, found in zip(texts, tokenizer.encode(texts), strict=True):
        assert tokenizer.decode(found.ids) == text
        assert found.ids[-1] == tokenizer.eos and found.ids.dtype == np.int32
        assert found.starts[0] == 0 and found.ends[-1] == len(text)
        if text.isascii():
            parts = [text[start:end] for start, end in zip(found.starts, found.ends, strict=True)]
            assert "".join(parts) == text
            names = tokenizer.names(tokenizer.size)
            assert [names[i] for i in found.ids] == parts


def test_ids_and_conversations_are_those_of_transformers(folder, tmp_path, read):
    transformers = pytest.importorskip("transformers")
    folders = [folder, write_tokenizer(tmp_path / "begin", TAGGED, begin=True)]
    texts = [pair["prompt"] + pair["response"] for pair in PAIRS] + ["a<|im_end|>b<eos>"]
    for name in folders:
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(name)
        ours = data.read_tokenizer(name)
        for text, found in zip(texts, ours.encode(texts), strict=True):
            assert [*ours.prefix, *found.ids] == theirs(text)["input_ids"]
        assert ours.size == len(theirs) and ours.eos == theirs.eos_token_id
        lines = [{"messages": messages(chat)} for chat in CHATS]
        dataset = read(lines, tokenizer=name, length=128)
        for chat, row in zip(CHATS, rows_of(dataset.train), strict=True):
            expected = theirs.apply_chat_template(messages(chat), return_dict=True)["input_ids"]
            assert row[0][row[2] > 0].tolist() == expected
    how = dict(return_dict=True, return_assistant_tokens_mask=True)  # of the last, with tags
    for chat, found in zip(CHATS, predicted(dataset.train), strict=True):
        theirs_of = theirs.apply_chat_template(messages(chat), **how)
        counts = np.array(theirs_of["assistant_masks"], bool)
        assert found == np.array(theirs_of["input_ids"])[counts].tolist()


def test_a_prompt_and_what_stands_around_it_are_a_conversation_up_to_its_answer(folder, tmp_path):
    turns, path = CHATS[0], tmp_path / "train.jsonl"
    for name in (folder, write_tokenizer(tmp_path / "begin", TAGGED, begin=True)):
        ours = data.read_tokenizer(name)
        write_lines(path, [{"messages": messages(turns)}, PAIRS[0]])
        template = prompt_template(path, ours, "unused")
        (asked,) = ours.encode([template.replace("{prompt}", turns[0][1])])
        known = dict(train=str(path), test=str(path), validation=0, tokenizer=name, length=128)
        known |= dict(cache_dir=str(tmp_path / "cache"), data_seed=0, stream="always")
        row = rows_of(data.text(**known).train)[0]
        first = int(np.argmax(row[4]))  # predicts the answer's first token
        assert [*ours.prefix, *asked.ids] == row[0][: first + 1].tolist()
        for lines in ([PAIRS[0], {"messages": messages(turns)}], []):
            write_lines(path, lines)
            assert prompt_template(path, ours, "{prompt}:") == "{prompt}:"


def test_vocab_and_merges_are_a_tokenizer(folder, tmp_path):
    whole = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    older = tmp_path / "older"
    older.mkdir()
    whole.model.save(str(older))
    (older / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
    texts = [pair["prompt"] + pair["response"] for pair in PAIRS]
    ours, expected = (data.read_tokenizer(str(name)) for name in (older, folder))
    for found, other in zip(ours.encode(texts), expected.encode(texts), strict=True):
        assert equal(found, other)
    assert ours.eos == expected.eos and ours.vocabulary == expected.vocabulary


SHARED = pathlib.Path(__file__).parents[2] / "shared/data"


@pytest.mark.data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the prepared sets are not here")
def test_gpt2_is_that_of_transformers(read):
    transformers = pytest.importorskip("transformers")
    folder = SHARED / "tokenizers/gpt2"
    with gzip.open(SHARED / "text/t0_train_50k.jsonl.gz") as file:
        lines = [json.loads(line) for line in itertools.islice(file, 100)]
    files = dict(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    theirs = transformers.GPT2Tokenizer(**files)
    dataset = read(lines, tokenizer=str(folder), length=1024, max_prompt=1000)
    for line, row in zip(lines, rows_of(dataset.train), strict=True):
        found, labels, where = row[0][row[2] > 0].tolist(), row[3], row[4]
        assert found == theirs(line["prompt"] + line["response"])["input_ids"]
        assert theirs.decode(labels[where]) == line["response"]  # which has its end


def test_vocabularies_are_compared_by_their_ids(folder, tmp_path):
    assert data.compare_vocabularies(folder, folder).same
    larger = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    size = larger.get_vocab_size()
    larger.add_tokens(["another", "and one more"])
    (tmp_path / "larger").mkdir()
    larger.save(str(tmp_path / "larger" / "tokenizer.json"))
    (tmp_path / "larger" / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    found = data.compare_vocabularies(folder, str(tmp_path / "larger"))
    assert not found.same and found == ((size, size + 2), size)
    found = data.compare_vocabularies(folder, "bytes")
    assert not found.same and found == ((size, 257), 0)


# --- examples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_the_mask_covers_the_response_and_its_end(read, folder, pack, name):
    for tokenizer in (folder, "bytes"):
        decode = data.read_tokenizer(tokenizer).decode
        dataset = read(PAIRS, name, tokenizer=tokenizer, length=96, pack=pack, max_prompt=90)
        found = "".join(map(decode, predicted(dataset.test)))
        assert found == "".join(pair["response"] + "<eos>" for pair in PAIRS)
        whole = "".join(decode(ids[segments > 0]) for ids, _, segments, *_ in rows_of(dataset.test))
        assert whole == "".join(pair["prompt"] + pair["response"] + "<eos>" for pair in PAIRS)
        everything = read(PAIRS, name, tokenizer=tokenizer, length=96, loss_on="all", max_prompt=90)
        for (ids, _, segments, *_), found in zip(
            rows_of(everything.test), predicted(everything.test), strict=True
        ):
            assert found == ids[segments > 0][1:].tolist()


def test_a_row_of_bytes_by_hand(read):
    (row,) = rows_of(read([{"prompt": "ab", "response": "cd"}], length=7).train)
    ids, positions, segments, labels, where = (x.tolist() for x in row)
    assert ids == [97, 98, 99, 100, EOS, 0, 0]
    assert positions == [0, 1, 2, 3, 4, 0, 0]
    assert segments == [1, 1, 1, 1, 1, 0, 0]
    assert labels == [98, 99, 100, EOS, -1, -1, -1]
    assert where == [False, True, True, True, False, False, False]


def test_an_end_that_is_written_is_not_doubled(read, folder):
    lines = [{"prompt": "a", "response": "b<eos>"}]
    (found,) = predicted(read(lines, tokenizer=folder).train)
    assert data.read_tokenizer(folder).decode(found) == "b<eos>"


def test_prompts_lose_their_beginning_and_responses_their_end(read, tmp_path):
    lines = [{"prompt": "0123456789", "response": "abcdef"}, {"prompt": "01", "response": "ab"}]
    shown = lambda dataset: [bytes(x[x > 0].tolist()) for x, *_ in rows_of(dataset.train)]  # noqa: E731
    with_end = lambda ids: bytes(i if i < EOS else ord(".") for i in ids)  # noqa: E731
    half = read([lines[0]], length=8)
    assert shown(half) == [b"6789abcd"]
    assert [*map(with_end, predicted(half.train))] == [b"abcd"]
    assert [*map(with_end, predicted(read(lines, length=12, max_prompt=1).train))] == [
        b"abcdef.",
        b"ab.",
    ]
    begin = write_tokenizer(tmp_path / "begin", begin=True)
    tokenizer = data.read_tokenizer(begin)
    assert tokenizer.decode(tokenizer.prefix) == "<s>"
    ((ids, _, segments, *_),) = rows_of(
        read([lines[0]], tokenizer=begin, length=32, max_prompt=4).train
    )
    assert tokenizer.decode(ids[segments > 0]) == "<s>789abcdef<eos>"


def test_a_prompt_has_a_template(read):
    lines = [{"prompt": "{response} {0} {prompt.x}", "response": "{prompt}"}]
    dataset = read(lines, template="### {prompt}\n{}:", max_prompt=50)
    ((ids, _, segments, *_),) = rows_of(dataset.train)
    text = data.read_tokenizer("bytes").decode(ids[segments > 0])
    assert text == "### {response} {0} {prompt.x}\n{}:{prompt}<eos>"
    assert bytes(predicted(dataset.train)[0][:-1]) == b"{prompt}"


@pytest.mark.parametrize("as_lines", [True, False])
def test_each_token_of_a_document_is_predicted_once(read, as_lines):
    text = "All happy families are alike;\n\nevery unhappy family is unhappy in its own way.\n"
    lines = [{"text": text}, {"text": "ab"}] if as_lines else text
    dataset = read(lines, "train.jsonl" if as_lines else "train.txt", length=9)
    found = list(itertools.chain(*predicted(dataset.train)))
    expected = [*text.encode()[1:], EOS] + ([*b"b", EOS] if as_lines else [])
    assert found == expected
    for ids, positions, segments, labels, where in rows_of(dataset.train):
        count = int((segments > 0).sum())
        assert positions[:count].tolist() == list(range(count))
        assert labels[: count - 1].tolist() == ids[1:count].tolist()
        assert where.sum() == count - 1


def test_the_assistants_turns_count(read, folder, tmp_path):
    lines = [{"messages": messages(chat)} for chat in CHATS]
    tagged = write_tokenizer(tmp_path / "tagged", TAGGED, begin=True)
    for name, mark in ((folder, "<|im_end|>"), (tagged, "<|im_end|>")):
        decode = data.read_tokenizer(name).decode
        dataset = read(lines, tokenizer=name, length=128)
        said = [
            "".join(text + mark for role, text in chat if role == "assistant") for chat in CHATS
        ]
        assert [*map(decode, predicted(dataset.train))] == said
    dated = write_tokenizer(tmp_path / "dated", "{{ strftime_now('%d %b %Y') }}" + CHATML)
    ids, _, segments, *_ = rows_of(read(lines, tokenizer=dated, length=128).train)[0]
    assert data.read_tokenizer(dated).decode(ids[segments > 0]).startswith("26 Jul 2024")
    ids, _, segments, *_ = rows_of(dataset.train)[1]
    whole = '<s>system: "Be short."\nuser: "3 > é"\nA: Ho<|im_end|>user: "?"\nA: !<|im_end|>end'
    assert decode(ids[segments > 0]) == whole


# --- rows ---------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=12), pack=st.booleans(), data=st.data()
)
def test_packed_rows_unpack_to_the_examples(lengths, pack, data):
    drawn = np.random.default_rng(sum(lengths))
    ids = [drawn.integers(0, 99, size).astype(np.int32) for size in lengths]
    counts = [drawn.random(size) < 0.6 for size in lengths]
    corpus = Corpus(*map(np.concatenate, (ids, counts)), np.cumsum(lengths), np.arange(len(ids)))
    order = np.array(data.draw(st.permutations(range(len(ids)))))
    found, sizes = [], []
    for row in map(
        Rows(corpus, order, 9, pack).__getitem__, range(len(Rows(corpus, order, 9, pack)))
    ):
        tokens, labels, where = row["inputs"], row["labels"], row["where"]
        segments = tokens.segments[tokens.segments > 0]
        assert not tokens.segments[len(segments) :].any()  # padding is at the end
        assert not where[len(segments) :].any() and (labels[len(segments) :] == -1).all()
        sizes.append([])
        for segment in range(1, segments.max() + 1):
            place = np.flatnonzero(tokens.segments == segment)
            assert tokens.positions[place].tolist() == list(range(len(place)))
            assert labels[place].tolist() == [*tokens.ids[place][1:].tolist(), -1]
            found.append((tokens.ids[place], np.append(False, where[place][:-1])))
            assert not where[place[-1]]
            sizes[-1].append(len(place))
    assert len(found) == len(ids)
    for example, (of_row, counted) in zip(order, found, strict=True):
        assert of_row.tolist() == ids[example].tolist()
        assert counted[1:].tolist() == counts[example][1:].tolist()
    if pack:  # and none would have fitted into the row before
        assert all(sum(a) + b[0] > 9 for a, b in itertools.pairwise(sizes))
    else:
        assert all(len(row) == 1 for row in sizes)


@pytest.mark.parametrize(
    "fields", [{}, dict(pack=True, vocab_size=300), dict(corpus=True, corpus_rows=2)]
)
def test_a_stream_has_the_rows_of_the_set_in_memory(read, tmp_path, fields):
    if "corpus" in fields:
        (tmp_path / "corpus.txt").write_text("To be, or not to be, that is the question: " * 4)
        fields = fields | {"corpus": str(tmp_path / "corpus.txt")}
    fields |= dict(validation=2, test=1, length=32)
    resident, streamed = (read(PAIRS, stream=stream, **fields) for stream in ("never", "always"))
    assert isinstance(streamed.train, data.Stream) and isinstance(resident.train, data.Split)
    described = data.text.describe(
        **dict(train=str(tmp_path / "train.jsonl"), tokenizer="bytes", data_seed=0) | fields
    )
    assert described == data.describe(resident) == data.describe(streamed)
    assert described.num_classes == fields.get("vocab_size", 257)
    assert described.inputs.ids.shape == (32,)
    assert streamed.class_names == resident.class_names == described.class_names
    for name in ("train", "validation", "test"):
        ours, theirs = getattr(streamed, name), getattr(resident, name)
        pairs = zip(*(data.evaluation_batches(x, 4) for x in (ours, theirs)), strict=True)
        for batch, expected in pairs:
            assert isinstance(batch["inputs"], Tokens)
            assert batch["where"].any()
            assert equal(batch, expected)


def test_large_sets_are_streamed_of_themselves(read):
    assert isinstance(read(PAIRS, length=2**26, stream="auto").train, data.Stream)
    assert isinstance(read(PAIRS, length=16, stream="auto").train, data.Split)


def test_a_step_is_a_function_of_the_seed(read):
    stream = read(PAIRS, length=32).train
    new = lambda: data.Feed(stream, data.Preprocess(), data_seed=3, size=2)  # noqa: E731
    in_order = new()
    steps = [in_order(step)[0].rows for step in (0, 1, 2)]
    assert all(equal(new()(step)[0].rows, rows) for step, rows in enumerate(steps))
    ids = np.concatenate([rows["inputs"].ids for rows in steps])
    assert len({row.tobytes() for row in ids}) == len(PAIRS)  # each once in an epoch


def test_batches_of_unlike_lengths_are_not_stacked(read):
    """A call's steps are of one length; else a step is fed alone, and nothing is left out."""
    pairs = [{"prompt": "?" * (i * 5 % 43), "response": f"{i}"} for i in range(29)]
    split = read(pairs, max_prompt=50, length=64, lengths=(16, 32), stream="always")
    new = lambda: data.Feed(split.train, split.preprocess, data_seed=3, size=2)  # noqa: E731
    alone, feed, step, counts = new(), new(), 0, []
    while step < 28:  # two epochs
        examples, until = feed(step, 2)
        counts.append(until - step)
        for i in range(step, until):
            found, expected = examples.batch(3, i), alone(i)[0].batch(3, i)
            assert equal(found["inputs"], expected["inputs"])
            np.testing.assert_array_equal(found["labels"], expected["labels"])
        step = until
    assert set(counts) == {1, 2}


@pytest.mark.parametrize("stream", ["never", "always"])
@pytest.mark.parametrize("corpus", ["", "corpus.jsonl"])
def test_batches_are_cut_to_few_lengths(read, tmp_path, stream, corpus):
    """To the least that holds their rows, in a random order; nothing but padding is cut off."""
    size, epochs, lengths = 4, 2, (16, 32, 64)
    corpus = corpus and write_lines(tmp_path / corpus, PAIRS)
    pairs = [{"prompt": "?" * (i * 5 % 43), "response": f"{i}"} for i in range(29)]
    fields = dict(max_prompt=50, length=64, lengths=lengths[:-1], stream=stream, corpus=corpus)
    dataset = read(pairs, **fields)
    whole = next(data.evaluation_batches(dataset.train, len(dataset.train)))
    ids, segments = (np.asarray(getattr(whole["inputs"], x)) for x in ("ids", "segments"))
    used = {row.tobytes(): int(n) for row, n in zip(ids, (segments > 0).sum(1), strict=True)}
    new = lambda: data.Feed(dataset.train, dataset.preprocess, data_seed=3, size=size)  # noqa: E731
    feed, steps, until, seen, widths = new(), len(dataset.train) // size, 0, [], []
    for step in range(epochs * steps):
        examples, later = feed(step)
        assert later > step and (stream == "never" or later == step + 1)
        batch = examples.batch(3, step)
        width = batch["labels"].shape[1]
        assert step >= until or width == widths[-1]  # of one shape as long as it is served
        rows = [row.tobytes() for row in np.pad(batch["inputs"].ids, ((0, 0), (0, 64 - width)))]
        assert width == min(x for x in lengths if x >= max(used[row] for row in rows))
        assert batch["where"].shape == batch["inputs"].segments.shape == (size, width)
        until, seen, widths = later, [*seen, rows], [*widths, width]
        if step in (5, steps + 1):
            again = new()(step)[0].batch(3, step)
            assert equal(again["inputs"], batch["inputs"])
    assert seen[:steps] != seen[steps:] and set(widths) == set(lengths)
    if not corpus:  # which repeats rows
        for epoch in (seen[:steps], seen[steps:]):
            assert len(set(itertools.chain(*epoch))) == steps * size
    assert any(np.diff(widths[:steps]) < 0)  # not from short to long
    assert widths.count(64) < 0.7 * len(widths)  # rows of like lengths stand together


def test_streams_are_cut_as_what_is_in_memory(read):
    fields = dict(length=64, lengths=(16, 40))
    pair = [read(PAIRS * 3, **fields, stream=stream) for stream in ("never", "always")]
    feeds = [data.Feed(x.train, x.preprocess, data_seed=5, size=3) for x in pair]
    for step in range(9):
        ours, theirs = (feed(step)[0].batch(5, step) for feed in feeds)
        assert all(equal(ours.pop(x), theirs.pop(x)) for x in [*ours.keys() - {"key"}])


def test_processes_read_parts_of_one_batch(read):
    stream = read(PAIRS, stream="always", length=32).train
    whole = next(stream.batches(7, 4))
    parts = [
        next(
            data.Stream(stream.records, stream.rows, process_index=i, process_count=2).batches(7, 4)
        )
        for i in range(2)
    ]
    assert equal(jax.tree.map(lambda *x: np.concatenate(x), *parts), whole)
    assert len({row.tobytes() for row in whole["inputs"].ids}) == 4


def test_packing_follows_the_data_seed(read):
    sets = [read(PAIRS, pack=True, length=96, data_seed=seed) for seed in (0, 0, 1)]
    one, same, other = (predicted(dataset.train) for dataset in sets)
    assert one == same != other
    assert predicted(sets[0].test) == predicted(sets[2].test)  # which nobody learns from


def test_the_first_lines_are_held_out(read, tmp_path):
    dataset = read(PAIRS, validation=2, test=1)
    said = {
        name: [bytes(found[:-1]).decode() for found in predicted(getattr(dataset, name))]
        for name in ("validation", "test", "train")
    }
    responses = [pair["response"] for pair in PAIRS]
    assert said == {"validation": responses[:2], "test": responses[2:3], "train": responses[3:]}
    ((ids, _, segments, *_),) = rows_of(read(PAIRS, validation=4, pack=True, length=256).train)
    decode = data.read_tokenizer("bytes").decode
    found = {decode(ids[segments == segment]) for segment in range(1, segments.max() + 1)}
    assert found == {pair["prompt"] + pair["response"] + "<eos>" for pair in PAIRS[4:]}
    other = write_lines(tmp_path / "other.jsonl", PAIRS[:1])
    dataset = read(PAIRS, validation=other, test=2)
    assert predicted(dataset.validation) == [[*responses[0].encode(), EOS]]
    assert len(dataset.test) == 2 and len(dataset.train) == len(PAIRS) - 2
    documents = [{"text": "a" * 30}, {"text": "b" * 50}, {"text": "c" * 10}]
    dataset = read(documents, validation=1, test=1, length=8)
    splits = (dataset.validation, dataset.test, dataset.train)
    kinds = [bytes({*itertools.chain(*predicted(split))} - {EOS}) for split in splits]
    assert kinds == [b"a", b"b", b"c"]  # all rows of a line together


@pytest.mark.parametrize("size,times", [(20, 1), (400, 6)])
def test_a_corpus_comes_with_the_instructions(read, tmp_path, size, times):
    """Two rows of it for each other row; the smaller of the two is repeated."""
    text = "".join(chr(ord("a") + i % 23) for i in range(size))
    (tmp_path / "corpus.txt").write_text(text)
    fields = dict(corpus=str(tmp_path / "corpus.txt"), corpus_rows=2, length=16)
    stream = read(PAIRS[:2], **fields).train
    found = predicted(stream)
    masks = [stream.records[row] for row in stream.rows]
    of_corpus = np.array([row["corpus"].all() for row in masks])
    assert all((row["corpus"] == ~row["instructions"]).all() for row in masks)
    assert all(row["corpus"].any() == row["corpus"].all() for row in masks)
    assert (of_corpus.sum(), (~of_corpus).sum()) == (4 * times, 2 * times)
    rows = itertools.compress(found, of_corpus)
    known = [[*text.encode()[i + 1 : i + 16]] for i in range(0, size, 15)]  # 15 are predicted
    known[-1].append(EOS)
    assert [*rows] == [*itertools.islice(itertools.cycle(known), 4 * times)]
    own = [[*pair["response"].encode()[:8], EOS][:8] for pair in PAIRS[:2]]
    assert [*itertools.compress(found, ~of_corpus)] == own * times
    examples, _ = data.Feed(stream, data.Preprocess(), data_seed=0, size=6)(0)
    batch = examples.batch(0, 0)
    assert equal(batch["corpus"] | batch["instructions"], batch["where"])


# --- what is kept -------------------------------------------------------------------------------


def files_of(cache):
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*")}


def test_a_file_is_tokenised_once(read, tmp_path, capsys):
    first = predicted(read(PAIRS).train)
    kept = files_of(tmp_path / "cache")
    assert kept and "tokenising" in capsys.readouterr().err
    assert predicted(read(PAIRS).train) == first
    (tmp_path / "train.jsonl").touch()  # of the same bytes
    read(PAIRS, pack=True, validation=1)
    assert files_of(tmp_path / "cache") == kept and not capsys.readouterr().err
    for change in (dict(length=32), dict(loss_on="all"), dict(template="{prompt}?")):
        read(PAIRS, **change)
        assert files_of(tmp_path / "cache").items() >= kept.items()
        assert "tokenising" in capsys.readouterr().err
    assert predicted(read(PAIRS[:1]).train) == [[*b"Four.", EOS]]  # another file of that name


@pytest.mark.parametrize("name", ["ids", "counts", "ends", "sources"])
def test_what_is_damaged_is_made_anew(read, tmp_path, name):
    first = predicted(read(PAIRS).train)
    (path,) = (tmp_path / "cache").rglob(name)
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2 // 8 * 8]):
        path.write_bytes(content)
        assert predicted(read(PAIRS).train) == first
        assert path.read_bytes() == whole
    path.unlink()
    assert predicted(read(PAIRS).train) == first


def test_several_may_tokenise_a_file_at_once(tmp_path, capsys):
    path = write_lines(tmp_path / "train.jsonl", PAIRS)
    fields = dict(train=path, validation=0, test=path, tokenizer="bytes", length=64)
    fields |= dict(data_seed=0, stream="always", cache_dir=str(tmp_path / "cache"))
    with futures.ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda _: predicted(data.text(**fields).train), range(8))]
    assert all(rows == found[0] for rows in found)
    assert len([*(tmp_path / "cache").iterdir()]) == 1
    assert capsys.readouterr().err.count("tokenising") == 1  # the others waited for it


def test_what_a_killed_process_left_is_removed(read, tmp_path):
    left = tmp_path / "cache" / "unfinished-abc" / "made"
    left.mkdir(parents=True)
    (left / "ids").write_bytes(b"xxxx")
    read(PAIRS)
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.name.startswith("text-")


def test_what_fails_leaves_nothing(read, tmp_path):
    with pytest.raises(ValueError):
        read([*PAIRS, {"prompt": "?"}])
    assert not files_of(tmp_path / "cache")


# --- topics -------------------------------------------------------------------------------------


def test_topics_are_held_out_whole():
    fields = dict(data_seed=0, validation=9, length=512)
    dataset = data.topics(**fields)
    assert data.topics.describe(**fields) == data.describe(dataset)
    found = {}
    for name in ("train", "validation", "test"):
        split = getattr(dataset, name)
        labels = np.asarray(split.labels)[np.asarray(split.masks["where"])]
        found[name] = b"".join(b"\0" if i == EOS else bytes([i]) for i in labels).split(b"\0")[:-1]
    assert [len(found[name]) for name in ("validation", "test")] == [9, 10]
    texts = pydoc_data.topics.topics.values()
    expected = sorted(text.encode()[1:] for text in texts)  # nothing predicts the first
    assert sorted(itertools.chain(*found.values())) == expected
    other = data.topics(**fields | {"data_seed": 1}).test
    assert not np.array_equal(other.inputs.ids[:8], dataset.test.inputs.ids[:8])


# --- refusals -----------------------------------------------------------------------------------

FIELDS = [
    (dict(train="none.jsonl"),
     "data.train must be a file that ends with .jsonl, .jsonl.gz, .txt; found 'none.jsonl'."),
    (dict(validation=-1), "data.validation must be a file, or at least 0; found -1."),
    (dict(test=0), "data.test must be a file, or at least 1; found 0."),
    (dict(validation=5, test=1),
     "data.validation and data.test must be fewer than the 6 lines (or rows) of data.train; "
     "found 6."),
    (dict(tokenizer="byte"),
     "data.tokenizer must be a folder with tokenizer.json, or vocab.json and merges.txt, or "
     "vocab.txt (or 'bytes'); found 'byte'."),
    (dict(length=1), "data.length must be at least 2; found 1."),
    (dict(max_prompt=64),
     "data.max_prompt must be between 1 and data.length - 1 = 63, or 0 for half of it; found 64."),
    (dict(loss_on="prompt"), "data.loss_on must be one of response, all; found 'prompt'."),
    (dict(template="{promt}"),
     "data.template must be a text with {prompt} in it; found '{promt}'."),
    (dict(lengths=(8, 64)),
     "data.lengths must be whole numbers that rise, from 2 to less than data.length, 64; "
     "found (8, 64)."),
    (dict(lengths=(16, 8)),
     "data.lengths must be whole numbers that rise, from 2 to less than data.length, 64; "
     "found (16, 8)."),
    (dict(lengths=(8,), pack=True),
     "data.lengths must be () where rows are packed (data.pack); found (8,)."),
    (dict(corpus_rows=0), "data.corpus_rows must be at least 1; found 0."),
    (dict(vocab_size=-1), "data.vocab_size must be at least 0; found -1."),
    (dict(stream="sometimes"),
     "data.stream must be one of auto, always, never; found 'sometimes'."),
    (dict(omit=(1,)),
     "data.labelled, data.omit and data.imbalance must be left out where an example has more than "
     "one label; found (0, (1,), 1)."),
    (dict(vocab_size=100), "PATH, line 1: ids must be below 100; found 256."),
]  # fmt: skip


@pytest.mark.parametrize("fields,message", FIELDS)
def test_fields_that_do_not_fit(read, tmp_path, fields, message):
    with pytest.raises(ValueError) as error:
        read(PAIRS, **fields)
    assert str(error.value) == message.replace("PATH", str(tmp_path / "train.jsonl"))


GOOD = json.dumps(PAIRS[0]).encode()
LINES = [
    ("no JSON", b'{"prompt": ', {}, "line 2: it must be JSON (Expecting value: line 1 column 12 "
                                    "(char 11))."),
    ("not UTF-8", b'{"prompt": "\xff"}', {},
     "line 2: it must be JSON ('utf-8' codec can't decode byte 0xff in position 12: invalid start "
     "byte)."),
    ("a list", b'["a", "b"]', {},
     "line 2: it must be a JSON object; found ['a', 'b']."),
    ("other fields", b'{"prompt": "a", "answer": "b"}', {},
     "line 2: its fields must be prompt and response, or text, all of them strings, or messages; "
     "found {'prompt': 'a', 'answer': 'b'}."),
    ("a response to a text", b'{"text": "a", "response": "b"}', {},
     "line 2: its fields must be prompt and response, or text, all of them strings, or messages; "
     "found {'text': 'a', 'response': 'b'}."),
    ("no string", b'{"prompt": "a", "response": 7}', {},
     "line 2: its fields must be prompt and response, or text, all of them strings, or messages; "
     "found {'prompt': 'a', 'response': 7}."),
    ("neither prompt nor response", b'{"prompt": "", "response": ""}', {},
     "line 2: the response must be text of which a token is left to predict; found ''."),
    ("no text", b'{"text": ""}', {},
     "line 2: the text must be text of which a token is left to predict; found ''."),
    ("half a character", b'{"text": "\\ud800"}', {},
     "line 2: the text must be Unicode; found half of a surrogate pair."),
    ("bytes have no template", b'{"messages": []}', {},
     "line 2: a chat template must be in the tokenizer's folder, for messages; found 'none'."),
    ("no messages", b'{"messages": []}', dict(tokenizer="chatml"),
     "line 2: the roles of messages must be 'assistant' somewhere; found []."),
    ("messages without content", b'{"messages": [{"role": "assistant"}]}', dict(tokenizer="chatml"),
     "line 2: messages must be a list of messages, each with the strings role and content; found "
     "[{'role': 'assistant'}]."),
    ("no turn of the assistant", b'{"messages": [{"role": "user", "content": "a"}]}',
     dict(tokenizer="chatml"),
     "line 2: the roles of messages must be 'assistant' somewhere; found ['user']."),
    ("a template that is none", json.dumps({"messages": messages(CHATS[0])}).encode(),
     dict(tokenizer="broken"),
     "line 2: the chat template is no template of jinja: unexpected end of template, expected 'end "
     "of print statement'."),
    ("a template that refuses", json.dumps({"messages": messages(CHATS[0])}).encode(),
     dict(tokenizer="refusing"), "line 2: the chat template fails: only poems"),
    ("a template that leaves its sandbox", json.dumps({"messages": messages(CHATS[0])}).encode(),
     dict(tokenizer="unsafe"),
     "line 2: the chat template fails: access to attribute '__class__' of 'list' object is "
     "unsafe."),
    ("a template that changes messages", json.dumps({"messages": messages(CHATS[0])}).encode(),
     dict(tokenizer="changing"),
     "line 2: the chat template fails: access to attribute 'clear' of 'list' object is unsafe."),
    ("earlier turns are rendered otherwise", json.dumps({"messages": messages(CHATS[1])}).encode(),
     dict(tokenizer="last"),
     "line 2: the chat template renders messages[2] otherwise when others follow, or without the "
     "beginning that asks for it; put {% generation %} and {% endgeneration %} around what the "
     "assistant writes."),
]  # fmt: skip
TEMPLATES = {
    "chatml": CHATML,
    "broken": "{{ messages ",
    "refusing": "{{ raise_exception('only poems') }}",
    "unsafe": "{{ messages.__class__.__base__ }}",
    "changing": "{{ messages.clear() }}",
    "last": LAST_ALONE,
}


@pytest.mark.parametrize("line,fields,message", [x[1:] for x in LINES], ids=[x[0] for x in LINES])
def test_lines_that_do_not_fit(read, tmp_path, line, fields, message):
    if "tokenizer" in fields:
        name = fields["tokenizer"]
        fields = {"tokenizer": write_tokenizer(tmp_path / name, TEMPLATES[name])}
    (tmp_path / "lines.jsonl").write_bytes(GOOD + b"\n" + line)
    with pytest.raises(ValueError) as error:
        read(PAIRS, train=str(tmp_path / "lines.jsonl"), **fields)
    assert str(error.value) == f"{tmp_path}/lines.jsonl, {message}"


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("empty.jsonl", b"\n  \n", "must be a file with an example; found 'none'."),
        ("empty.txt", b"", "must be a file with an example; found 'none'."),
        ("latin.txt", b"\xe4",
         "cannot be read ('utf-8' codec can't decode byte 0xe4 in position 0: unexpected end of "
         "data)."),
        ("plain.jsonl.gz", GOOD, "cannot be read (Not a gzipped file (b'{\"'))."),
        ("half.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-9],
         "cannot be read (Compressed file ended before the end-of-stream marker was reached)."),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(read, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        read(PAIRS, train=str(tmp_path / name))
    assert str(error.value) == f"{tmp_path / name} {message}"


def test_tokenizers_that_do_not_fit(tmp_path):
    folder = write_tokenizer(tmp_path / "small", eos_token="</s>")
    expected = "must be named in tokenizer_config.json, and one of the tokens; found '</s>'."
    with pytest.raises(ValueError) as error:
        data.read_tokenizer(folder)
    assert str(error.value) == f"the eos_token of {folder} {expected}"
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / "small" / name).write_text("{")
        with pytest.raises(ValueError, match=f"^the tokenizer in {folder} cannot be read .*"):
            data.read_tokenizer(folder)


def test_an_extra_that_is_not_installed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError) as error:
        data.read_tokenizer(folder)
    expected = "tokenizers is not installed; pip install 'abkd_jax[language]'."
    assert str(error.value) == expected


def test_a_cache_that_cannot_be_written(read, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(ValueError, match=f"^data.cache_dir {tmp_path}/cache cannot be written "):
        read(PAIRS)
