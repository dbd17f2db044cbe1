"""SentencePiece, with its pieces shifted past the protocol's special tokens.

A model holds no piece for a role, a beginning or an end: those are the first ids of the vocabulary and belong to the
protocol. Piece `i` is token `FIRST_PIECE + i`, so no text can encode to a special token, whatever a user types.
"""

import collections
import dataclasses
import io
import itertools
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from mbrl_lm import config as config_lib
from mbrl_lm import protocol

KINDS = ("word", "unigram", "bpe")
SPACE = "\u2581"  # SentencePiece writes a space as this letter; a word of a word model begins with it
LONGEST_TEXT = 1 << 24  # bytes; SentencePiece would silently skip training texts that are longer than 4,192


def train(texts: Iterable[str], config: config_lib.Tokenizer) -> bytes:
    """Trains a SentencePiece model; the same texts in the same order give the same bytes.

    Args:
      texts: the training corpus.
      config: `kind`, `vocab_size` (at most that many pieces, <unk> included) and, for words, `min_count`.

    Returns:
      The serialised model, to be given to `Tokenizer`.

    Raises:
      ConfigError: if the kind is unknown, the corpus is empty or the vocabulary is too small for the kind.
    """
    if config.kind not in KINDS:
        raise config_lib.ConfigError(f"tokenizer.kind={config.kind!r} is unknown: use one of {', '.join(KINDS)}")
    texts = [text for text in map(_valid_unicode, texts) if text.strip()]
    if not texts:
        raise config_lib.ConfigError("the tokenizer has no text to train on: the training split holds no words")
    options = {"model_type": config.kind, "vocab_size": config.vocab_size}
    if config.kind == "word":
        # SentencePiece splits words at spaces only, so every other white space becomes one.
        texts = [" ".join(text.split()) for text in texts]
        count = collections.Counter(itertools.chain.from_iterable(text.split() for text in texts))
        known = sum(n >= config.min_count for n in count.values())
        options["vocab_size"] = min(known + 1, config.vocab_size)  # one more for <unk>; the most frequent words are kept
        options["character_coverage"] = 1.0  # below 1, words with rare letters would be dropped
    else:
        options.update(byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False)  # an exact round trip
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            normalization_rule_name="identity",
            hard_vocab_limit=False,  # a small corpus gives a smaller vocabulary, not an error
            max_sentence_length=LONGEST_TEXT,
            num_threads=1,  # the vocabulary of a unigram model depends on it
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            unk_id=0,
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        raise config_lib.ConfigError(
            f"SentencePiece cannot train a {config.kind} model of {config.vocab_size} pieces ({error}): "
            "change tokenizer.vocab_size (byte fallback alone takes 256 pieces) or give more text"
        ) from error
    return model.getvalue()


def load(path: str) -> "Tokenizer":
    """Reads a SentencePiece `.model` file.

    Raises:
      ConfigError: if there is no such file or it holds no SentencePiece model.
    """
    try:
        return Tokenizer(pathlib.Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise config_lib.ConfigError(
            f"tokenizer.model_file={str(path)!r} cannot be read as a SentencePiece model ({error}): give the path of a "
            ".model file, or leave it empty to train a model on the corpus"
        ) from error


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. Ids below `protocol.FIRST_PIECE` are special tokens and never come out of `encode`.

    Subword models give a text back exactly, except that the letter U+2581, by which SentencePiece marks a space, comes back
    as one. Word models split at white space and join by single spaces: each word is one token, known or not.

    Attributes:
      proto: the serialised SentencePiece model.
      vocab_size: special tokens and pieces together.
      unknown: ids that stand for no text: <unk>, and the control pieces of a model trained elsewhere. They may be read, and
        must never be sampled.
      opens_word: bool, for every piece in order, whether it begins a word wherever it stands: all those of a word model do.
        A piece that begins a text begins a word, too.
    """

    proto: bytes = dataclasses.field(repr=False)
    vocab_size: int = dataclasses.field(init=False)
    unknown: tuple[int, ...] = dataclasses.field(init=False)
    opens_word: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)
    _processor: sentencepiece.SentencePieceProcessor = dataclasses.field(init=False, repr=False, compare=False)
    _word_id: dict[str, int] | None = dataclasses.field(init=False, repr=False, compare=False)  # of a word model only

    def __post_init__(self):
        model = sentencepiece_model_pb2.ModelProto()
        try:
            model.ParseFromString(self.proto)
            processor = sentencepiece.SentencePieceProcessor(model_proto=self.proto) if model.pieces else None
        except Exception as error:  # protobuf and SentencePiece raise their own types
            raise ValueError(f"not a SentencePiece model: {error}") from error
        if processor is None:
            raise ValueError("not a SentencePiece model: it holds no pieces")
        pieces = range(processor.get_piece_size())
        silent = [i for i in pieces if processor.is_unknown(i) or processor.is_control(i) or processor.is_unused(i)]
        word_id = None
        if model.trainer_spec.model_type == sentencepiece_model_pb2.TrainerSpec.WORD:
            word_id = {processor.id_to_piece(i).removeprefix(SPACE): i for i in pieces if i not in silent}
        for name, value in (
            ("vocab_size", protocol.FIRST_PIECE + len(pieces)),
            ("opens_word", np.array([word_id is not None or processor.id_to_piece(i).startswith(SPACE) for i in pieces])),
            ("unknown", tuple(protocol.FIRST_PIECE + i for i in silent)),
            ("_processor", processor),
            ("_word_id", word_id),
        ):
            object.__setattr__(self, name, value)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, all at least `FIRST_PIECE`."""
        if self._word_id is None:
            ids = self._processor.encode(_valid_unicode(text))
        else:
            # Word by word: SentencePiece would merge neighbouring unknown words into one.
            unknown = self._processor.unk_id()
            ids = [self._word_id.get(word, unknown) for word in text.split()]
        return [protocol.FIRST_PIECE + i for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens have none. An unknown word reads <unk>."""
        pieces = [int(i) - protocol.FIRST_PIECE for i in ids if i >= protocol.FIRST_PIECE]
        if self._word_id is None:
            return self._processor.decode(pieces)
        return " ".join(self._processor.id_to_piece(i).removeprefix(SPACE) for i in pieces)

    def render(self, ids: Sequence[int]) -> str:
        """A dialogue for the eyes: special tokens by name, text between them, padding left out."""
        parts = []
        for special, run in itertools.groupby(ids, key=lambda i: i < protocol.FIRST_PIECE):
            if special:
                parts.extend(protocol.SPECIAL[i] for i in run if i != protocol.PAD)
            else:
                parts.append(self.decode(list(run)))
        return " ".join(parts)


def _valid_unicode(text: str) -> str:
    """The text with lone surrogates, which have no UTF-8 form, replaced by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
