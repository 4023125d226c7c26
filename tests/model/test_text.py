"""Text path: tag cache against the tokenizer, chunk ids against the table, encoding against the definition."""

from __future__ import annotations

import os
import timeit
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cliptokens import TABLE, TAGS, B, E, T, small_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from train.base.errors import ExitCode, Halt
from train.model.recomputation import set_text_checkpointing
from train.model.text import (
    TagTokenizer,
    chunk_ids,
    chunk_ids_many,
    encode,
    load_tag_tokenizer,
    load_tokenizer,
    size_vector,
)


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return small_tokenizer()


def plain_ids(tokenizer: CLIPTokenizer, tags: list[str]) -> list[int]:
    return tokenizer(", ".join(tags), add_special_tokens=False)["input_ids"]


@given(tags=st.lists(st.sampled_from(TAGS) | st.text(max_size=12), max_size=20))
def test_tag_cache_equals_the_tokenizer(tokenizer: CLIPTokenizer, tags: list[str]) -> None:
    tagged = TagTokenizer(tokenizer)
    assert tagged.content_ids(tags) == plain_ids(tokenizer, tags)
    assert tagged.content_ids(tags) == plain_ids(tokenizer, tags)  # now from the cache


def test_comma_merges_into_the_punctuation_before_it(tokenizer: CLIPTokenizer) -> None:
    merged = tokenizer.get_vocab()["!,</w>"]
    assert merged in TagTokenizer(tokenizer).content_ids(["k-on!", "1girl"])
    assert merged not in TagTokenizer(tokenizer).content_ids(["1girl", "k-on!"])


def test_the_cache_is_ten_times_faster_than_the_tokenizer(tokenizer: CLIPTokenizer) -> None:
    tags = [f"tag number {i}" for i in range(49)]
    tagged = TagTokenizer(tokenizer)
    tagged.content_ids(tags)

    def best_s(function: Callable[[], object]) -> float:
        return min(timeit.repeat(function, number=5, repeat=9))

    assert best_s(lambda: plain_ids(tokenizer, tags)) > 10 * best_s(lambda: tagged.content_ids(tags))


@pytest.mark.skipif("CLIP_TOKENIZER" not in os.environ, reason="CLIP_TOKENIZER names no folder with CLIP's tokenizer")
def test_ids_of_the_real_vocabulary() -> None:
    tagged = TagTokenizer(load_tokenizer(os.environ["CLIP_TOKENIZER"]))
    assert tagged.content_ids(["k-on!"]) == [330, 268, 525, 256]
    assert tagged.content_ids(["k-on!", "x"])[:4] == [330, 268, 525, 29325]
    assert tagged.content_ids(["|||"]) == [91, 7566]
    prefix = ["masterpiece", "best quality", "very aesthetic", "absurdres"]
    assert len(tagged.content_ids(prefix)) == 10
    negative = (
        "nsfw, lowres, (bad), text, error, fewer, extra, missing, worst quality, jpeg artifacts, low quality, "
        "watermark, unfinished, displeasing, oldest, early, chromatic aberration, signature, extra digits, artistic error, "
        "username, scan, [abstract]"
    )
    assert len(tagged.content_ids(negative.split(", "))) == 59
    many = [tag for tag in TAGS if tag.strip()] * 3
    assert tagged.content_ids(many) == plain_ids(tagged.tokenizer, many)


@pytest.mark.parametrize("count", TABLE)
def test_chunk_ids_of_every_row_of_the_table(count: int) -> None:
    ids_1, ids_2 = chunk_ids([T] * count)
    assert ids_1.dtype == ids_2.dtype == "int64"
    assert (ids_1.tolist(), ids_2.tolist()) == TABLE[count]


def trainer_chunks(content: list[int], max_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """The definition, word by word: one flat row, cut into chunks, encoder 2's edges repaired by value."""
    flat_1 = [B, *content[:max_tokens], E]
    flat_2 = flat_1 + [0] * (max_tokens + 2 - len(flat_1))
    flat_1 = flat_1 + [E] * (max_tokens + 2 - len(flat_1))
    chunks_1, chunks_2 = [], []
    for start in range(1, max_tokens, 75):
        chunks_1.append([flat_1[0], *flat_1[start : start + 75], flat_1[-1]])
        chunk = [flat_2[0], *flat_2[start : start + 75], flat_2[-1]]
        if chunk[75] not in (E, 0):
            chunk[76] = E
        if chunk[1] == 0:
            chunk[1] = E
        chunks_2.append(chunk)
    return chunks_1, chunks_2


@given(content=st.lists(st.integers(1, 49405), max_size=240), max_tokens=st.sampled_from([75, 150, 225]))
def test_chunk_ids_equal_the_trainers_rule(content: list[int], max_tokens: int) -> None:
    ids_1, ids_2 = chunk_ids(content, max_tokens)
    assert (ids_1.tolist(), ids_2.tolist()) == trainer_chunks(content, max_tokens)


def test_chunk_ids_of_many_captions_are_those_of_each() -> None:
    contents = [[T] * count for count in (0, 1, 74, 75, 76, 149, 150, 151, 225, 226, 300)]
    many_1, many_2 = chunk_ids_many(contents, 225, bos=B, eos=E, pad_2=0)
    assert [(one.tolist(), two.tolist()) for one, two in zip(many_1, many_2, strict=True)] == [
        trainer_chunks(content, 225) for content in contents
    ]


def test_a_real_exclamation_mark_at_an_edge_survives() -> None:
    _, ids_2 = chunk_ids([0] + [T] * 73 + [0, 0])
    assert ids_2[0].tolist() == [B, 0] + [T] * 73 + [0, E]
    assert ids_2[1].tolist()[:4] == [B, 0, E, 0]


def test_max_tokens_is_75_150_or_225() -> None:
    with pytest.raises(Halt, match=r"data\.max_tokens") as caught:
        chunk_ids([], 77)
    assert caught.value.code == ExitCode.USAGE


def test_fit_drops_whole_flexible_tags(tokenizer: CLIPTokenizer) -> None:
    tagged = TagTokenizer(tokenizer)
    fixed, flex = ["aa"] * 10, ["bb"] * 30  # three ids with the comma, two without: 74 + 1 after 25 tags
    ids, dropped = tagged.fit(fixed, flex, 75)
    assert ids == plain_ids(tokenizer, fixed + flex[:15])
    assert dropped == 15
    ids, dropped = tagged.fit(fixed, flex, 75, overflow="token")
    assert ids == plain_ids(tokenizer, fixed + flex)[:75]
    assert dropped == 15
    assert tagged.fit(fixed, flex[:15], 75) == (ids[:74], 0)


def test_fit_cuts_only_a_fixed_part_that_is_too_long(tokenizer: CLIPTokenizer) -> None:
    tagged = TagTokenizer(tokenizer)
    ids, dropped = tagged.fit(["aa"] * 30, ["bb"] * 5, 75)
    assert ids == plain_ids(tokenizer, ["aa"] * 30)[:75]
    assert dropped == 10
    ids, dropped = tagged.fit([], ["z" * 100, "bb"], 75)  # a sentence without commas is cut, not lost
    assert len(ids) == 75
    assert dropped == 2


@given(
    fixed=st.lists(st.sampled_from(TAGS), max_size=4),
    flex=st.lists(st.sampled_from(TAGS), max_size=60),
    max_tokens=st.sampled_from([75, 150, 225]),
)
def test_fit_keeps_the_longest_whole_prefix(
    tokenizer: CLIPTokenizer, fixed: list[str], flex: list[str], max_tokens: int
) -> None:
    tags = fixed + flex
    whole = max(k for k in range(len(tags) + 1) if len(plain_ids(tokenizer, tags[:k])) <= max_tokens)
    ids, dropped = TagTokenizer(tokenizer).fit(fixed, flex, max_tokens)
    # a fixed part that is too long by itself is cut, and no flexible tag takes its place
    assert ids == plain_ids(tokenizer, tags[: max(whole, len(fixed))])[:max_tokens]
    assert dropped == len(tags) - whole


def test_tokenizer_folders(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    small_tokenizer(pad="!").save_pretrained(tmp_path / "tokenizer_2")
    tagged = load_tag_tokenizer(tmp_path)
    assert tagged.pad_2 == 0
    assert tagged.eos == tokenizer.eos_token_id
    # "!" reaches encoder 2 although its own tokenizer would swallow it
    assert tagged.content_ids(["k-on!", "a"]) == plain_ids(tokenizer, ["k-on!", "a"])
    assert tagged.identity() == TagTokenizer(tokenizer).identity()
    assert tagged.identity() != TagTokenizer(CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1})).identity()
    with pytest.raises(Halt, match="swapped"):
        TagTokenizer(load_tokenizer(tmp_path / "tokenizer_2"))
    with pytest.raises(Halt, match="different vocabularies"):
        TagTokenizer(tokenizer, CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}))
    with pytest.raises(Halt, match="no tokenizer here"):
        load_tokenizer(tmp_path)


VOCAB = 100
BOS, EOS = 98, 99


@pytest.fixture(scope="module", params=[EOS, 2], ids=["eos", "legacy eos_token_id 2"])
def encoders(request: pytest.FixtureRequest) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    torch.manual_seed(0)
    common = {
        "vocab_size": VOCAB, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 77,
        "bos_token_id": BOS, "eos_token_id": request.param, "initializer_range": 1.0,
    }  # fmt: skip
    one = CLIPTextModel(CLIPTextConfig(hidden_size=16, num_hidden_layers=3, **common))
    two = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=24, num_hidden_layers=4, projection_dim=24, **common))
    for module in (one, two.text_model):
        torch.nn.init.normal_(module.final_layer_norm.weight)  # so that a misplaced norm shows
    return one, two


def layers_of(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """Embeddings and the output of every layer, by hand, causal."""
    states = [model.embeddings(input_ids=ids)]
    mask = torch.full((77, 77), float("-inf")).triu(1)[None, None]
    for layer in model.encoder.layers:
        states.append(layer(states[-1], mask))
    return states


def batch_ids(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pairs = [
        chunk_ids(torch.randint(1, 98, (count,), generator=generator).tolist(), bos=BOS, eos=EOS) for count in counts
    ]
    return tuple(torch.stack([torch.from_numpy(pair[i]) for pair in pairs]) for i in (0, 1))  # type: ignore[return-value]


def test_encode_equals_the_definition(encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]) -> None:
    one, two = encoders
    counts = [0, 10, 75, 140, 225]
    ids_1, ids_2 = batch_ids(counts)
    with torch.no_grad():
        context, pooled = encode(one, two, ids_1, ids_2)
        _, as_run = encode(one, two, ids_1, ids_2, pooled_projection="sd_scripts")
        chunks, _ = encode(one, two, ids_1, ids_2, context="chunks")
        assert context.shape == (5, 227, 40)
        assert chunks.shape == (5, 231, 40)
        assert pooled.shape == (5, 24)
        for b, count in enumerate(counts):
            layers_2 = layers_of(two.text_model, ids_2[b])
            want = torch.cat([layers_of(one, ids_1[b])[2], layers_2[3]], dim=-1)
            stitched = [want[0, :1], want[0, 1:76], want[1, 1:76], want[2, 1:76], want[2, 76:]]
            torch.testing.assert_close(context[b], torch.cat(stitched), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(chunks[b], want.flatten(0, 1), rtol=1e-4, atol=1e-4)
            end = two.text_model.final_layer_norm(layers_2[4][0, min(count, 75) + 1])
            projection = two.text_projection.weight  # W = P^T
            torch.testing.assert_close(pooled[b], end @ projection.T, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(as_run[b], end @ projection, rtol=1e-4, atol=1e-4)


def test_pooled_equals_transformers_own(encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]) -> None:
    one, two = encoders
    ids_1, ids_2 = batch_ids([3, 60, 200])
    with torch.no_grad():
        _, pooled = encode(one, two, ids_1, ids_2)
        torch.testing.assert_close(pooled, two(input_ids=ids_2[:, 0]).text_embeds, rtol=1e-5, atol=1e-5)


def test_projection_of_an_asymmetric_matrix(encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]) -> None:
    """The file stores P with pooled = x @ P; a Linear holds W = P^T. P = [[1, 2], [3, 4]], x = [1, 0] gives [1, 2]."""
    linear = torch.nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T.contiguous()

    class Output:
        hidden_states = [torch.zeros(1, 77, 2)] * 3
        last_hidden_state = torch.tensor([1.0, 0.0]).expand(1, 77, 2)

    class Encoder(torch.nn.Module):
        text_projection = linear

        def forward(self, **_: object) -> type[Output]:
            return Output

    ids = torch.full((1, 1, 77), EOS)
    with torch.no_grad():
        _, correct = encode(Encoder(), Encoder(), ids, ids)
        _, as_run = encode(Encoder(), Encoder(), ids, ids, pooled_projection="sd_scripts")
    assert correct.tolist() == [[1.0, 2.0]]
    assert as_run.tolist() == [[1.0, 3.0]]


def test_gradients_reach_both_encoders_but_not_the_unused_layer(
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
) -> None:
    one, two = encoders
    context, pooled = encode(one, two, *batch_ids([5]))
    (context.square().sum() + pooled.square().sum()).backward()
    unused = {name for name, parameter in one.named_parameters() if parameter.grad is None}
    wanted = {name for name, _ in one.named_parameters() if ".layers.2." in name or "final_layer_norm" in name}
    assert unused == wanted
    assert all(parameter.grad is not None for parameter in two.parameters())
    one.zero_grad()
    two.zero_grad()


def test_recomputing_layers_changes_no_gradient(encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]) -> None:
    """transformers collects hidden states with hooks; inside a checkpointed layer those could be cut off."""

    def gradients(recompute: bool) -> list[torch.Tensor]:
        for encoder in encoders:
            encoder.train()
            set_text_checkpointing(encoder, recompute)
            encoder.zero_grad()
        context, pooled = encode(*encoders, *batch_ids([5, 80]))
        (context.square().sum() + pooled.square().sum()).backward()
        found = [p.grad.clone() for encoder in encoders for p in encoder.parameters() if p.grad is not None]
        for encoder in encoders:
            set_text_checkpointing(encoder, False)
            encoder.zero_grad()
            encoder.eval()
        return found

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(recomputed) > 20
    for one, two in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, two)


def test_size_vector_order_and_the_unets_embedding_of_it() -> None:
    assert size_vector(1500, 2000, 21, 7, 896, 1152) == (2000, 1500, 21, 7, 1152, 896)
    from diffusers.models.embeddings import Timesteps

    embedded = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(torch.tensor([1216.0]))[0]
    torch.testing.assert_close(embedded[:4], torch.tensor([-0.9793, 0.8241, -0.8370, 0.9630]), atol=1e-4, rtol=0)
    torch.testing.assert_close(embedded[128:130], torch.tensor([-0.2022, 0.5665]), atol=1e-4, rtol=0)


def test_what_follows_the_flexible_part_and_protected_tags_outlast_the_budget(tokenizer) -> None:
    tagged = TagTokenizer(tokenizer)
    flex, after = [f"b{n}" for n in range(60)], ["best", "a girl stands, smiling."]
    ids, dropped = tagged.fit(["aa"], flex, 75, after=after, protect=frozenset(["b59"]))
    kept = 60 - dropped
    assert 0 < kept < 60 and len(ids) <= 75
    assert ids == tagged.content_ids(["aa", *flex[: kept - 1], "b59", *after])
    assert len(tagged.content_ids(["aa", *flex[:kept], "b59", *after])) > 75, "no tag more would fit"
    assert tagged.fit(["aa"], flex[:3], 75, after=after) == (tagged.content_ids(["aa", *flex[:3], *after]), 0)
    ids, dropped = tagged.fit([], ["bb"], 75, after=["z" * 100])
    assert (len(ids), dropped) == (75, 2)
