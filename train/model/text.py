"""Text to conditioning: tags -> token ids per chunk for both encoders -> context and pooled vector.

Shape legend: B captions, N chunks of 77 ids (1 to 3), L context length, D width (768 + 1280 in SDXL), P pooled width.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.base import faults
from train.base.errors import ExitCode, Halt
from train.model import clip_tokens

BOS_ID, EOS_ID, PAD_2_ID = 49406, 49407, 0  # CLIP's ids; PAD_2_ID is "!", with which encoder 2's texts are padded
CHUNK_CONTENT = 75  # content ids per chunk; with begin and end a chunk has 77, the encoders' context length
CACHE_LIMIT_TAGS = 400_000  # about 100 MB; natural-language captions never repeat and must not fill a worker's memory

Context = Literal["stitched", "chunks"]
PooledProjection = Literal["correct", "sd_scripts"]
Overflow = Literal["tag", "token"]
IdPair = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


def load_tokenizer(folder: str | Path) -> Any:
    """CLIPTokenizer of one tokenizer folder (tokenizer.json, or vocab.json and merges.txt). Never downloads."""
    from transformers import CLIPTokenizer

    folder = Path(folder)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise Halt(
            ExitCode.USAGE,
            f"{folder}: no tokenizer here (tokenizer.json, or vocab.json with merges.txt). "
            "Point model.tokenizers to a folder that holds tokenizer/ and tokenizer_2/.",
        )
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizer library raises bare Exception at a damaged file
        raise Halt(ExitCode.MISMATCH, f"{folder}: its tokenizer is damaged ({str(error)[:200]}): copy it anew") from error


def load_tokenizers(folder: str | Path | None) -> tuple[Any, Any]:
    """Both tokenizers of a folder that holds `tokenizer/` and `tokenizer_2/`; None = the shipped CLIP ones."""
    if folder is None:
        return clip_tokens.tokenizer("tokenizer"), clip_tokens.tokenizer("tokenizer_2")
    return load_tokenizer(Path(folder) / "tokenizer"), load_tokenizer(Path(folder) / "tokenizer_2")


def load_tag_tokenizer(folder: str | Path | None) -> TagTokenizer:
    """TagTokenizer of a folder that holds `tokenizer/` and `tokenizer_2/`; None = of the shipped CLIP ones."""
    return TagTokenizer(*load_tokenizers(folder))


class TagTokenizer:
    """Token ids of tag lists, from a cache per tag; identical to tokenising the joined text.

    A tag is tokenised together with its comma, because CLIP merges punctuation ("k-on!," ends in the one token "!,");
    the last tag stands bare. All ids come from encoder 1's tokenizer: encoder 2's declares "!" as its padding and
    would turn every "!" of a text into id 0. Of `tokenizer_2` only the padding id is taken.
    """

    def __init__(self, tokenizer: Any, tokenizer_2: Any = None) -> None:
        if tokenizer.pad_token == "!":
            raise Halt(
                ExitCode.MISMATCH,
                'tokenizer/ pads with "!", which destroys every "!" in a caption; '
                "tokenizer/ and tokenizer_2/ look swapped",
            )
        if tokenizer_2 is not None and tokenizer_2.get_vocab() != tokenizer.get_vocab():
            raise Halt(ExitCode.MISMATCH, "tokenizer/ and tokenizer_2/ have different vocabularies; SDXL's are equal")
        self.tokenizer = tokenizer
        self.bos: int = tokenizer.bos_token_id
        self.eos: int = tokenizer.eos_token_id
        self.pad_2: int = PAD_2_ID if tokenizer_2 is None else tokenizer_2.pad_token_id
        self._cache: dict[str, tuple[int, ...]] = {}

    def _ids(self, text: str) -> tuple[int, ...]:
        ids = self._cache.get(text)
        if ids is None:
            if len(self._cache) >= CACHE_LIMIT_TAGS:
                self._cache.clear()
            encoded = self.tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)
            ids = self._cache[text] = tuple(encoded["input_ids"])
        return ids

    def content_ids(self, tags: Sequence[str]) -> list[int]:
        """Ids of ", ".join(tags), without begin and end, not cut."""
        ids: list[int] = []
        for tag in tags[:-1]:
            ids += self._ids(tag + ",")
        if tags:
            ids += self._ids(tags[-1])
        return ids

    def fit(
        self, fixed: Sequence[str], flex: Sequence[str], max_tokens: int = 225, overflow: Overflow = "tag",
        *, after: Sequence[str] = (), protect: frozenset[str] = frozenset(),
    ) -> tuple[list[int], int]:  # fmt: skip
        """(content ids, at most `max_tokens`; number of tags that lost tokens).

        overflow "tag": the last flexible tags go whole; only where the fixed part (or, without one, the first tag)
        is too long by itself are its ids cut. "token": cut at `max_tokens`, inside a tag if need be. `after` follows
        the flexible part and `protect` names some of its tags: both stay until all others are gone.
        """
        if overflow == "tag" and (after or not protect.isdisjoint(flex)):
            return self._fit_between(fixed, flex, after, protect, max_tokens)
        tags = [*fixed, *flex, *after]
        parts = [self._ids(tag + ",") for tag in tags]
        last = self._ids(tags[-1]) if tags else ()
        if sum(map(len, parts[:-1])) + len(last) <= max_tokens:  # nearly always
            return [*itertools.chain.from_iterable(parts[:-1]), *last], 0
        ends = [0, *itertools.accumulate(map(len, parts))]  # ends[k]: ids of the first k tags with their commas
        whole = len(tags)  # the longest list of whole tags that fits; a list's last tag has no comma
        while whole and ends[whole - 1] + len(self._ids(tags[whole - 1])) > max_tokens:
            whole -= 1
        dropped = len(tags) - whole
        if dropped and overflow == "tag":
            tags = tags[: max(whole, len(fixed), 1)]
        return self.content_ids(tags)[:max_tokens], dropped

    def _fit_between(
        self, fixed: Sequence[str], flex: Sequence[str], after: Sequence[str], protect: frozenset[str], max_tokens: int
    ) -> tuple[list[int], int]:
        """`fit` where the last flexible tags go although something follows, then ids at the end."""
        kept = list(flex)
        ids = self.content_ids([*fixed, *kept, *after])
        for place in reversed(range(len(flex))):
            if len(ids) <= max_tokens:
                break
            if flex[place] not in protect:
                del kept[place]
                ids = self.content_ids([*fixed, *kept, *after])
        dropped = len(flex) - len(kept)
        whole = [*fixed, *kept, *after]
        cut = len(whole)
        while cut and len(self.content_ids(whole[:cut])) > max_tokens:
            cut -= 1
        return ids[:max_tokens], dropped + len(whole) - cut

    def lost(
        self, fixed: Sequence[str], flex: Sequence[str], max_tokens: int = 225, overflow: Overflow = "tag",
        *, after: Sequence[str] = (), protect: frozenset[str] = frozenset(),
    ) -> list[str]:  # fmt: skip
        """The tags that lost tokens in `fit`, as many as it counts, in written order."""
        _, count = self.fit(fixed, flex, max_tokens, overflow, after=after, protect=protect)
        between = overflow == "tag" and (after or not protect.isdisjoint(flex))
        going = [place for place in reversed(range(len(flex))) if flex[place] not in protect] if between else []
        gone = set(going[:count])  # whole flexible ones first, then what stands last of the rest
        rest = [*fixed, *(tag for place, tag in enumerate(flex) if place not in gone), *after]
        return [*(flex[place] for place in sorted(gone)), *rest[len(rest) - (count - len(gone)) :]]

    def chunk_ids(self, content_ids: Sequence[int], max_tokens: int = 225) -> IdPair:
        """`chunk_ids` with this tokenizer's begin, end and padding ids."""
        return chunk_ids(content_ids, max_tokens, bos=self.bos, eos=self.eos, pad_2=self.pad_2)

    def chunk_ids_many(self, contents: Sequence[Sequence[int]], max_tokens: int = 225) -> IdPair:
        """`chunk_ids_many` with this tokenizer's begin, end and padding ids."""
        return chunk_ids_many(contents, max_tokens, bos=self.bos, eos=self.eos, pad_2=self.pad_2)

    def identity(self) -> str:
        """sha256 of everything that decides the ids (vocabulary, merges, begin, end, padding)."""
        model = json.loads(self.tokenizer.backend_tokenizer.to_str())["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        facts = [sorted(self.tokenizer.get_vocab().items()), merges, self.bos, self.eos, self.pad_2]
        return hashlib.sha256(json.dumps(facts, ensure_ascii=True).encode()).hexdigest()


def chunk_ids(
    content_ids: Sequence[int],
    max_tokens: int = 225,
    *,
    bos: int = BOS_ID,
    eos: int = EOS_ID,
    pad_2: int = PAD_2_ID,
) -> IdPair:
    """`chunk_ids_many` of one caption: each int64 [max_tokens / 75, 77]."""
    ids_1_1N77, ids_2_1N77 = chunk_ids_many([content_ids], max_tokens, bos=bos, eos=eos, pad_2=pad_2)
    return ids_1_1N77[0], ids_2_1N77[0]


def chunk_ids_many(
    contents: Sequence[Sequence[int]], max_tokens: int, *, bos: int, eos: int, pad_2: int
) -> IdPair:
    """Ids for (encoder 1, encoder 2) of B captions' content ids, each int64 [B, max_tokens / 75, 77] in numpy.

    Encoder 1 is padded with `eos`, encoder 2 with `pad_2` after one `eos`. The original trainer looks at the values
    at a chunk's edges to place encoder 2's `eos`; we count, which is the same except for a text with a real "!"
    (id 0) at an edge, where the trainer would lose the token or the end mark.
    """
    if max_tokens not in (75, 150, 225):
        raise Halt(ExitCode.USAGE, f"data.max_tokens is {max_tokens}; choose 75, 150 or 225")
    chunks = max_tokens // CHUNK_CONTENT
    content_1_BT = np.full((len(contents), max_tokens), eos, dtype=np.int64)
    content_2_BT = np.full_like(content_1_BT, pad_2)
    counts_B = np.empty(len(contents), dtype=np.int64)
    for number, content in enumerate(contents):
        counts_B[number] = count = min(len(content), max_tokens)
        content_1_BT[number, :count] = content_2_BT[number, :count] = content[:count]
    ids_1 = np.full((len(contents), chunks, CHUNK_CONTENT + 2), eos, dtype=np.int64)
    ids_2 = np.full_like(ids_1, pad_2)
    ids_1[..., 0] = ids_2[..., 0] = bos
    ids_1[..., 1:-1] = content_1_BT.reshape(len(contents), chunks, CHUNK_CONTENT)
    ids_2[..., 1:-1] = content_2_BT.reshape(len(contents), chunks, CHUNK_CONTENT)
    used_BN = (counts_B[:, None] - CHUNK_CONTENT * np.arange(chunks)).clip(0, CHUNK_CONTENT)
    np.put_along_axis(ids_2, used_BN[..., None] + 1, eos, axis=2)
    return ids_1, ids_2


def encode(
    text_encoder: nn.Module,
    text_encoder_2: nn.Module,
    ids_1_BN77: Tensor,
    ids_2_BN77: Tensor,
    *,
    context: Context = "stitched",
    pooled_projection: PooledProjection = "correct",
) -> tuple[Tensor, Tensor]:
    """(context_BLD, pooled_BP). L = 75 N + 2 when stitched, 77 N as chunks.

    Both encoders give their last but one hidden state, without the final norm; causal, no padding mask. The pooled
    vector is encoder 2's last layer after its final norm at the first end mark of chunk 0, times the projection;
    `sd_scripts` multiplies by the projection's transpose, as the original trainer did with single files.
    Source: released notebook and the behaviour of its trainer. Nothing here waits for the device.
    """
    faults.at("encode_text")
    batch, chunks, length = ids_1_BN77.shape
    out_1 = text_encoder(input_ids=ids_1_BN77.reshape(-1, length), output_hidden_states=True)
    out_2 = text_encoder_2(input_ids=ids_2_BN77.reshape(-1, length), output_hidden_states=True)
    hidden = torch.cat([out_1.hidden_states[-2], out_2.hidden_states[-2]], dim=-1)
    hidden_BN77D = hidden.reshape(batch, chunks, length, -1)
    context_BLD = _stitch(hidden_BN77D) if context == "stitched" else hidden_BN77D.flatten(1, 2)

    last_B77H = out_2.last_hidden_state.reshape(batch, chunks, length, -1)[:, 0]
    # Encoder 1's last id is the end mark in every chunk; so no config is asked (old ones say eos_token_id: 2, wrongly).
    first_end_B = (ids_2_BN77[:, 0] == ids_1_BN77[:, 0, -1:]).int().argmax(dim=-1)
    pooled_BH = last_B77H[torch.arange(batch, device=last_B77H.device), first_end_B]
    weight_PH: Tensor = text_encoder_2.text_projection.weight  # type: ignore[union-attr,assignment]
    return context_BLD, F.linear(pooled_BH, weight_PH if pooled_projection == "correct" else weight_PH.t())


def _stitch(hidden_BN77D: Tensor) -> Tensor:
    """[B, 75 N + 2, D]: one begin, the chunks' 75 inner positions each, one end (RECIPE of the released weights)."""
    inner = hidden_BN77D[:, :, 1:-1].flatten(1, 2)
    return torch.cat([hidden_BN77D[:, 0, :1], inner, hidden_BN77D[:, -1, -1:]], dim=1)


def size_vector(
    original_w: int, original_h: int, crop_top: int, crop_left: int, target_w: int, target_h: int
) -> tuple[int, int, int, int, int, int]:
    """The U-Net's `add_time_ids`, in px: original h, w; crop top, left; target h, w (target = the bucket).

    The U-Net turns each number x into 256 values [cos(x f_i), sin(x f_i)], f_i = 10000^(-i/128), by itself.
    """
    return (original_h, original_w, crop_top, crop_left, target_h, target_w)
