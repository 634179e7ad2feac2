"""What a data folder holds: sizes, label frequencies, what training never sees, what repeats."""

from __future__ import annotations

import heapq
import warnings
from array import array
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from xmc.data.formats import (
    DataWarning,
    available_splits,
    filter_path,
    read_documents,
    read_filter,
    read_label_rows,
)
from xmc.data.progress import track

_LONGEST = 3
_BAR = 40  # characters of the longest bar of the histogram


@dataclass(frozen=True)
class SplitInfo:
    """One split of a folder."""

    name: str
    documents: int
    label_uses: int
    labels: int  # distinct labels in this split
    without_labels: int  # documents
    repeated_indices: int  # label indices a document had twice, dropped when read
    repeated_texts: int  # documents whose text an earlier one of this split has
    texts_in_training: int  # documents of a held-out split whose text is also in trn
    unseen_labels: int  # labels of a held-out split that no training document has
    unseen_uses: int  # label uses of a held-out split that no training document could teach
    filter_pairs: int
    median_chars: float
    longest: list[tuple[int, str]]  # characters and uid, longest first


@dataclass(frozen=True)
class FolderInfo:
    """What `describe` found."""

    folder: Path
    num_labels: int
    untitled_labels: int  # named by their uid
    shared_titles: int  # labels whose title another one has too
    splits: list[SplitInfo]
    frequencies: np.ndarray  # [L] int64, training documents of each label (of the first split)

    def histogram(self) -> list[tuple[str, int]]:
        """Number of labels by number of training documents: 0, 1, 2-3, 4-7, 8-15, ..."""
        bins = np.zeros_like(self.frequencies)
        seen = self.frequencies > 0
        bins[seen] = np.floor(np.log2(self.frequencies[seen])).astype(np.int64) + 1
        counts = np.bincount(bins, minlength=2).tolist()
        names = ["0", "1"] + [f"{2**i}-{2 ** (i + 1) - 1}" for i in range(1, len(counts) - 1)]
        return list(zip(names, counts, strict=True))


@dataclass
class _Seen:
    """What one pass over a split gathers; 12 bytes a document and 8 a label."""

    frequencies: np.ndarray
    texts: array[int]  # 64-bit hashes
    lengths: array[int]
    longest: list[tuple[int, str]]
    without_labels: int = 0
    repeated_indices: int = 0


def describe(folder: str | Path) -> FolderInfo:
    """Read every split once, as a stream. Raises DataError for anything wrong with the files."""
    folder = Path(folder)
    names = available_splits(folder)
    num_labels, untitled, shared = _describe_labels(folder)
    seen = {name: _read(folder, name, num_labels) for name in names}
    trained = seen.get("trn")
    splits = [_summarise(folder, name, seen[name], trained) for name in names]
    frequencies = seen[names[0]].frequencies
    return FolderInfo(folder, num_labels, untitled, shared, splits, frequencies)


def render(info: FolderInfo) -> Group:
    """Tables and a histogram for the terminal."""
    sizes = Table()
    sizes.add_column("")
    for split in info.splits:
        sizes.add_column(split.name, justify="right")
    for name, values in _rows(info):
        sizes.add_row(name, *values)
    parts: list[Table | Text] = [Text(f"{info.folder}: {info.num_labels:,} labels"), sizes]
    first = info.splits[0]
    lines = [f"\nlabels by number of {first.name} documents"]
    histogram = info.histogram()
    most = max(count for _, count in histogram) or 1
    width = max(len(name) for name, _ in histogram)
    for name, count in histogram:
        bar = "#" * -(-count * _BAR // most)
        lines.append(f"  {name:>{width}}  {count:>9,}  {bar}".rstrip())
    lines.append("\nlongest texts (characters, uid)")
    for split in info.splits:
        for chars, uid in split.longest:
            lines.append(f"  {split.name}  {chars:>9,}  {uid}")
    if info.untitled_labels or info.shared_titles:
        lines.append(
            f"\n{info.untitled_labels:,} labels have no title and go by their uid, "
            f"{info.shared_titles:,} share their title with another"
        )
    parts.append(Text("\n".join(lines)))
    return Group(*parts)


def plot_frequencies(info: FolderInfo, path: str | Path) -> None:
    """Draw the label frequencies, most frequent first on log-log axes, as PNG (or by suffix)."""
    from matplotlib.figure import Figure

    ranked = np.sort(info.frequencies)[::-1]
    ranked = ranked[ranked > 0]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(np.arange(1, len(ranked) + 1), ranked)
    left.set(xlabel="label rank", ylabel=f"{info.splits[0].name} documents", title="frequencies")
    names, counts = zip(*info.histogram(), strict=True)
    right.bar(names, counts)
    right.set(xlabel=f"{info.splits[0].name} documents", ylabel="labels", title="histogram")
    right.tick_params(axis="x", rotation=45)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _describe_labels(folder: Path) -> tuple[int, int, int]:
    """Number of labels, of those without a title, of those that share theirs."""
    count = untitled = 0
    titles: dict[str, int] = {}
    for label in read_label_rows(folder):
        count += 1
        if not label.title.strip():
            untitled += 1
        else:
            titles[label.title] = titles.get(label.title, 0) + 1
    return count, untitled, sum(times for times in titles.values() if times > 1)


def _read(folder: Path, split: str, num_labels: int) -> _Seen:
    seen = _Seen(np.zeros(num_labels, np.int64), array("Q"), array("I"), [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # the table says it
        for document in track(read_documents(folder, split, num_labels=num_labels), split):
            seen.frequencies[document.labels] += 1
            seen.without_labels += not document.labels
            seen.repeated_indices += document.repeats
            text = document.text
            code = blake2b(text.encode(), digest_size=8).digest()
            seen.texts.append(int.from_bytes(code, "little"))
            seen.lengths.append(len(text) - 1)  # without the line break between title and content
            entry = (len(text) - 1, document.uid)
            if len(seen.longest) < _LONGEST:
                heapq.heappush(seen.longest, entry)
            else:
                heapq.heappushpop(seen.longest, entry)
    return seen


def _summarise(folder: Path, name: str, seen: _Seen, trained: _Seen | None) -> SplitInfo:
    texts = np.frombuffer(seen.texts, np.uint64) if seen.texts else np.empty(0, np.uint64)
    uses = int(seen.frequencies.sum())
    overlap = unseen = unseen_uses = 0
    if trained is not None and name != "trn":
        overlap = int(np.isin(texts, np.frombuffer(trained.texts, np.uint64)).sum())
        new = (seen.frequencies > 0) & (trained.frequencies == 0)
        unseen, unseen_uses = int(new.sum()), int(seen.frequencies[new].sum())
    pairs = 0
    if filter_path(folder, name) is not None:
        sizes = {"num_rows": len(texts), "num_labels": len(seen.frequencies)}
        pairs = len(read_filter(folder, name, **sizes))
    return SplitInfo(
        name=name,
        documents=len(texts),
        label_uses=uses,
        labels=int((seen.frequencies > 0).sum()),
        without_labels=seen.without_labels,
        repeated_indices=seen.repeated_indices,
        repeated_texts=len(texts) - len(np.unique(texts)),
        texts_in_training=overlap,
        unseen_labels=unseen,
        unseen_uses=unseen_uses,
        filter_pairs=pairs,
        median_chars=float(np.median(seen.lengths)) if seen.lengths else 0.0,
        longest=sorted(seen.longest, key=lambda entry: (-entry[0], entry[1])),
    )


def _rows(info: FolderInfo) -> list[tuple[str, list[str]]]:
    """The lines of the table; those that are 0 everywhere and rarely matter are left out."""
    splits = info.splits

    def line(name: str, *values: str) -> tuple[str, list[str]]:
        return name, list(values)

    rows = [
        line("documents", *(f"{s.documents:,}" for s in splits)),
        line("labels used", *(f"{s.labels:,}" for s in splits)),
        line("labels per document", *(f"{s.label_uses / max(s.documents, 1):.2f}" for s in splits)),
        line("characters, median", *(f"{s.median_chars:,.0f}" for s in splits)),
        line("documents without labels", *(f"{s.without_labels:,}" for s in splits)),
        line("repeated texts", *(f"{s.repeated_texts:,}" for s in splits)),
    ]
    if any(s.name == "trn" for s in splits) and len(splits) > 1:
        held_out = [s if s.name != "trn" else None for s in splits]
        rows += [
            line("texts also in trn", *(f"{s.texts_in_training:,}" if s else "" for s in held_out)),
            line("labels unseen in trn", *(f"{s.unseen_labels:,}" if s else "" for s in held_out)),
            line(
                "share of label uses unseen",
                *(f"{s.unseen_uses / max(s.label_uses, 1):.2%}" if s else "" for s in held_out),
            ),
        ]
    if any(s.repeated_indices for s in splits):
        rows.append(line("repeated label indices", *(f"{s.repeated_indices:,}" for s in splits)))
    if any(s.filter_pairs for s in splits):
        rows.append(line("filter pairs", *(f"{s.filter_pairs:,}" for s in splits)))
    return rows
