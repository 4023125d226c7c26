"""The shipped tokenizers: CLIP's own ids, SDXL's paddings, and folders that stock loaders read."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tinysdxl
from cliptokens import TAGS, B, E
from diffusers import StableDiffusionXLPipeline
from stages import Stage, losses

from train.base.errors import ExitCode, Halt
from train.config import prompts
from train.config.stage import ModelConfig, StageConfig
from train.engine import refusals
from train.model import clip_tokens, single_file, source
from train.model import folder as model_folder
from train.model.text import TagTokenizer, load_tag_tokenizer
from train.observe import inference

NEGATIVE = (
    "nsfw, lowres, (bad), text, error, fewer, extra, missing, worst quality, jpeg artifacts, low quality, watermark, "
    "unfinished, displeasing, oldest, early, chromatic aberration, signature, extra digits, artistic error, username, "
    "scan, [abstract]"
)


@pytest.fixture(scope="module")
def clip() -> TagTokenizer:
    return load_tag_tokenizer(None)


def test_the_list_is_clips(clip: TagTokenizer) -> None:
    merges = clip_tokens.merges()
    assert (len(merges), merges[0], merges[-1]) == (49152 - 256 - 2, ("i", "n"), ("jeky", "ll</w>"))
    text = "".join(f"{first} {second}\n" for first, second in merges)
    assert hashlib.sha256(text.encode()).hexdigest() == "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"
    assert len(clip.tokenizer) == clip_tokens.ROWS
    assert (clip.bos, clip.eos, clip.pad_2) == (B, E, 0)
    notice = clip_tokens.ASSET.with_name("clip_merges.LICENSE.txt").read_text()
    assert "Copyright (c) 2021 OpenAI" in notice and "MIT License" in notice
    assert sum(path.stat().st_size for path in clip_tokens.ASSET.parent.iterdir()) < 1_500_000


def test_ids_as_measured_on_the_published_tokenizers(clip: TagTokenizer) -> None:
    assert clip.tokenizer("a photo of a cat")["input_ids"] == [B, 320, 1125, 539, 320, 2368, E]
    assert clip.content_ids(["k-on!"]) == [330, 268, 525, 256]
    assert clip.content_ids(["k-on!", "1girl"])[:4] == [330, 268, 525, 29325]
    assert clip.content_ids(["|||"]) == [91, 7566]
    assert len(clip.content_ids(["masterpiece", "best quality", "very aesthetic", "absurdres"])) == 10
    assert len(clip.content_ids(NEGATIVE.split(", "))) == 59
    joined = clip.tokenizer(", ".join(TAGS), add_special_tokens=False)["input_ids"]
    assert clip.content_ids(TAGS) == joined


ROWS = {  # content ids: (encoder 1, encoder 2), each three chunks as (text ids, end marks, pads)
    0: ((0, 76, 0),) * 3 + ((0, 1, 75),) * 3,
    1: ((1, 75, 0), (0, 76, 0), (0, 76, 0), (1, 1, 74), (0, 1, 75), (0, 1, 75)),
    75: ((75, 1, 0), (0, 76, 0), (0, 76, 0), (75, 1, 0), (0, 1, 75), (0, 1, 75)),
    76: ((75, 1, 0), (1, 75, 0), (0, 76, 0), (75, 1, 0), (1, 1, 74), (0, 1, 75)),
    150: ((75, 1, 0), (75, 1, 0), (0, 76, 0), (75, 1, 0), (75, 1, 0), (0, 1, 75)),
    225: ((75, 1, 0),) * 6,
    300: ((75, 1, 0),) * 6,
}  # fmt: skip


@pytest.mark.parametrize("count", ROWS)
def test_rows_of_both_encoders(count: int, clip: TagTokenizer) -> None:
    content = clip.content_ids(["cat"] * (count // 2 + 1))[:count]  # "cat," is two ids
    assert len(content) == count
    found = [chunk.tolist() for ids in clip.chunk_ids(content) for chunk in ids]
    text = iter(content[:225] * 2)
    for (own, ends, pads), chunk in zip(ROWS[count], found, strict=True):
        assert chunk == [B, *(next(text) for _ in range(own)), *[E] * ends, *[0] * pads]


def test_written_folders_are_those_of_sdxl(clip: TagTokenizer, tmp_path: Path) -> None:
    model_folder.write_tokenizers(None, tmp_path)
    again = load_tag_tokenizer(tmp_path)
    assert again.identity() == clip.identity()
    assert again.content_ids(TAGS) == clip.content_ids(TAGS)
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        told = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert (told["tokenizer_class"], told["pad_token"], told["model_max_length"]) == ("CLIPTokenizer", pad, 77)
        vocabulary = json.loads((tmp_path / name / "vocab.json").read_text())
        assert (len(vocabulary), vocabulary["!"], vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (49408, 0, B, E)
        assert (tmp_path / name / "merges.txt").read_text().splitlines()[:3] == ["#version: 0.2", "i n", "t h"]
    first = {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()}
    (tmp_path / "again").mkdir()
    model_folder.write_tokenizers(None, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again/tokenizer").iterdir()} == first


def test_a_model_of_another_vocabulary_is_told() -> None:
    configs = {"text_encoder": {"vocab_size": 523}, "text_encoder_2": {"vocab_size": 49408}}
    assert "523 and 49408 rows" in str(clip_tokens.unlike(configs))
    assert clip_tokens.unlike({"text_encoder": {}, "text_encoder_2": {"vocab_size": 49408}}) is None


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SDXL with CLIP's vocabulary, as one file and nothing else: no folder, no tokenizers."""
    folder = tmp_path_factory.mktemp("single")
    tinysdxl.write(folder / "made", "least", clip=True)
    single_file.to_single_file(folder / "made", folder / "alone.safetensors", metadata={"modelspec.license": "CC0"})
    shutil.rmtree(folder / "made")
    return folder / "alone.safetensors"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_single_file_alone_trains_samples_and_converts(single: Path, dataset: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, single)
    assert stage.run("max_updates=2") == ExitCode.DONE, stage.message
    assert len(losses(stage.output)) == 2
    single_file.to_folder(single, tmp_path / "folder")
    prompt = prompts.PromptsFile(steps=1, prompts=[prompts.Prompt(text="1girl, k-on!", width=32, height=32)])
    want = inference.draw(inference.open_model(single, device="cpu"), prompt)[0].tobytes()
    assert inference.draw(inference.open_model(tmp_path / "folder", device="cpu"), prompt)[0].tobytes() == want
    for folder in (tmp_path / "folder", stage.output / "model"):
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
        pipeline.set_progress_bar_config(disable=True)
        assert (pipeline.tokenizer.pad_token_id, pipeline.tokenizer_2.pad_token_id) == (E, 0)
        assert pipeline.tokenizer("a photo of a cat")["input_ids"] == [B, 320, 1125, 539, 320, 2368, E]
        assert pipeline("1girl", height=32, width=32, num_inference_steps=1).images[0].size == (32, 32)
    exported = stage.output / "pretrain.safetensors"
    assert source.resolve(ModelConfig(init_from=str(exported))).tokenizers is None
    inference.open_model(exported, device="cpu")


def test_tokenizers_of_another_model_are_refused_by_name(base_model: Path, single: Path, tmp_path: Path) -> None:
    single_file.to_single_file(base_model, tmp_path / "tiny.safetensors", metadata={"modelspec.license": "CC0"})
    tiny = str(tmp_path / "tiny.safetensors")
    with pytest.raises(Halt, match=r"tiny\.safetensors carries no tokenizers.* 521 rows.*--tokenizers") as caught:
        tinysdxl.load_components(tiny)
    assert caught.value.code == ExitCode.MISMATCH
    config = replace(StageConfig(stage="s", seed=1, output_dir="o", epochs=1), model=ModelConfig(init_from=tiny))
    with pytest.raises(Halt, match=r"521 rows, CLIP's tokenizers 49408 tokens\. model\.tokenizers"):
        refusals.refuse_source(config.origin, source.resolve(config.model))
    model_folder.write_tokenizers(None, tmp_path)
    with pytest.raises(Halt, match=r"tokenizer has 49408 tokens, text_encoder of .* 521 rows"):
        tinysdxl.load_components(tiny, tokenizers=str(tmp_path))
    assert tinysdxl.load_components(tiny, tokenizers=str(base_model)).unet is not None
