"""train.yaml: the one stage. Pure, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from train.base.errors import ExitCode, Halt
from train.tools.new.decide import _ROOMY_GIB, EPOCHS, Course, Line, asked_visits, described, objective, pictures
from train.tools.new.decide_data import kept_in_front
from train.tools.new.facts import Captions, Facts

PREVIEWS = 10  # of a run
_MAX_TOKENS = 225
_PREVIEWS_GIB = 10.0  # of the card, below which drawing beside training does not fit
# data.mix of captions that have both kinds: a base of tags sees mostly those.
_MIX = {"tags": 50, "tags_prose": 30, "prose": 20}  # docs/captions.md
_RANK = {"character": (16, 8.0), "style": (32, 16.0), "concept": (16, 8.0), "continue": (64, 32.0)}


@dataclass(frozen=True)
class _Rate:
    optimizer: str
    value: float
    why: str


def stage_lines(facts: Facts, course: Course) -> Iterator[Line]:
    """Every line, in the order of the file."""
    asked, machine = facts.asked, facts.machine
    yield Line("stage", asked.name, "names the files that it leaves")
    yield Line("seed", 41, "of order, captions, noise; any number")
    yield Line("output_dir", f"{asked.out}/run")
    yield Line("epochs", course.epochs, _epochs_why(facts, course))
    precision, why = _precision(facts)
    yield Line("precision", precision, why)
    yield from _model(facts, course)
    yield from _adapter(course)
    yield from _data(facts, course)
    yield Line("batch.micro", course.micro, _batch_why(course))
    yield Line("batch.effective", course.effective, f"about {course.updates:,} updates")
    if facts.base.standard:
        yield Line("batch.split", "auto", "a tile is cut into as many parts as the memory asks for; same numbers")
    yield from _optimizer(facts, course)
    yield from _noise(facts)
    yield from _keeping(course)
    yield from _watching(facts, course)
    yield Line("data.workers", 0 if machine.gpu is None else min(4, machine.cores), f"{machine.cores} cores here")


def _epochs_why(facts: Facts, course: Course) -> str:
    if (own := asked_visits(facts)) is not None:
        return f"the set asks for {own:,} visits an epoch: about {course.visits * course.epochs:,} visits in all"
    if course.adapter or not facts.base.standard:
        return f"each picture is seen {course.repeats * course.epochs} times: few pictures many times, many pictures few times"
    return "Animagine 3.0 and 3.1: every stage saw each picture ten times (cards)"


def _precision(facts: Facts) -> tuple[str, str]:
    machine = facts.machine
    if machine.gpu is None:
        return "fp32", "the processor"
    return ("bf16", f"{machine.gpu} computes it, and it needs no loss scale") if machine.bf16 else ("fp16", f"{machine.gpu} has no bf16")


def _model(facts: Facts, course: Course) -> Iterator[Line]:
    base, roomy = facts.base, facts.machine.free_gib >= _ROOMY_GIB
    known = f"{base.asked}, commit {base.commit}" if base.commit else ""
    yield Line("model.init_from", base.path, known)
    yield Line("model.train_text_encoders", False, "as in the finetunes of Animagine 3.1 (card): the words keep their meaning")
    if course.offload:
        yield Line("optimizer.offload", "host", f"{facts.machine.free_gib:g} GiB: fp32 weights, gradients and state lie in host memory; same numbers, only slower")
    if course.weights != "fp32":
        yield Line("model.weights", course.weights, f"{facts.machine.free_gib:g} GiB: with stochastic rounding; another result than fp32 (docs/speed.md)")
    if not base.standard:
        yield Line("model.gradient_checkpointing", "none", "memory is no concern with so small a base")
    elif course.adapter and not roomy:
        yield Line("model.gradient_checkpointing", "full", f"{facts.machine.free_gib:g} GiB: everything is computed again, no number changes")
    else:
        yield Line("model.gradient_checkpointing", "auto", f"{facts.machine.free_gib:g} GiB: as little is computed again as fits")
    for key, value in base.conditioning.items():
        if key.startswith("model.") and value not in ("correct", "stitched"):
            yield Line(key, value, "as the base was trained")


def _adapter(course: Course) -> Iterator[Line]:
    if not course.adapter:
        return
    rank, alpha = _RANK[course.goal]
    if course.images < 8:
        rank, alpha = rank // 2, alpha / 2
    yield Line("adapter.type", "lora", course.why)
    yield Line("adapter.rank", rank, f"{course.goal}, {pictures(course.images)}: a larger one holds more, of what was not meant too")
    yield Line("adapter.alpha", alpha, "half of the rank, as lora.yaml")
    if course.nf4:
        yield Line("adapter.base", "nf4", "the frozen base in 4 bit, rounded (extra: lora)")


def _data(facts: Facts, course: Course) -> Iterator[Line]:
    captions = facts.own.captions
    yield Line("data.path", f"{facts.asked.out}/set")
    yield Line("data.select", "pretrain", "the one selection, by the name that every set has")
    if captions.separator not in (None, "|||"):
        yield Line("data.separator", captions.separator, "as dataset.yaml")
    if captions.tagged:
        yield Line("data.shuffle_tags", True, f"{captions.tags_each} tags in a caption: in a new order every epoch")
    length = facts.base.conditioning.get("data.max_tokens", _MAX_TOKENS)
    why = "as the base was trained" if "data.max_tokens" in facts.base.conditioning else "three times CLIP's 75, as Animagine was trained"
    yield Line("data.max_tokens", length, f"{why}; 95 of 100 captions have at most {captions.tokens} tokens, about")
    if captions.both or (captions.tagged and captions.told):
        yield Line("data.mix", dict(_MIX), f"{captions.both:,} captions have tags and sentences: half of the visits show the tags alone, as the base knows them")
    yield from _names(captions, facts)
    if looks := described(captions, course.goal):
        yield Line("data.tag_dropout", 0.5, f"the name shall come to mean the look, not {', '.join(looks[:3])} beside it: half of the other tags are left "
                   "out each time")  # fmt: skip


def _names(captions: Captions, facts: Facts) -> Iterator[Line]:
    """Trigger and protected tags. Beside a prior no trigger: it would open the captions of the class too."""
    word = captions.trigger
    if facts.asked.trigger is not None and facts.asked.trigger != word and captions.captioned:
        if facts.beside:
            raise Halt(ExitCode.USAGE, f"--trigger {facts.asked.trigger} beside --prior would open the captions of the class too: write it into your captions")
        yield Line("data.trigger", facts.asked.trigger, "as asked (--trigger): opens every caption")
    elif word is not None and captions.trigger_place is not None:
        if not facts.beside:
            yield Line("data.trigger", word, f"{captions.trigger_why}; it opens those without it")
        if kept_in_front(facts.own) is None:
            yield Line("data.protect", [word], "never left out, neither by chance nor for want of room")


def _batch_why(course: Course) -> str:
    if course.micro == 1:
        return f"{pictures(course.images)}: one at a time, so that every one counts alike"
    if course.effective > course.micro:
        return f"pictures of a tile; {course.micro} lets 1, 2 or 4 cards share an update"
    return f"{pictures(course.images)}: {course.micro} at once are an update"


def _rate(facts: Facts, course: Course) -> _Rate:
    if not facts.base.standard:
        return _Rate("adamw", 1.0e-3, "measured: 40 pictures of the drawn world teach its small model a new name")
    if course.adapter:
        value = 1.0e-4 if course.goal in ("style", "continue") or course.images < 8 else 2.0e-4
        return _Rate("adamw", value, "lora.yaml: 2e-4; 1e-4 to 5e-4 are common" + (", the low end for a look or for very few pictures" if value == 1e-4 else ""))
    if course.images >= 20_000:
        return _Rate("adafactor", 7.5e-6, "Animagine 3.0, stage 1: 7.5e-6 at 96 pictures an update (its released config)")
    return _Rate("adafactor", 2.0e-6, "Animagine 3.0, stage 2, and 3.1, finetune 1: 2e-6 at 48 pictures an update (cards)")


def _optimizer(facts: Facts, course: Course) -> Iterator[Line]:
    rate = _rate(facts, course)
    yield Line("optimizer.name", rate.optimizer, "as lora.yaml" if course.adapter else "the cards' of the finetunes" if rate.optimizer == "adafactor" else "")
    yield Line("optimizer.unet_lr", rate.value, rate.why)
    if rate.optimizer == "adamw":
        yield Line("optimizer.weight_decay", 0.01, "as lora.yaml")
    elif course.weights == "fp32":
        yield Line("optimizer.max_grad_norm", 0.0, "3.0's released config, the only one of this lab for Adafactor")
    if course.adapter or not facts.base.standard:
        yield Line("schedule.name", "cosine", "as lora.yaml: falls over the whole run")
    else:
        yield Line("schedule.name", "constant_with_warmup", "card")
    yield Line("schedule.warmup_steps", 0.05, f"of all updates, {max(1, round(0.05 * course.updates)):,}: the recipe's 100 would be {_share_of_hundred(course)}")


def _share_of_hundred(course: Course) -> str:
    return "more than this run" if course.updates <= 100 else f"{100 / course.updates:.0%} of it"


def _noise(facts: Facts) -> Iterator[Line]:
    prediction, zero = objective(facts.base)
    if prediction == "epsilon":
        named = facts.base.vocabulary in ("animagine30", "animagine31")
        if named:
            yield Line("noise.offset", 0.0357, "card: both finetunes of the base's own recipe")
        if facts.base.prediction is None:
            yield Line("loss.prediction", "epsilon", "the base does not say; most single files predict epsilon. Name v-prediction here if its card does")
        return
    yield Line("loss.prediction", prediction, "as the base predicts")
    if prediction == "v":
        yield Line("noise.zero_terminal_snr", zero, "as the base" if facts.base.zero_terminal_snr is not None else "the base does not say: see its card")


def _keeping(course: Course) -> Iterator[Line]:
    every = max(1, course.updates // EPOCHS)
    yield Line("checkpoint.every_steps", min(120, every), "updates; a stopped run goes on from the last")
    if not course.adapter:
        yield Line("checkpoint.permanent_every_steps", 1_000_000, "more than there are: the newest two stay, each as large as the model in training")


def _watching(facts: Facts, course: Course) -> Iterator[Line]:
    if facts.machine.free_gib >= _PREVIEWS_GIB or facts.machine.gpu is None:
        times = PREVIEWS if facts.machine.gpu else PREVIEWS // 2
        yield Line("sampling.every_steps", max(1, course.updates // times), f"updates between previews: {times} of a run")
        yield Line("sampling.prompts", f"{facts.asked.out}/prompts.yaml", "the same as before and after")
    else:
        yield Line("sampling.every_steps", 0, f"{facts.machine.free_gib:g} GiB: drawing beside training does not fit; pictures are drawn after it")
    if course.held:
        yield Line("validation.share", course.share, f"about {course.held:,} pictures are not trained on and show whether it learns or memorises")
        yield Line("validation.every_steps", max(1, course.updates // PREVIEWS), "updates between two looks at them")
    yield from _license(facts, course)


def _license(facts: Facts, course: Course) -> Iterator[Line]:
    if course.adapter or not facts.base.standard:
        yield Line("export.every_epochs", 1 if course.epochs <= EPOCHS else 2, "a usable file of each, to choose from: report.html shows the same prompts of all")
    if facts.asked.license is not None:
        yield Line("export.license", facts.asked.license, "as asked (--license)")
    elif facts.base.license is None:
        yield Line("export.license", "as the base, whose files state none", "set the licence of the base's page before you publish")
    else:
        yield Line("export.license", facts.base.license, "the base's")
    yield Line("export.title", facts.asked.name)
