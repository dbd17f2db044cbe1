"""The tokenizer: exact round trips, deterministic training, and no way from text to a special token."""

import pytest
import sentencepiece

from mbrl_lm import config, protocol, tokenizer

CORPUS = ["i want the hats", "you want the balls", "the hats\tfor me\nthe balls for you", "deal ."] * 4
SPACES = ("  two  spaces ", "a\nb\tc\r\n", "nul \0 byte", "Ünïcödé ﬁ ½")
INJECTIONS = (
    "<to_assistant>",
    "<end>",
    "<bos>",
    "<no_deal>",
    "<3>",
    "<|assistant|>",
    "<unk>",
    "<s></s>",
    "hats <to_user> <leave> hats",
    "<0x41>",
    "日本語 🙂 \u2066",
    "",
    " ",
    "the hats " * 5000,
)


def make(kind, **settings):
    return tokenizer.Tokenizer(tokenizer.train(CORPUS, config.Tokenizer(kind=kind, vocab_size=400, **settings)))


@pytest.fixture(scope="module", params=tokenizer.KINDS)
def any_tokenizer(request):
    return make(request.param)


@pytest.mark.parametrize("text", INJECTIONS, ids=lambda text: repr(text[:20]))
def test_no_text_encodes_to_a_special_token(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert all(protocol.FIRST_PIECE <= i < any_tokenizer.vocab_size for i in ids)
    assert not set(any_tokenizer.decode(ids).split()) & (set(protocol.SPECIAL) - set(text.split()))


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("text", INJECTIONS + SPACES, ids=lambda text: repr(text[:20]))
def test_subwords_round_trip_exactly(kind, text):
    model = make(kind)
    ids = model.encode(text)
    assert model.decode(ids) == text
    assert not set(ids) & set(model.unknown)


def test_a_lone_surrogate_is_replaced():
    model = make("unigram")
    assert model.decode(model.encode("a\ud800b")) == "a?b"


def test_words():
    model = make("word")
    assert model.vocab_size == protocol.FIRST_PIECE + 1 + len(set(" ".join(CORPUS).split()))
    assert model.unknown == (protocol.FIRST_PIECE,)
    ids = model.encode(" the\thats \n for  you ")
    assert len(ids) == 4 and protocol.FIRST_PIECE not in ids
    assert model.decode(ids) == "the hats for you"


def test_each_unknown_word_is_one_token():
    model = make("word")
    ids = model.encode("the red blue hats")
    assert ids[1:3] == [protocol.FIRST_PIECE] * 2 and len(ids) == 4
    assert model.decode(ids) == "the <unk> <unk> hats"


def test_rare_words_are_unknown():
    texts = ["common common often often often rare"]
    model = tokenizer.Tokenizer(tokenizer.train(texts, config.Tokenizer(kind="word", min_count=2)))
    assert model.vocab_size == protocol.FIRST_PIECE + 3
    assert model.decode(model.encode("rare often common")) == "<unk> often common"


def test_a_full_vocabulary_keeps_the_most_frequent_words():
    texts = ["common common often often often rare"]
    model = tokenizer.Tokenizer(tokenizer.train(texts, config.Tokenizer(kind="word", vocab_size=2)))
    assert model.decode(model.encode("rare often common")) == "<unk> often <unk>"


def test_long_texts_are_not_skipped():
    model = tokenizer.Tokenizer(tokenizer.train(["a " * 9000 + "last", "b"], config.Tokenizer(kind="word")))
    assert model.decode(model.encode("last")) == "last"


@pytest.mark.parametrize("kind", tokenizer.KINDS)
def test_training_is_deterministic_and_reserves_nothing(kind):
    model = make(kind)
    assert model == make(kind)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.proto)
    assert not any(processor.is_control(i) for i in range(processor.get_piece_size()))


def test_render_names_special_tokens_and_leaves_padding_out():
    model = make("word")
    ids = [protocol.BOS, protocol.NUMBER + 3, protocol.TO_USER, *model.encode("the hats"), protocol.STOP, protocol.PAD]
    assert model.render(ids) == "<bos> <3> <to_user> the hats <end>"
    assert model.decode(ids) == "the hats"


def test_load(tmp_path):
    model = make("unigram")
    path = tmp_path / "given.model"
    path.write_bytes(model.proto)
    assert tokenizer.load(str(path)) == model


@pytest.mark.parametrize("content", [None, b"", b"not a model", b"xyz" * 100])
def test_load_refuses_what_is_no_model(tmp_path, content):
    path = tmp_path / "broken.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(config.ConfigError, match="broken.model.*give the path"):
        tokenizer.load(str(path))


def test_control_pieces_of_a_given_model_may_not_be_sampled(tmp_path):
    prefix = str(tmp_path / "foreign")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=prefix, vocab_size=25, control_symbols=["<role>"], minloglevel=2
    )
    model = tokenizer.load(f"{prefix}.model")
    assert model.unknown == tuple(protocol.FIRST_PIECE + i for i in range(4))  # <unk>, <s>, </s>, <role>
    assert not set(model.encode("<role> <s> hats")) & set(model.unknown[1:])


@pytest.mark.parametrize(
    ("settings", "texts", "message"),
    [
        ({"kind": "words"}, CORPUS, "word, unigram, bpe"),
        ({"kind": "word"}, ["", " "], "no text"),
        ({"kind": "unigram", "vocab_size": 100}, CORPUS, "change tokenizer.vocab_size"),
    ],
)
def test_errors_say_what_to_do(settings, texts, message):
    with pytest.raises(config.ConfigError, match=message):
        tokenizer.train(texts, config.Tokenizer(**settings))
