"""A folder of adapters with an index: built once, asked in words."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from lorry.core.errors import CheckpointError, LorryError, OptionError, some
from lorry.core.options import from_options
from lorry.core.sites.fingerprint import Fingerprint
from lorry.depot.encoder import EncoderShape, Factors, check_sites
from lorry.depot.retriever import BagOfWords, Retriever, RetrieverTraining, train_retriever, words_of
from lorry.formats.file import AdapterFile
from lorry.formats.folders import write_folder
from lorry.formats.reader import open_adapter

#: The folder of the index inside of the depot, its files, and the captions beside an adapter, one in each line.
INDEX, TENSORS, FACTS, CAPTIONS = ".lorry_index", "index.safetensors", "index.json", "captions.txt"


@dataclass(frozen=True)
class Hit:
    """An adapter that was found: its name in the depot and its cosine."""

    name: str
    score: float


def factors_of(file: AdapterFile) -> Factors:
    """Return A and B of all sites in float32, the scale folded in."""
    return {path: (a.float(), b.float()) for path, (a, b, _) in ((p, file.factors(p)) for p in file)}


def captions_of(folder: Path, file: AdapterFile) -> list[str]:
    """Return what an adapter makes, in words: the lines of ``captions.txt``, else ``captions`` of its metadata."""
    path = folder / CAPTIONS
    if path.is_file():
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = file.metadata.get("captions", [])
    return [found] if isinstance(found, str) else [str(text) for text in found]


class Index:
    """A trained retriever with the vectors of a depot's adapters.

    Parameters
    ----------
    retriever
        Trained.
    words
        How texts become vectors.
    names, vectors
        The adapters, and their unit vectors ``(adapters, out)``.
    """

    def __init__(self, retriever: Retriever, words: BagOfWords, names: Sequence[str], vectors: Tensor) -> None:
        self.retriever, self.words = retriever, words
        self.names, self.vectors = list(names), vectors

    @torch.no_grad()
    def search(self, text: str, top_k: int = 3) -> list[Hit]:
        """Return the adapters whose vectors are nearest to a text, best first.

        Raises
        ------
        OptionError
            The text has no words, or none that was in the captions.
        """
        if not words_of(text):
            raise OptionError(f"A search needs words, found {text!r}. Say what the adapter is to make.")
        vector = self.words([text])
        if not vector.any():
            raise OptionError(
                f"None of the words of '{text}' is known to the index. It knows {some(self.words.words, 12)}."
            )
        scores = (self.retriever.of_texts(vector) @ self.vectors.mT)[0]
        best = scores.topk(min(top_k, len(self.names)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [Hit(self.names[i], score) for i, score in pairs]

    def apart_from(self, depot: str | os.PathLike[str]) -> list[str]:
        """Return names that either the index or the folder has, and not both: the index is older than the folder."""
        return sorted({folder.name for folder in folders_of(Path(depot))} ^ set(self.names))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the index as a folder, whole or not at all."""
        encoder = self.retriever.adapters
        facts = {
            "version": 1,
            "names": self.names,
            "words": self.words.words,
            "sites": encoder.shapes,
            "encoder": dataclasses.asdict(encoder.shape),
        }
        tensors = {f"retriever.{n}": t.detach().contiguous() for n, t in self.retriever.state_dict().items()}
        files = {TENSORS: save_bytes({**tensors, "vectors": self.vectors.contiguous()})}
        write_folder(Path(folder), {**files, FACTS: json.dumps(facts, indent=1).encode()})


def load_index(folder: str | os.PathLike[str]) -> Index:
    """Return an index that `Index.save` wrote.

    Raises
    ------
    CheckpointError
        There is none, or it cannot be read.
    """
    path = Path(folder)
    try:
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        tensors = load_bytes((path / TENSORS).read_bytes())
        words = BagOfWords(facts["words"])
        shapes = {site: (int(out), int(inner)) for site, (out, inner) in facts["sites"].items()}
        retriever = Retriever(shapes, from_options(EncoderShape, facts["encoder"]), len(words.words))
        vectors = tensors.pop("vectors")
        kept = {n.removeprefix("retriever."): t for n, t in tensors.items()}
        wanted = {n: t.shape for n, t in retriever.state_dict().items()}
        if wanted != {n: t.shape for n, t in kept.items()}:
            raise ValueError(f"the tensors in {TENSORS} are not those that {FACTS} speaks of")
        retriever.load_state_dict(kept)
        if len(vectors) != len(facts["names"]):
            raise ValueError(f"{len(vectors)} vectors for {len(facts['names'])} adapters")
    except FileNotFoundError:
        raise CheckpointError(f"There is no index at '{path}'; `lorry search --build` makes one.") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"The index at '{path}' cannot be read: {error}. Build it anew.") from None
    return Index(retriever.eval(), words, facts["names"], vectors)


def build_index(
    depot: str | os.PathLike[str],
    *,
    shape: EncoderShape | None = None,
    settings: RetrieverTraining | None = None,
    seed: int = 0,
) -> Index:
    """Train a retriever on the adapters of a folder that have captions, and index all of them.

    Parameters
    ----------
    depot
        A folder of adapter folders, on the same sites of one base.
    shape, settings
        Of the encoder, and how it is trained; their defaults if not given.
    seed
        Of start and draws.

    Raises
    ------
    CheckpointError
        Nothing is there, an adapter cannot be read, or adapters of other sites or of another base are among them.
    OptionError
        Fewer than two have captions.
    """
    names, factors, captions = read_depot(depot)
    known = [i for i, texts in enumerate(captions) if texts]
    words = BagOfWords.of([text for texts in captions for text in texts])
    retriever = Retriever(shapes_of(factors[0]), shape or EncoderShape(), max(1, len(words.words)), seed)
    train_retriever(
        retriever,
        [factors[i] for i in known],
        [captions[i] for i in known],
        words,
        settings or RetrieverTraining(),
        seed,
    )
    with torch.no_grad():
        return Index(retriever, words, names, retriever.of_adapters(factors))


def read_depot(depot: str | os.PathLike[str]) -> tuple[list[str], list[Factors], list[list[str]]]:
    """Return names, factors and captions of the adapters in a folder; errors as in `build_index`."""
    names: list[str] = []
    factors: list[Factors] = []
    captions: list[list[str]] = []
    marks: dict[str, Fingerprint] = {}
    root = Path(depot)
    for folder in folders_of(root):
        try:
            with open_adapter(folder) as file:
                found, texts, mark = factors_of(file), captions_of(folder, file), file.fingerprint
            if factors:
                check_sites(found, shapes_of(factors[0]))
        except LorryError as error:
            raise CheckpointError(f"'{folder}' in the depot cannot be used: {error}") from None
        if mark is not None and mark.sites:
            marks[folder.name] = mark
        names.append(folder.name)
        factors.append(found)
        captions.append(texts)
    if not names:
        raise CheckpointError(
            f"'{root}' holds no folders of adapters. Give the folder whose folders are adapters, as `lorry train` and "
            "Adapter.save write them."
        )
    _check_one_base(marks)
    return names, factors, captions


def folders_of(root: Path) -> list[Path]:
    """Return the folders of adapters in a depot, by name; hidden ones, such as the index, are none."""
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")) if root.is_dir() else []


def shapes_of(factors: Factors) -> dict[str, tuple[int, int]]:
    """Return the shape ``(out, in)`` of each site of an adapter."""
    return {path: (b.shape[0], a.shape[1]) for path, (a, b) in factors.items()}


def _check_one_base(marks: Mapping[str, Fingerprint]) -> None:
    """Refuse adapters of several bases, whose weights mean different things; who says nothing is taken on trust."""
    for name, mark in marks.items():
        first, known = next(iter(marks.items()))
        if known.compare(mark) == "differs":
            raise CheckpointError(
                f"The adapters of a depot must be made for one base: '{first}' was made for "
                f"'{known.base or 'unnamed'}' ({known.digest}), '{name}' for '{mark.base or 'unnamed'}' "
                f"({mark.digest}). Put them into depots of their own."
            )
