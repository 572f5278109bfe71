"""Texts: a GPT-2-shaped decoder predicts the next token."""

import codecs
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ghostjax.runs.blocks import blocks
from ghostjax.runs.config import TrainConfig
from ghostjax.runs.data.batches import draw_starts, make_rows
from ghostjax.runs.data.builtin import default_documents
from ghostjax.runs.data.documents import (
    BLOCK,
    MIN_TOKENS,
    Document,
    Documents,
    is_long_enough,
    read_documents,
)
from ghostjax.runs.data.elements import text_elements
from ghostjax.runs.data.kept import KeptTokens
from ghostjax.runs.data.shards import Fields, Recent
from ghostjax.runs.data.task import Example, Examples, Skipped
from ghostjax.runs.errors import UsageError
from ghostjax.runs.models import GPT, SIZES


class Coder(NamedTuple):
    """How texts become tokens.

    Attributes:
      encode: texts as tokens [n] each.
      pieces: a text in n pieces, one for each token. Where several tokens make up one character,
        the last of them has it and the others have nothing.
      vocabulary: how many tokens there are.
    """

    encode: Callable[[Sequence[bytes]], list[np.ndarray]]
    pieces: Callable[[bytes], list[str]]
    vocabulary: int

    def sizes(self, texts: Sequence[bytes]) -> list[int]:
        """How many tokens each text has."""
        return list(map(len, self.encode(texts)))


def byte_pieces(text: bytes) -> list[str]:
    """
    >>> byte_pieces("aä".encode())
    ['a', '', 'ä']
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    last = len(text) - 1
    return [decoder.decode(text[n : n + 1], n == last) for n in range(len(text))]


class Texts(Examples):
    """Documents and their tokens, of which the latest are in memory.

    Args:
      kept: the tokens that the documents were measured by. None: they are made again.

    Attributes:
      sizes: integers [n], how many tokens each has.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        sizes: np.ndarray,
        coder: Coder,
        kept: KeptTokens | None = None,
    ):
        self.documents, self.sizes, self._coder, self._kept = documents, sizes, coder, kept
        self._recent = Recent()

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, n: int) -> Example:
        return self._example(self.documents[n], self.sizes[n])

    def __iter__(self) -> Iterator[Example]:
        return map(self._example, self.documents, self.sizes)

    def id(self, n: int) -> str:
        own = self.documents
        return own.id(n) if isinstance(own, Documents) else own[n].id

    def ids(self) -> Iterator[str]:
        """All ids in order."""
        own = self.documents
        return own.ids() if isinstance(own, Documents) else (each.id for each in own)

    def tokens(self, indices: Iterable[int]) -> list[np.ndarray]:
        """Of some documents, which are read in the order in which they are in the files."""
        found = {
            n: self._recent(n, lambda n=n: self._coder.encode([self.documents[n].text])[0])
            for n in sorted(map(int, indices))
        }
        return [found[int(n)] for n in indices]

    def all_tokens(self) -> Iterator[np.ndarray]:
        """Those of all documents in order: for the first time, those that were kept."""
        kept, self._kept = self._kept, None
        if kept is not None:
            yield from kept.read(self.sizes)
            return
        for block in blocks((document.text for document in self.documents), BLOCK):
            yield from self._coder.encode(block)

    def pieces(self, n: int) -> list[str]:
        """A text in one piece per token; see ``Coder.pieces``."""
        return self._coder.pieces(self.documents[n].text)

    def _example(self, document: Document, size: int) -> Example:
        return Example(document.id, document.domain, int(size), document.excerpt())


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
        train: Texts,
        val: dict[str, Texts],
        model: GPT,
        length: int,
        skipped: Skipped | None = None,
    ):
        self.examples, self.val_examples = train, val
        self.val_sizes = {name: len(own) for name, own in val.items()}
        self._model = model
        self.length = length
        self.skipped = skipped or Skipped()

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

    def train_rows(self, indices, rng, own=slice(None)):
        starts = draw_starts(self.examples.sizes[indices], self.length, rng)
        return self.window_rows(indices[own], starts[own]), starts

    def val_rows(self, name, indices, rng, own=slice(None)):
        starts = self.val_starts(name, indices, rng)
        return make_rows(self.val_examples[name].tokens(indices[own]), starts[own], self.length)

    def val_starts(self, name: str, indices: Sequence[int], rng: np.random.Generator) -> np.ndarray:
        """Where the windows of ``val_rows`` start."""
        return draw_starts(self.val_examples[name].sizes[indices], self.length, rng)

    def val_pieces(self, name: str, index: int) -> list[str]:
        """As ``pieces``, of a held-out example."""
        return self.val_examples[name].pieces(index)

    def window_rows(self, indices: Sequence[int], starts: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows of training examples, from the given tokens on."""
        return make_rows(self.examples.tokens(indices), starts, self.length)

    def pieces(self, index: int) -> list[str]:
        """The text of a training example, in one piece per token; see ``Coder.pieces``."""
        return self.examples.pieces(index)

    def text(self, index: int) -> str:
        """The text of a training example."""
        return self.examples.documents[index].text.decode(errors="replace")

    def elements(self, index: int) -> np.ndarray:
        return text_elements(self.examples.documents[index].text)

    def contents(self) -> dict[str, Any]:
        # With the sizes, as a fingerprint does not see where one set ends and the next begins.
        parts = {
            f"validation set {name}": itertools.chain([len(own)], own.all_tokens())
            for name, own in self.val_examples.items()
        }
        train = self.examples
        return {"training examples": itertools.chain(train.ids(), train.all_tokens()), **parts}


def load_texts(config: TrainConfig) -> TextTask:
    """The documents of the configured files, or of the Python installation.

    Documents of fewer than two bytes or two tokens are skipped, and the task says so.

    Raises:
      UsageError: files or tokenizer cannot be read, or no documents are left.
    """
    coder = Coder(_byte_tokens, byte_pieces, 256)
    if config.tokenizer is not None:
        coder = _load_tokenizer(config.tokenizer)

    skipped = Skipped()

    def keep() -> KeptTokens | None:
        return None if config.tokenizer is None else KeptTokens(coder.encode)

    def read(paths: list[Path], fields: Fields, where: str) -> Texts:
        kept = keep()
        documents = read_documents(paths, fields, (kept or coder).sizes, skipped)
        return _texts(coder, documents, where, skipped, kept)

    if config.train:
        fields = Fields(config.text_field, config.id_field, config.domain_field)
        train = read(config.train_files, fields, "--train")
        val = {
            name: read(paths, Fields(config.text_field), f"validation set {name}")
            for name, paths in config.val_files.items()
        }
    else:
        documents, held_out = default_documents(config.positions + 1)
        train = _texts(coder, documents, "--train", skipped, keep())
        val = {
            name: _texts(coder, own, f"validation set {name}", skipped, keep())
            for name, own in held_out.items()
        }
    dtype = jnp.dtype(config.dtype)
    return TextTask(
        train,
        val,
        GPT(SIZES[config.model], coder.vocabulary, dtype, config.remat),
        config.positions,
        skipped,
    )


def _texts(
    coder: Coder,
    documents: Documents | list[Document],
    where: str,
    skipped: Skipped,
    kept: KeptTokens | None = None,
) -> Texts:
    """Those of the documents that are long enough."""
    if isinstance(documents, Documents):
        sizes = documents.sizes
    else:
        measure = (kept or coder).sizes
        sizes = np.array(measure([document.text for document in documents]), np.int64)
        is_used = np.array(
            [is_long_enough(own.text, size) for own, size in zip(documents, sizes)], bool
        )
        for n in np.flatnonzero(~is_used):
            skipped.add(documents[n].id)
        documents = [own for own, used in zip(documents, is_used) if used]
        sizes = sizes[is_used]
    if not len(documents):
        raise UsageError(f"{where}: no documents of at least {MIN_TOKENS} tokens")
    return Texts(documents, sizes, coder, kept)


def _byte_tokens(texts: list[bytes]) -> list[np.ndarray]:
    return [np.frombuffer(text, np.uint8) for text in texts]


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
    dropout = getattr(tokenizer.model, "dropout", None)  # of BPE alone
    if dropout:
        raise UsageError(
            f"{path}: its model leaves out merges at random (dropout {dropout}), so that a text "
            "has other tokens whenever it is read: set its dropout to null"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(texts: Sequence[bytes]) -> list[np.ndarray]:
        found = tokenizer.encode_batch([text.decode(errors="replace") for text in texts])
        return [np.array(each.ids, np.int32) for each in found]

    def pieces(text: bytes) -> list[str]:
        decoded = text.decode(errors="replace")
        # From where a token begins to where the next does, so that a blank which no token has is
        # not lost. Special tokens have offsets (0, 0) wherever they are.
        starts = [start for start, _ in tokenizer.encode(decoded).offsets]
        edges = [0, *np.maximum.accumulate(starts)[1:].tolist(), len(decoded)]
        return [decoded[start:end] for start, end in itertools.pairwise(edges)]

    # Not get_vocab_size(): some vocabularies have gaps.
    return Coder(encode, pieces, 1 + max(tokenizer.get_vocab().values(), default=0))
