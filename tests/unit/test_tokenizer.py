"""Encoding equals transformers', streams equal whole-text decoding, templates render as they should."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer

from ostinato.errors import ModelNotFoundError, RequestError, TokenizerError
from ostinato.models import hub
from ostinato.models.gguf import read_header
from ostinato.tokenizer import _ALPHABET as ALPHABET
from ostinato.tokenizer import GGUF_PRE_TOKENIZERS, Tokenizer
from ostinato.types import SamplingParams

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\tand\ttabs \n\n\n newlines  \r\n end ",
    "don't I'LL we've he's 'S",
    "def f(x: int) -> str:\n    return {'a': [x**2 for _ in range(10)]}  # ok",
    "1234567890 3.14 １２３ Ⅷ ½ x2y 007",
    "naïve café Ünïcödé ñ ß ﬁ",
    "日本語のテキスト 中文字符 한국어 العربية עברית ไทย",
    "👋🏽 👨‍👩‍👧‍👦 🎉🎉 é à",
    "<|im_start|>user\nhi<|im_end|> <|endoftext|><|im_end",
    "$$$ €£ ++ -- == != <= >= ... !!! ???",
    "\u200b\u00a0\u3000\ufeff\x00\x07\x7f",
    "https://example.org/a?b=c&d=%20#e_f",
]
ROLES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="session")
def default_path() -> Path:
    try:
        return hub.resolve(None)
    except ModelNotFoundError as error:
        pytest.skip(f"the default model is not available: {error}")


@pytest.fixture(scope="session")
def smol(default_path: Path) -> Tokenizer:
    return Tokenizer.load(default_path)


def _byte_bpe() -> RustTokenizer:
    """A small byte-level BPE with a special and a plain added token."""
    library = RustTokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    library.train_from_iterator(TEXTS * 3, trainer)
    # Tokens long enough to hold several stop strings, and one that is not in the byte alphabet.
    library.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("abab", "b ab é", "[é x]")])
    return library


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _byte_bpe().save(str(tmp_path / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "add_bos_token": False,
        "chat_template": ROLES,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


SPM_WORDS = ["▁", "e", "t", "a", "h", "o", "l", "w", "r", "d", "s", "n", "▁t", "he", "▁the", "lo", "hel", "▁hel", "hello",
             "▁hello", "▁w", "or", "▁wor", "ld", "▁world", "é", "an", "and", "▁a", "▁and", "▁▁", "▁▁▁▁", ",", "\n"]  # fmt: skip


def _spm_metadata(**changes: Any) -> dict[str, Any]:
    control = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    tokens = [*control, *byte_tokens, *SPM_WORDS, "[TOOL]"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(n) for n in range(len(SPM_WORDS))] + [0.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(SPM_WORDS) + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | changes


def _bpe_metadata(**changes: Any) -> dict[str, Any]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "12", "123", "1234", "ab", "Ġa", "Ġab", "<|end|>", "<|tool|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 4],
        "tokenizer.ggml.merges": ["1 2", "12 3", "123 4", "a b", "Ġ a", "Ġ ab"],
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
    } | changes


# --- encoding --------------------------------------------------------------------------


def test_importing_is_light() -> None:
    code = (
        "import sys, ostinato.tokenizer; "
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'gguf', 'jinja2') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_default_model_round_trips(smol: Tokenizer) -> None:
    for text in TEXTS:
        assert smol.decode(smol.encode(text), skip_special_tokens=False) == text
    assert smol.eos_token_ids == {2}
    assert smol.bos_token_id == 1
    assert smol.vocab_size == 49152
    assert smol.encode("<|im_start|>hi", add_special_tokens=True)[0] == 1
    assert smol.decode([1, 2]) == ""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text())
def test_any_text_round_trips(smol: Tokenizer, text: str) -> None:
    """But for bytes that this model's vocabulary has no token for, which are lost as with its own tokenizer."""
    lost = {byte for char, byte in ALPHABET.items() if smol._library.token_to_id(char) is None}
    ids = smol.encode(text)
    expected = bytes(b for b in text.encode() if b not in lost).decode("utf-8", "replace")
    assert smol.decode(ids, skip_special_tokens=False) == expected
    assert smol._library.decode(ids, skip_special_tokens=False) == expected


def test_default_model_equals_the_published_definition(smol: Tokenizer, default_path: Path) -> None:
    """SmolLM2's own tokenizer.json splits with these two library steps instead of regexes."""
    metadata = read_header(default_path).metadata
    vocab = {token: n for n, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(line.split(" ")) for line in metadata["tokenizer.ggml.merges"]]
    theirs = RustTokenizer(models.BPE(vocab=vocab, merges=merges))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    theirs.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in list(vocab)[:17]])
    for text in TEXTS:
        assert smol.encode(text) == theirs.encode(text).ids, text


@pytest.fixture(scope="module")
def theirs(default_path: Path) -> Any:
    """transformers' own conversion of the default model's tokenizer."""
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoTokenizer.from_pretrained(str(default_path.parent), gguf_file=default_path.name)


@pytest.mark.slow
def test_default_model_equals_transformers(smol: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        ids = smol.encode(text)
        if "½" not in text:  # their conversion leaves out the step that splits numerals
            assert ids == theirs(text)["input_ids"], text
        for skip in (False, True):
            assert smol.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    chat = [
        {"role": "user", "content": "Hi <b>"},
        {"role": "assistant", "content": "é"},
        {"role": "user", "content": "?"},
    ]
    for prompt in (False, True):
        assert smol.apply_chat_template(chat, add_generation_prompt=prompt) == theirs.apply_chat_template(
            chat, add_generation_prompt=prompt, tokenize=False
        )
    assert smol.encode_chat(chat) == theirs.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=False
    )


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "a12345 b\n\n c", ["a", "12345", "Ġb", "ĊĊ", "Ġc"]),
        ("smollm", "a12345 b\n\n c", ["a", "1", "2", "3", "4", "5", "Ġb", "ĊĊ", "Ġc"]),
        ("llama-bpe", "a12345 b\n\n c'LL", ["a", "123", "45", "Ġb", "ĊĊ", "Ġc", "'LL"]),
        ("qwen2", "a12345 b\n\n c'LL", ["a", "1", "2", "3", "4", "5", "Ġb", "ĊĊ", "Ġc", "'LL"]),
        ("tekken", "aBCd12 E", ["a", "BCd", "1", "2", "ĠE"]),
        ("default", "a12345+b c", ["a", "123", "45", "+", "b", "Ġc"]),
    ],
)
def test_pre_tokenizers(pre: str, text: str, pieces: list[str]) -> None:
    library = Tokenizer.from_gguf(_bpe_metadata(**{"tokenizer.ggml.pre": pre}))._library
    assert [piece for piece, _ in library.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_every_pre_tokenizer_round_trips() -> None:
    for pre in GGUF_PRE_TOKENIZERS:
        tokenizer = Tokenizer.from_gguf(_bpe_metadata(**{"tokenizer.ggml.pre": pre}))
        for text in TEXTS:
            assert tokenizer.decode(tokenizer.encode(text, False), skip_special_tokens=False) == text


def test_unknown_pre_tokenizer() -> None:
    with pytest.raises(TokenizerError, match=r"'martian'.*llama-bpe.*smollm"):
        Tokenizer.from_gguf(_bpe_metadata(**{"tokenizer.ggml.pre": "martian"}))


def test_whole_words_need_no_merges() -> None:
    """Llama 3 takes a piece that is a token as it is, even where no merges lead to it."""
    changes = {"tokenizer.ggml.merges": ["a b"]}
    for pre, expected in (("llama-bpe", ["123"]), ("gpt-2", ["1", "2", "3"])):
        tokenizer = Tokenizer.from_gguf(_bpe_metadata(**{"tokenizer.ggml.pre": pre}, **changes))
        assert [tokenizer.token_text(i) for i in tokenizer.encode("123")] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported"),
        ({"tokenizer.ggml.model": None}, "no tokenizer"),
        ({"tokenizer.ggml.tokens": []}, "no tokenizer"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "twice"),
        ({"tokenizer.ggml.token_type": [1]}, "token types"),
        ({"tokenizer.ggml.merges": None}, "merges"),
        ({"tokenizer.ggml.merges": ["ab"]}, "not two tokens"),
        ({"tokenizer.ggml.merges": ["a nothing"]}, "cannot be used"),
        ({"tokenizer.ggml.eos_token_id": 10_000}, "eos_token_id is 10000"),
        ({"tokenizer.ggml.add_bos_token": True}, "add_bos_token is set"),
    ],
)
def test_bad_gguf_vocabulary(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_gguf(_bpe_metadata(**changes))


def test_gguf_flags_and_ends() -> None:
    meta = _bpe_metadata()
    tool = meta["tokenizer.ggml.tokens"].index("<|tool|>")
    tokenizer = Tokenizer.from_gguf(
        meta | {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": True,
                "tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.eot_token_id": tool}
    )  # fmt: skip
    ids = tokenizer.encode("ab")
    assert (ids[0], ids[-1]) == (0, tool - 1)
    assert tokenizer.encode("ab", add_special_tokens=False) == ids[1:-1]
    assert tokenizer.eos_token_ids == {tool - 1, tool}
    # A user-defined token is found whole, and shown; a control token is not shown.
    assert tokenizer.decode(tokenizer.encode("a<|tool|>b<|end|>", False)) == "a<|tool|>b"


# --- SentencePiece ---------------------------------------------------------------------


def test_spm_by_hand() -> None:
    tokenizer = Tokenizer.from_gguf(_spm_metadata())
    texts = [tokenizer.token_text(i) for i in tokenizer.encode("hello the world é☃")]
    assert texts == ["<s>", " hello", " the", " world", " ", "é", "\ufffd", "\ufffd", "\ufffd"]
    assert tokenizer.decode(tokenizer.encode("hello the world é☃")) == "hello the world é☃"
    assert tokenizer.decode(tokenizer.encode("  hello")) == "  hello"
    assert [tokenizer.token_text(i) for i in tokenizer.encode("a[TOOL]", False)] == [" a", "[TOOL]"]
    plain = Tokenizer.from_gguf(_spm_metadata(**{"tokenizer.ggml.add_space_prefix": False}))
    assert [plain.token_text(i) for i in plain.encode("hello", False)] == ["hello"]


def test_spm_needs_scores() -> None:
    with pytest.raises(TokenizerError, match="score"):
        Tokenizer.from_gguf(_spm_metadata(**{"tokenizer.ggml.scores": [1.0]}))


def _greedy_spm(text: str) -> list[str]:
    """SentencePiece's rule itself: join the neighbours whose piece scores best, leftmost first."""
    score = {piece: -n for n, piece in enumerate(SPM_WORDS)}
    pieces = list(("▁" + text).replace(" ", "▁"))
    while True:
        best = max(
            ((score[a + b], -n) for n, (a, b) in enumerate(pairwise(pieces)) if a + b in score),
            default=None,
        )
        if best is None:
            return pieces
        at = -best[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="etahlowrdsn é,\n", min_size=1))
def test_spm_equals_the_rule(text: str) -> None:
    ids = SPM.encode(text, add_special_tokens=False)
    assert [SPM_TOKENS[i] for i in ids] == _greedy_spm(text)
    assert SPM.decode(ids) == text == SPM._library.decode(ids)


SPM = Tokenizer.from_gguf(_spm_metadata())
SPM_TOKENS = _spm_metadata()["tokenizer.ggml.tokens"]


def test_spm_equals_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    meta = _spm_metadata()
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(meta["tokenizer.ggml.tokens"])
    writer.add_token_scores(meta["tokenizer.ggml.scores"])
    writer.add_token_types(meta["tokenizer.ggml.token_type"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    mine = Tokenizer.load(tmp_path / "m.gguf")
    # Not " hello": they add no space before a space, the SentencePiece rule above does.
    for text in ("hello world", "the hello and,\nthe  world", "é 日本 🎉"):
        ids = mine.encode(text, add_special_tokens=False)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        assert mine.decode(ids) == theirs.decode(ids)


# --- folders ---------------------------------------------------------------------------


def test_folder(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (0, {1})
    assert tokenizer.encode("hello")[0] != 0
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    assert Tokenizer.load(folder).eos_token_ids == {1, 5}


@pytest.mark.parametrize("flag", [True, False, None])
@pytest.mark.parametrize("template", [True, False])
def test_bos_setting_wins_over_the_post_processor(folder: Path, flag: bool | None, template: bool) -> None:
    library = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    if template:
        library.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": flag}))
    tokenizer = Tokenizer.load(folder)
    inner = tokenizer.encode("ab", add_special_tokens=False)
    bos = template if flag is None else flag
    assert tokenizer.encode("ab") == [0] * bos + inner + [1] * template


def test_saved_truncation_and_padding_do_not_reach_prompts(folder: Path) -> None:
    library = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    text = "some text that is longer"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_missing_and_bad_files(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.load(folder).eos_token_ids == frozenset()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be used"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.load(folder)
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match=r"SentencePiece.*save_pretrained"):
        Tokenizer.load(folder)


def test_bad_prompts(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    for prompt in (None, 3, b"bytes", ["a"], "lone \ud800 surrogate"):
        with pytest.raises(RequestError):
            tokenizer.encode(prompt)  # type: ignore[arg-type]


# --- streams ---------------------------------------------------------------------------

BPE = Tokenizer(_byte_bpe(), source="test", special={"eos_token": "</s>"})
WORDS = Tokenizer(  # no decoder: words joined by spaces, which no token-by-token rule gives
    RustTokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "stop": 3, "!": 4}, unk_token="<unk>")),
    source="test",
)


def _reference(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """Character by character: cut at the stop string that is completed first, the longest of several."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def _run(
    tokenizer: Tokenizer, ids: Sequence[int], params: SamplingParams, prompt: Sequence[int] = ()
) -> tuple[str, str | None, int]:
    """(text, stop string, tokens pushed); checks what `TextSink` promises on the way."""
    sink = tokenizer.stream(params, prompt)
    patient = tokenizer.stream(params, prompt)
    assert sink.watches == patient.watches == bool(params.stop_strings)
    assert sink.passes is patient.passes or tokenizer is not BPE
    shown, found, pushed = [sink.text], None, 0
    for token in ids:
        passed = patient.watches and patient.passes[token] and not patient.open
        found = sink.push(token)
        pushed += 1
        shown.append(sink.text)
        if passed:
            assert found is None
        elif patient.watches:
            assert patient.catch_up(ids[:pushed]) == found
            assert patient.text == sink.text
        if found is not None:
            break
    text = sink.finish()
    patient.catch_up(ids[:pushed])
    assert patient.finish() == text
    for before, after in zip(shown, [*shown[1:], text], strict=True):
        assert after.startswith(before)  # shown text is never taken back
    assert sink.text == text
    if found is not None:
        assert shown[-1] == text
    return text, found, pushed


@pytest.mark.parametrize("tokenizer", [SPM, BPE, WORDS], ids=["spm", "bpe", "words"])
@pytest.mark.parametrize("skip", [True, False])
def test_tokens_that_come_together_make_the_same_text(tokenizer: Tokenizer, skip: bool) -> None:
    rng, params = random.Random(), SamplingParams(skip_special_tokens=skip)
    for _ in range(60):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(30))]
        prompt = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(3))]
        one, several, last = (tokenizer.stream(params, prompt) for _ in range(3))
        for n, token in enumerate(ids, 1):
            assert one.push(token) is None
            if rng.random() < 0.3:
                several.catch_up(ids[:n])
                assert several.text == one.text, (ids, prompt, n)
        several.catch_up(ids)
        several.catch_up(ids)  # nothing is new
        last.catch_up(ids)
        assert one.finish() == several.finish() == last.finish(), (ids, prompt)


def _check(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str], include: bool, skip: bool) -> None:
    params = SamplingParams(stop=list(stops), include_stop_str_in_output=include, skip_special_tokens=skip)
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    text, found, pushed = _run(tokenizer, ids, params)
    assert (text, found) == _reference(whole, stops, include)
    if found is not None:
        # Found at the first token whose text completes it, not later.
        before = tokenizer.decode(ids[: pushed - 1], skip_special_tokens=skip).rstrip("\ufffd")
        assert _reference(before, stops, include)[1] is None


STOPS = st.lists(st.text(alphabet="ab é🎉", min_size=1, max_size=4), max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab é🎉", max_size=30), STOPS, st.booleans())
def test_stop_strings_equal_the_reference(text: str, stops: list[str], include: bool) -> None:
    for tokenizer in (BPE, SPM):
        _check(tokenizer, tokenizer.encode(text, add_special_tokens=False), stops, include, True)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=24), st.data())
def test_any_split_into_tokens_and_any_bytes(data: bytes, draw: st.DataObject) -> None:
    """One token a byte, valid UTF-8 or not, special tokens in between."""
    alphabet = {byte: BPE._library.token_to_id(char) for char, byte in ALPHABET.items()}
    ids = [alphabet[b] for b in data]
    for place in draw.draw(st.lists(st.integers(0, len(ids)), max_size=3)):
        ids.insert(place, draw.draw(st.sampled_from([0, 1, BPE.vocab_size - 1, BPE.vocab_size + 7])))
    skip = draw.draw(st.booleans())
    text, _, _ = _run(BPE, ids, SamplingParams(skip_special_tokens=skip))
    known = [i for i in ids if i < BPE.vocab_size]
    assert text == BPE.decode(ids, skip) == BPE._library.decode(known, skip_special_tokens=skip)
    _check(
        BPE,
        ids,
        draw.draw(st.lists(st.text(alphabet="ab<s>/é[", min_size=1, max_size=4), max_size=2)),
        False,
        skip,
    )


def test_byte_alphabet_is_the_librarys() -> None:
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    found = {}
    for point in [*range(0x800), *range(0x800, 0x110000, 0x1000)]:
        if not 0xD800 <= point < 0xE000:
            found.update(zip(split(chr(point))[0][0], chr(point).encode(), strict=True))
    assert len(found) > 240
    assert found.items() <= ALPHABET.items()
    assert set(ALPHABET) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(ALPHABET.values()) == list(range(256))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 3, 4]), max_size=20),
    st.lists(st.sampled_from(["stop", "a b", "b !", " "]), max_size=2),
    st.booleans(),
)
def test_decoders_that_look_at_neighbours(ids: list[int], stops: list[str], include: bool) -> None:
    _check(WORDS, ids, stops, include, True)


def test_spm_byte_runs_stream() -> None:
    ids = [SPM_TOKENS.index(f"<0x{b:02X}>") for b in "a日🎉é".encode()]
    sink = SPM.stream(SamplingParams())
    seen = []
    for token in ids:
        assert sink.push(token) is None
        seen.append(sink.text)
    assert seen == ["a", "a", "a", "a日", "a日", "a日", "a日", "a日🎉", "a日🎉", "a日🎉é"]
    assert sink.finish() == SPM.decode(ids) == SPM._library.decode(ids)


def test_window_holds_back_part_of_a_character() -> None:
    """Another decoder with byte fallback: decoded by windows, and never shows half a character."""
    vocab = {f"<0x{b:02X}>": b for b in range(256)} | {"a": 256, "z": 257}
    library = RustTokenizer(models.BPE(vocab, [], byte_fallback=True))
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(library, source="test")
    assert tokenizer._to_bytes is None
    ids = [256, *"日🎉".encode(), 257]
    assert _run(tokenizer, ids, SamplingParams())[0] == "a日🎉z" == tokenizer.decode(ids)
    sink = tokenizer.stream(SamplingParams())
    seen = [sink.text for token in ids if sink.push(token) is None]
    assert not any("\ufffd" in text for text in seen)
    # Bytes that never become a character are shown after a while.
    sink = tokenizer.stream(SamplingParams())
    for _ in range(100):
        sink.push(0xFF)
    assert 80 < len(sink.text) <= 100
    assert sink.finish() == "\ufffd" * 100


def test_spm_keeps_the_space_after_a_prompt() -> None:
    ids = SPM.encode("hello", add_special_tokens=False)
    prompt = SPM.encode("the")
    assert _run(SPM, ids, SamplingParams(), prompt)[0] == " hello"
    assert _run(SPM, ids, SamplingParams(), [1])[0] == "hello"  # a prompt of BOS alone shows nothing
    assert _run(SPM, ids, SamplingParams())[0] == "hello"
    assert _run(WORDS, [2], SamplingParams(), [1])[0] == " b"


def test_unfinished_character_is_held_back() -> None:
    ids = [BPE._library.token_to_id(c) for c in "ðŁİ"]
    sink = BPE.stream(SamplingParams())
    for token in ids:
        sink.push(token)
    assert sink.text == ""
    assert sink.finish() == "\ufffd" == BPE.decode(ids)


def test_stop_string_held_back_and_given_back() -> None:
    a, b = (BPE._library.token_to_id(c) for c in "ab")
    sink = BPE.stream(SamplingParams(stop="aab"))
    seen = []
    for token in (a, a, a, a, b):
        found = sink.push(token)
        seen.append(sink.text)
    assert found == "aab"
    assert seen == ["", "", "a", "aa", "aa"]
    assert sink.finish() == "aa"
    sink = BPE.stream(SamplingParams(stop="aab"))
    sink.push(a)
    assert (sink.text, sink.finish()) == ("", "a")


def test_stop_string_that_ends_first_wins() -> None:
    """Whether the text comes in one token or in many."""
    one, many = BPE.encode("abab", False), [BPE._library.token_to_id(c) for c in "abab"]
    assert len(one) == 1
    for ids in (one, many):
        assert _run(BPE, ids, SamplingParams(stop=["abab", "ba"]))[:2] == ("a", "ba")
        assert _run(BPE, ids, SamplingParams(stop=["a", "bab", "abab"], include_stop_str_in_output=True))[
            :2
        ] == ("a", "a")
        assert _run(BPE, ids, SamplingParams(stop=["b", "ab"]))[:2] == ("", "ab")


def test_stop_strings_wait_for_min_tokens() -> None:
    ids = [BPE._library.token_to_id(c) for c in "abab"]
    # A match counts if it ends after the first min_tokens tokens, wherever it begins.
    for least, text in ((0, ""), (1, ""), (2, "ab"), (3, "ab"), (4, "abab")):
        assert _run(BPE, ids, SamplingParams(stop="ab", min_tokens=least))[0] == text
    assert _run(BPE, ids, SamplingParams(stop=["ab", "aba"], min_tokens=2))[0] == ""


def test_tokens_that_pass() -> None:
    """Those that neither hold a stop string nor end with the beginning of one; what is skipped has no text."""
    (whole,), start = BPE.encode("abab", False), BPE._library.token_to_id("<s>")
    tokens = [*map(BPE._library.token_to_id, "abn"), whole, start, BPE.vocab_size + 7]
    for kept, expected in ((False, [0, 1, 0, 0, 1, 1]), (True, [0, 1, 0, 0, 0, 1])):
        params = SamplingParams(stop=["ab", "né", "s>!"], skip_special_tokens=not kept)
        passes = BPE.stream(params).passes
        assert [passes[token] for token in tokens] == expected
    anything = BPE.stream(SamplingParams(stop=["x\ufffd"])).passes
    assert not any(anything[token] for token in range(BPE.vocab_size))
    assert not any(WORDS.stream(SamplingParams(stop=["zzz"])).passes[token] for token in range(4))


def test_pushing_stays_cheap() -> None:
    """No re-decoding: a token costs the same at the end of a long text (counted, not timed)."""
    calls = 0
    tokenizer = Tokenizer(_byte_bpe(), source="test")
    rule = tokenizer._to_bytes
    assert rule is not None

    def counting(token: str) -> bytes:
        nonlocal calls
        calls += 1
        return rule(token)

    tokenizer._to_bytes = counting
    sink = tokenizer.stream(SamplingParams(stop="zzzzzz"))
    ids = tokenizer.encode("hello world " * 500)
    for token in ids:
        sink.push(token)
    assert calls == len(set(ids))


# --- chat templates --------------------------------------------------------------------

HELLO = [{"role": "user", "content": "hello"}]


def _with_template(source: str, **changes: Any) -> Tokenizer:
    return Tokenizer(
        _byte_bpe(),
        source="here",
        special={"bos_token": "<s>"},
        chat_templates={"default": source},
        **changes,
    )


def test_template_places(folder: Path) -> None:
    assert Tokenizer.load(folder).apply_chat_template(HELLO) == "<user>hello\n<assistant>"
    assert Tokenizer.load(folder).apply_chat_template(HELLO, add_generation_prompt=False) == "<user>hello\n"
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "with {{ tools | length }}"},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.apply_chat_template(HELLO) == "plain"
    assert tokenizer.apply_chat_template(HELLO, tools=[{}, {}]) == "with 2"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert Tokenizer.load(folder).apply_chat_template(HELLO) == "from json"
    (folder / "chat_template.jinja").write_text("from jinja")
    assert Tokenizer.load(folder).apply_chat_template(HELLO) == "from jinja"
    assert Tokenizer.load(folder).apply_chat_template(HELLO, chat_template="given {{ x }}", x=1) == "given 1"


def test_bos_is_not_doubled() -> None:
    tokenizer = _with_template("{{ bos_token }}{{ messages[0].content }}", add_bos=True)
    ids = tokenizer.encode_chat(HELLO)
    assert ids == tokenizer.encode("hello")
    assert ids.count(0) == 1


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}", "x\n"),  # trimmed blocks
        ("{{ {'a': '<é>', 'b': [1]} | tojson }}", '{"a": "<é>", "b": [1]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}x{{ messages[0].content }}{% endgeneration %}", "xhello"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ undefined_thing is defined }}", "False"),
        ("{{ bos_token }}", "<s>"),
    ],
)
def test_template_language(source: str, expected: str) -> None:
    assert _with_template(source).apply_chat_template(HELLO) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.deeper }}", "refuses"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages.append(1) }}", "refuses"),  # the sandbox is immutable
        ("{{ ''.__class__.__mro__ }}", "refuses"),  # and closed
        ("{{ ''.__class__.__base__.__subclasses__() }}", "refuses"),
        ("{{ range(10 ** 9) | list }}", "refuses"),
    ],
)
def test_template_that_refuses(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        _with_template(source).apply_chat_template(HELLO)


def test_template_that_is_not_valid() -> None:
    with pytest.raises(TokenizerError, match="chat template of here is not valid"):
        _with_template("{% for %}").apply_chat_template(HELLO)


def test_no_template() -> None:
    assert not BPE.has_chat_template
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
        BPE.apply_chat_template(HELLO)


@pytest.mark.parametrize(
    "messages",
    ["hello", [], {}, None, 3, ["hello"], [{"content": "x"}], [{"role": "", "content": "x"}], [{"role": "user"}],
     [{"role": "user", "content": None}], [{"role": 1, "content": "x"}], [{"role": "user", "content": 5}],
     [{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "user", "content": ["x"]}]],
)  # fmt: skip
def test_bad_messages(messages: Any) -> None:
    with pytest.raises(RequestError, match="messages"):
        _with_template(ROLES).apply_chat_template(messages)


def test_content_parts_and_tool_calls() -> None:
    tokenizer = _with_template("{% for m in messages %}{{ m.content }}|{% endfor %}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [{}]},
    ]
    assert tokenizer.apply_chat_template(messages) == "a\nb|None|"
    assert messages[0]["content"] is parts  # the caller's messages stay as they were
