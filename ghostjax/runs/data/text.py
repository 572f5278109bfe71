"""Texts: a GPT-2-shaped decoder predicts the next token."""

import codecs
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ghostjax.runs.config import TrainConfig
from ghostjax.runs.data.batches import draw_starts, make_rows
from ghostjax.runs.data.builtin import default_documents
from ghostjax.runs.data.documents import Document, Fields, read_documents
from ghostjax.runs.data.elements import text_elements
from ghostjax.runs.data.task import Example
from ghostjax.runs.errors import UsageError
from ghostjax.runs.models import GPT, SIZES

MIN_TOKENS = 2  # one token to read and one to predict


class Coder(NamedTuple):
    """How texts become tokens.

    Attributes:
      encode: a text as tokens [n].
      pieces: a text in n pieces, one for each token. Where several tokens make up one character,
        the last of them has it and the others have nothing.
      vocabulary: how many tokens there are.
    """

    encode: Callable[[bytes], np.ndarray]
    pieces: Callable[[bytes], list[str]]
    vocabulary: int


def byte_pieces(text: bytes) -> list[str]:
    """
    >>> byte_pieces("aä".encode())
    ['a', '', 'ä']
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    last = len(text) - 1
    return [decoder.decode(text[n : n + 1], n == last) for n in range(len(text))]


class Texts(NamedTuple):
    """Documents with their tokens."""

    documents: Sequence[Document]
    tokens: Sequence[np.ndarray]

    def examples(self) -> list[Example]:
        return [
            Example(document.id, document.domain, len(own), document.excerpt())
            for document, own in zip(*self)
        ]


class TextTask:
    """Documents and a decoder. A row is a window of T + 1 tokens.

    Attributes:
      length: T.
    """

    name = "text"
    unit = "nats per token"
    optimizer = None

    def __init__(
        self,
        documents: Sequence[Document],
        tokens: list[np.ndarray],
        val: dict[str, Texts],
        model: GPT,
        length: int,
        pieces: Callable[[bytes], list[str]] = byte_pieces,
        skipped: Sequence[str] = (),
    ):
        self.examples = Texts(documents, tokens).examples()
        self.val_examples = {name: own.examples() for name, own in val.items()}
        self.val_sizes = {name: len(own.documents) for name, own in val.items()}
        self._tokens = tokens
        self._val = val
        self._model = model
        self.length = length
        self._documents = documents
        self._pieces = pieces
        self.skipped = list(skipped)

    def init_params(self, seed: int) -> Any:
        ids = jnp.zeros((1, self.length), jnp.int32)
        return jax.jit(self._model.init)(jax.random.key(seed), ids)["params"]

    def row_losses(self, params: Any, rows: dict[str, jax.Array]) -> jax.Array:
        """Mean cross-entropy over the masked positions of every row, in nats per token.

        ``losses[r] = sum_t mask[r, t] * nll[r, t] / sum_t mask[r, t]``
        """
        logits = self._model.apply({"params": params}, rows["inputs"]).astype(jnp.float32)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, rows["targets"])
        return jnp.sum(nll * rows["mask"], axis=-1) / jnp.sum(rows["mask"], axis=-1)

    def train_rows(self, indices, rng):
        texts = [self._tokens[index] for index in indices]
        starts = draw_starts(texts, self.length, rng)
        return make_rows(texts, starts, self.length), starts

    def val_rows(self, name, indices, rng):
        texts = [self._val[name].tokens[index] for index in indices]
        return make_rows(texts, self.val_starts(name, indices, rng), self.length)

    def val_starts(self, name: str, indices: Sequence[int], rng: np.random.Generator) -> np.ndarray:
        """Where the windows of ``val_rows`` start."""
        return draw_starts([self._val[name].tokens[n] for n in indices], self.length, rng)

    def val_pieces(self, name: str, index: int) -> list[str]:
        """As ``pieces``, of a held-out example."""
        return self._pieces(self._val[name].documents[index].text)

    def window_rows(self, indices: Sequence[int], starts: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows of training examples, from the given tokens on."""
        return make_rows([self._tokens[index] for index in indices], starts, self.length)

    def pieces(self, index: int) -> list[str]:
        """The text of a training example, in one piece per token; see ``Coder.pieces``."""
        return self._pieces(self._documents[index].text)

    def text(self, index: int) -> str:
        """The text of a training example."""
        return self._documents[index].text.decode(errors="replace")

    def elements(self, index: int) -> np.ndarray:
        return text_elements(self._documents[index].text)

    def contents(self) -> dict[str, Any]:
        # With the sizes, as a fingerprint does not see where one set ends and the next begins.
        val = ((name, list(own.tokens)) for name, own in self._val.items())
        parts = {f"validation set {name}": [len(own), own] for name, own in val}
        return {"training examples": [[e.id for e in self.examples], self._tokens], **parts}


def load_texts(config: TrainConfig) -> TextTask:
    """The documents of the configured files, or of the Python installation.

    Documents of fewer than two bytes or two tokens are skipped, and the task says so.

    Raises:
      UsageError: files or tokenizer cannot be read, or no documents are left.
    """
    skipped: list[str] = []
    if config.train:
        fields = Fields(config.text_field, config.id_field, config.domain_field)
        documents, skipped = read_documents(config.train, fields)
        val_documents = {}
        for name, paths in config.val_files.items():
            val_documents[name], more = read_documents(paths, Fields(config.text_field))
            skipped += more
    else:
        documents, val_documents = default_documents(config.positions + 1)
    coder = Coder(_byte_tokens, byte_pieces, 256)
    if config.tokenizer is not None:
        coder = _load_tokenizer(config.tokenizer)
    documents, tokens, more = _encode(coder, documents, "--train")
    skipped += more
    val = {}
    for name, own in val_documents.items():
        *texts, more = _encode(coder, own, f"validation set {name}")
        val[name] = Texts(*texts)
        skipped += more
    dtype = jnp.dtype(config.dtype)
    model = GPT(SIZES[config.model], coder.vocabulary, dtype, config.remat)
    return TextTask(documents, tokens, val, model, config.positions, coder.pieces, skipped)


def _byte_tokens(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


def _encode(
    coder: Coder, documents: Sequence[Document], where: str
) -> tuple[list[Document], list[np.ndarray], list[str]]:
    """Documents that are long enough, their tokens, and the ids of those that are not."""
    tokens = [coder.encode(document.text) for document in documents]
    pairs = [(own, ids) for own, ids in zip(documents, tokens) if len(ids) >= MIN_TOKENS]
    if not pairs:
        raise UsageError(f"{where}: no documents of at least {MIN_TOKENS} tokens")
    kept = [own for own, _ in pairs]
    short = [own.id for own, ids in zip(documents, tokens) if len(ids) < MIN_TOKENS]
    return kept, [ids for _, ids in pairs], short


def _load_tokenizer(path: Path) -> Coder:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise UsageError('--tokenizer needs tokenizers: pip install "ghostjax[tokenizer]"') from (
            error
        )
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UsageError(f"{path}: no tokenizer.json ({' '.join(str(error).split())})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: bytes) -> np.ndarray:
        return np.array(tokenizer.encode(text.decode(errors="replace")).ids, np.int32)

    def pieces(text: bytes) -> list[str]:
        decoded = text.decode(errors="replace")
        # From where a token begins to where the next does, so that a blank which no token has is
        # not lost. Special tokens have offsets (0, 0) wherever they are.
        starts = [start for start, _ in tokenizer.encode(decoded).offsets]
        edges = [0, *np.maximum.accumulate(starts)[1:].tolist(), len(decoded)]
        return [decoded[start:end] for start, end in pairwise(edges)]

    # Not get_vocab_size(): some vocabularies have gaps.
    return Coder(encode, pieces, 1 + max(tokenizer.get_vocab().values(), default=0))
