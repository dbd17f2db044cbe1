"""From a config to token arrays: the records of a run, its tokenizer and its protocol."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Sequence

from mbrl_lm import config, tokenizer
from mbrl_lm.data import DATASETS, load
from mbrl_lm.data.encode import encode
from mbrl_lm.data.records import DataError, Record, hold_out
from mbrl_lm.envs.concierge import logs, vocabulary
from mbrl_lm.metrics import write_atomic
from mbrl_lm.protocol import Protocol, make_protocol
from mbrl_lm.tokenizer import Tokenizer
from mbrl_lm.types import Dialogue

SEPARATOR = ";"  # between the items of a context


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a run learns from, and is tested on.

    Attributes:
      tokenizer, protocol: of all its dialogues.
      train, val: numpy dialogues, (B, tokens); `val` is of the split that `eval.split` names.
      others: dialogues of scenarios that are neither in `train` nor in `val`: the partner of a negotiation learns from them.
      renamed, others_renamed: `train` and `others` under every renaming; None if the data set has none or none is asked for.
      train_records, val_records: the records of both.
    """

    tokenizer: Tokenizer
    protocol: Protocol
    train: Dialogue
    val: Dialogue
    others: Dialogue | None
    renamed: Dialogue | None
    others_renamed: Dialogue | None
    train_records: list[Record]
    val_records: list[Record]


def load_corpus(cfg: config.Config, workdir: pathlib.Path) -> Corpus:
    """Reads (and on the first start prepares) the data of a run; the tokenizer is kept in its directory.

    Raises:
      DataError: if raw files are missing or malformed.
      ConfigError: if `tokenizer.model_file` cannot be used.
    """
    data_dir = cfg.data_dir or write_logs(cfg, workdir / "logs")
    splits = load(cfg.data, data_dir, workdir / "data")
    if cfg.eval.split not in splits:
        raise DataError(f"{data_dir} has no {cfg.eval.split} split, only {', '.join(splits)}: change --config.eval.split")
    train, val, others = splits["train"], splits[cfg.eval.split], []
    model = workdir / "tokenizer.model"
    if cfg.tokenizer.model_file:
        model = pathlib.Path(cfg.tokenizer.model_file)
    elif not model.exists():
        texts = (text for record in train for text in (record.context, *(turn.text for turn in record.turns)))
        known = () if cfg.data_dir else (" ".join(vocabulary()),)  # of the embedded world: few logs may not hold every word
        write_atomic(model, tokenizer.train(itertools.chain(texts, known), cfg.tokenizer))
    pieces = tokenizer.load(str(model))
    dataset = DATASETS[cfg.data]
    between = token_of(pieces, SEPARATOR)
    if cfg.world_model.goals and (between < 0 or not any(SEPARATOR in record.context for record in train)):
        raise config.ConfigError(
            f"world_model.goals needs contexts that list items, {SEPARATOR!r} between them: set it to 0"
        )
    names = item_names(pieces, dataset.names, dataset.other_names)
    protocol = make_protocol(dataset.kind, pieces.vocab_size, pieces.unknown, cfg.turn_tokens, between, names)
    if dataset.kind == "negotiation":
        shared = {record.scenario for record in train} & {record.scenario for record in val}
        if shared:
            places = f"train.txt and in {cfg.eval.split}.txt"
            raise DataError(f"{data_dir}: the scenario {min(shared)!r} is in {places}: move it to one side")
        train, others = hold_out(train, cfg.partner.share)

    def tokens(records):
        return encode(records, pieces, protocol, cfg.tokens, cfg.turns)

    def renamed(records, *other_sides):
        wanted = records and dataset.renamings and cfg.train.renamed
        return tokens(rename(records, dataset.renamings, *other_sides)) if wanted else None

    return Corpus(
        tokenizer=pieces,
        protocol=protocol,
        train=tokens(train),
        val=tokens(val),
        others=tokens(others) if others else None,
        renamed=renamed(train, val, others),
        others_renamed=renamed(others, val, train),
        train_records=train,
        val_records=val,
    )


def token_of(pieces: Tokenizer, word: str) -> int:
    """The token that is this word; -1 if the tokenizer has none."""
    tokens = pieces.encode(word)
    return tokens[0] if len(tokens) == 1 and tokens[0] not in pieces.unknown else -1


def item_names(
    pieces: Tokenizer, names: Sequence[Sequence[str]], other_names: Sequence[Sequence[str]] = ()
) -> list[list[int]]:
    """The tokens that the kinds of item are called, one for each kind; none where a usual name is no token of its own."""
    others, usual = ([[token_of(pieces, word) for word in row] for row in rows] for rows in (other_names, names))
    return [] if any(-1 in row for row in usual) else [row for row in (*others, *usual) if -1 not in row]


def rename(
    records: Sequence[Record], renamings: Callable[[Record], list[Record]], *other_sides: Sequence[Record]
) -> list[Record]:
    """All renamings of the records, but for those that become a scenario of another side, which must stay unseen here."""
    unseen = {record.scenario for side in other_sides for record in side}
    return [other for record in records for other in renamings(record) if other.scenario not in unseen]


def write_logs(cfg: config.Config, directory: pathlib.Path) -> pathlib.Path:
    """Writes the logs of the embedded environment as chat_jsonl, unless they are there; returns where."""
    directory.mkdir(exist_ok=True)
    if not (directory / "val.jsonl").exists():
        recorded = logs(cfg.seed, cfg.logs + cfg.val_logs, cfg.noise, cfg.signal, cfg.places)
        lines = [json.dumps(record) + "\n" for record in recorded]
        write_atomic(directory / "train.jsonl", "".join(lines[: cfg.logs]))
        write_atomic(directory / "val.jsonl", "".join(lines[cfg.logs :]))
    return directory
